"""The model card of an exported folder: facts, and how to use it."""

from collections.abc import Mapping

from torch import Tensor

from partial_fc.checkpoint import Checkpoint
from partial_fc.evaluate.protocol import COLUMNS, measures, missing, of_a_list
from partial_fc.export.formats import TOLERANCE
from partial_fc.export.model import Embedder

_CARD = """\
---
library_name: partial_fc
pipeline_tag: image-feature-extraction
---

# {name}, {dim} dimensions

Maps RGB images of {height} x {width} pixels (height x width) to normalized embeddings of {dim} numbers; the dot
product of two is their cosine. {parameters:,} parameters, trained with partial_fc: {classes:,} classes, margin
{margin}, {step:,} steps of {batch:,} images.{average}

```python
import partial_fc

model = partial_fc.load_backbone("path/to/this/folder")  # or "owner/name" on the Hugging Face hub
image = partial_fc.load_image("image.jpg", model.image_size)  # (3, {height}, {width}) uint8
embedding = model(image.unsqueeze(0))  # (1, {dim}), length 1
```

Pixels go in as uint8 of values 0 to 255. The model itself, in every format, subtracts the mean {mean} and divides by
{std} (RGB). {flip}

## Evaluation

{evaluation}

## Files

{files}
"""


def model_card(
    found: Checkpoint,
    model: Embedder,
    evaluation: dict | None,
    differences: Mapping[str, float],
    checked_with: Tensor | None,
    gallery: tuple[int, ...] | None,
) -> str:
    """README.md; `evaluation` as in evaluation.json, `differences` from the eager model by file."""
    config = found.config()
    files = ["- config.json: all of this for programs", "- model.safetensors: the parameters"]
    for name, difference in differences.items():
        files.append(
            f"- {name}: any batch size; embeddings of {len(checked_with)} real images differ from the eager model's by "
            f"at most {difference:.1e} ({TOLERANCE:.0e} allowed)"
        )
    if gallery is not None:
        files.append(
            f"- class_centers.safetensors: {' x '.join(map(str, gallery))}, scaled to length 1; row i is class i of "
            "classes.txt"
        )
    margin = config.head.margin
    parameters = ", ".join(f"{name} {value}" for name, value in margin.parameters.items())
    height, width = model.image_size
    averaged = model.config["weights"] == "averaged"
    return _CARD.format(
        name=model.config["backbone"]["name"],
        dim=model.embedding_dim,
        height=height,
        width=width,
        parameters=sum(parameter.numel() for parameter in model.backbone.parameters()),
        classes=found.manifest["num_classes"],
        margin=f"{margin.name} ({parameters})" if parameters else margin.name,
        step=found.step,
        batch=config.data.global_batch_size,
        average=f" The weights are their moving average, of decay {config.engine.ema} a step." * averaged,
        mean=model.config["mean"],
        std=model.config["std"],
        flip="The embeddings of an image and of its mirror image are added."
        if model.flip
        else "No mirror image is used.",
        evaluation=_evaluation(evaluation, model.config["weights"]),
        files="\n".join(files),
    )


def _evaluation(evaluation: dict | None, weights: str) -> str:
    results = None if evaluation is None else evaluation["models"].get(weights)
    if results is None:
        return "None was made of this checkpoint."
    lines = [f"| set | identities | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    notes = []
    for name, result in results.items():
        cells = ["–" if value is None else f"{value:.4f}" for value in measures(result)]
        identities = "–" if of_a_list(result) else f"{result['num_identities']:,}"
        lines.append(f"| {name} | {identities} | {' | '.join(cells)} |")
        notes += [f"{name}: {note}" for note in (result.get("note"), *missing(result)) if note]
    return "\n".join(lines + [""] * bool(notes) + [f"- {note}" for note in notes])
