"""partial-fc export: a run's backbone, and its class centers, in a folder that others can use."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from partial_fc import storage
from partial_fc.checkpoint import Checkpoint, find_checkpoint
from partial_fc.data.shards import require_new
from partial_fc.evaluate import evaluation_file
from partial_fc.export.card import model_card
from partial_fc.export.formats import CHECKED, require_packages, write_onnx, write_torch_export
from partial_fc.export.gallery import write_gallery
from partial_fc.export.images import open_images, some_images
from partial_fc.export.model import Embedder, from_checkpoint, load_backbone, save_backbone
from partial_fc.folders import make_folder
from partial_fc.storage import Place


def export_run(
    path: Place,
    out: Path,
    formats: list[str] | None = None,
    *,
    averaged: bool = False,
    gallery: bool = False,
    images: Path | None = None,
) -> None:
    """Writes the newest checkpoint of a run, or the checkpoint `path`, folders or URLs, to the new folder `out`.

    averaged: the moving average of the weights (`engine.ema`) instead of what was trained.

    out/ config.json, model.safetensors, README.md (a model card); of `formats` onnx model.onnx and torch-export
    model.pt2, each checked on real images; of `gallery` class_centers.safetensors and classes.txt. The folder appears
    when it is complete. images: a folder of images or a data set to check with; None: the run's own, of its evaluation
    or its training. In one process.

    Raises FileExistsError if `out` exists, and ValueError for a missing package or average, where there are no images
    to check with, and where a file gives other embeddings than the eager model.
    """
    path, out, formats = storage.place(path), Path(out), list(formats or [])
    require_packages(formats)
    require_new(out)
    found = find_checkpoint(path)
    model = from_checkpoint(found, averaged)
    checked_with = _images(found, model, images) if set(formats) & {"onnx", "torch-export"} else None

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
    make_folder(partial, "folder to export to")
    try:
        save_backbone(model, partial)
        _check_folder(partial, model)
        differences = {}
        if "onnx" in formats:
            differences["model.onnx"] = write_onnx(model, partial / "model.onnx", checked_with)
        if "torch-export" in formats:
            differences["model.pt2"] = write_torch_export(model, partial / "model.pt2", checked_with)
        shape = write_gallery(found, partial) if gallery else None
        card = model_card(found, model, read_evaluation(path, found), differences, checked_with, shape)
        (partial / "README.md").write_text(card, encoding="utf-8")
        require_new(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{out}: {model.config['backbone']['name']} of step {found.step:,}, {', '.join(_names(out))}")


def read_evaluation(path: Place, found: Checkpoint) -> dict | None:
    """evaluation.json of this very checkpoint, from its folder or from the run's; None if there is none."""
    beside = storage.parent(found.path)  # of a run folder it is the folder `checkpoints`
    for folder in dict.fromkeys((found.path, path, beside if storage.remote(beside) else beside.parent)):
        file = storage.join(folder, "evaluation.json")
        evaluation = evaluation_file.read_evaluation(file)
        if evaluation is None:
            continue
        if evaluation["step"] == found.step:
            return evaluation
        print(f"{file} is of step {evaluation['step']}, not of {found.step}: it is left out of the model card")
    return None


def _images(found: Checkpoint, model: Embedder, images: Path | None) -> Tensor:
    """(n, 3, H, W) uint8 to check with."""
    config = found.config()
    train = config.data.train
    trained = [one.data for one in train] if isinstance(train, list) else [train]
    own = [*(chosen.data for chosen in config.evaluate.sets.values()), *trained]
    source = images or next((Path(folder) for folder in own if (Path(folder) / "index.json").exists()), None)
    if source is None:
        raise ValueError(
            f"the formats onnx and torch-export are checked on real images, and {', '.join(own)} are not here: give a "
            "folder of images or a data set with --images"
        )
    return some_images(open_images(source, model.image_size), CHECKED)


def _check_folder(folder: Path, model: Embedder) -> None:
    """The folder gives back what went in. Raises ValueError otherwise."""
    wanted, got = model.backbone.state_dict(), load_backbone(folder).backbone.state_dict()
    wrong = [name for name in wanted if not torch.equal(wanted[name], got[name])]
    if wrong:
        raise ValueError(f"{folder}/model.safetensors gives another {wrong[0]} than was written: is the disk sound?")


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())
