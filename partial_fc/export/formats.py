"""ONNX and torch.export of a backbone, each checked against the eager model on real images before it is kept."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from partial_fc.environment import pip_install
from partial_fc.export.model import Embedder

FORMATS = ("safetensors", "onnx", "torch-export")
# Of an entry of a normalized embedding. Float32 rounds sums of another order to about 1e-7 to 1e-6.
TOLERANCE = 1e-5
CHECKED = 16  # real images; batches of 1 and of all of them, while the graph is traced with 2
_IN_ONE_FILE = 1_900_000_000  # bytes of parameters; protobuf ends at 2 GiB


def require_packages(formats: list[str]) -> None:
    """Raises ValueError for an unknown format, and where a package is missing that one of `formats` needs."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"got the format {unknown[0]!r}, wanted some of {', '.join(FORMATS)}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise ValueError(f"the format onnx needs {', '.join(missing)}: {pip_install(*missing)}")


@torch.no_grad()
def write_onnx(model: Embedder, path: Path, images: Tensor) -> float:
    """Writes `path`: input "images" uint8 (batch, 3, H, W), output "embeddings" (batch, D); batch is free.

    images (n, 3, H, W) uint8: onnxruntime's embeddings of the first and of all of them must be the eager model's.
    Returns the largest difference. Raises ValueError, and removes the file, where it is above TOLERANCE.
    """
    program = torch.onnx.export(
        model,
        (_example(model),),
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes={"images": {0: "batch"}},
        dynamo=True,
        verbose=False,
    )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # they name files of this machine
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    program.save(path, external_data=size > _IN_ONE_FILE)

    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(["embeddings"], {"images": batch.numpy()})[0]))

    return _check(run, model, path, images)


@torch.no_grad()
def write_torch_export(model: Embedder, path: Path, images: Tensor) -> float:
    """Writes `path` (.pt2) by torch.export, batch free, loads it again and checks it like `write_onnx`."""
    program = torch.export.export(model, (_example(model),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names files of this machine
    torch.export.save(program, path)
    return _check(torch.export.load(path).module(), model, path, images)


def _example(model: Embedder) -> Tensor:
    """What a graph is traced with, and .pt2 keeps: no real images, and two, since a batch of one becomes a constant."""
    return torch.zeros(2, 3, *model.image_size, dtype=torch.uint8)


def _check(run: Callable[[Tensor], Tensor], model: Embedder, path: Path, images: Tensor) -> float:
    differences, lengths = [], []
    for batch in (images[:1], images):
        wanted = model(batch)
        differences.append((run(batch) - wanted).abs().max().item())
        lengths.append((wanted.norm(dim=1) - 1).abs().max().item())
    largest = float(np.max(differences))  # NaN if one of them is
    wrong = None
    if not largest <= TOLERANCE:
        wrong = (
            f"its embeddings of {len(images)} real images differ from the eager model's by up to {largest:.1e}, "
            f"allowed are {TOLERANCE:.0e}. Export without this format"
        )
    elif max(lengths) > 1e-3:  # they overflowed: zeros are equal to zeros whatever the graph does
        wrong = "the eager model's embeddings of real images are not of length 1, so it is untrained or has diverged"
    if wrong:
        for file in path.parent.glob(path.name + "*"):  # large ONNX models have a second file
            file.unlink()
        raise ValueError(f"{path.name} was not kept: {wrong}")
    print(
        f"{path.name}: largest difference from the eager model {largest:.1e} (allowed {TOLERANCE:.0e}) on "
        f"{len(images)} real images, in batches of 1 and {len(images)}",
        flush=True,
    )
    return largest
