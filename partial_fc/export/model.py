"""The backbone as its users see it: pixels in, normalized embeddings out; and the folder that it is kept in.

config.json         what is in the folder: backbone, image size, pixel normalization, where it comes from
model.safetensors   the backbone's parameters and buffers, under its own names
"""

import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from partial_fc import storage
from partial_fc.backbone import build_trained
from partial_fc.checkpoint import Checkpoint, find_checkpoint, read_backbone
from partial_fc.config_file import read_config_yaml
from partial_fc.documents import text_of
from partial_fc.environment import pip_install, read_environment
from partial_fc.export.model_config import FORMAT, VERSION, read_config
from partial_fc.files import sha256_of
from partial_fc.prepare.images import fit, read_image
from partial_fc.tensor_files import load_tensors


class Embedder(nn.Module):
    """uint8 RGB images (b, 3, H, W) of values 0 to 255 -> normalized embeddings (b, D) float32.

    The pixel normalization (images - mean) / std is inside. `flip` adds the embedding of the mirrored image before
    normalizing. `config` holds what config.json says, `image_size` (H, W) and `embedding_dim` what the backbone wants
    and gives. Raises ValueError for other images.
    """

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], flip: bool, config: dict[str, Any]
    ):
        super().__init__()
        self.backbone, self.flip, self.config = backbone, flip, config
        self.image_size: tuple[int, int] = tuple(config["image_size"])
        self.embedding_dim: int = config["backbone"]["embedding_dim"]
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(
                f"got {images.dtype} images, wanted torch.uint8 of values 0 to 255, RGB: the model normalizes pixels "
                "itself"
            )
        if tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, wanted (b, 3, {', '.join(map(str, self.image_size))})"
            )
        images = (images.float() - self.get_buffer("mean")) / self.get_buffer("std")
        embeddings = self.backbone(images).float()
        if self.flip:
            embeddings = embeddings + self.backbone(images.flip(-1)).float()
        return nn.functional.normalize(embeddings)


def load_backbone(source: str | os.PathLike, revision: str | None = None) -> Embedder:
    """The trained backbone in a folder of `partial-fc export`, or in a Hugging Face hub repository "owner/name".

    In evaluation mode, on the CPU: uint8 RGB images (b, 3, H, W) to normalized embeddings (b, D), whose dot products
    are cosines. The pixel normalization is inside. The hub needs the package huggingface_hub, which keeps what it
    downloads; `revision` is a branch, tag or commit there. Nothing is unpickled and no code of the folder is run.

    Raises ValueError for a folder that is damaged, of another kind or of a newer format.
    """
    folder = _folder(source, revision)
    config = read_config(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != config["model_sha256"]:
        raise ValueError(f"{weights} is missing or damaged: its SHA-256 is not config.json's; copy the folder again")
    return _assemble(config, load_tensors(weights), folder)


def open_model(source: str | os.PathLike, found: Checkpoint | None = None) -> Embedder:
    """`load_backbone`, and the same of a run (its newest checkpoint) or of one checkpoint, each a folder or a URL.

    found: its checkpoint, where one was chosen already.
    """
    if found is not None or is_run(source):
        return from_checkpoint(found or find_checkpoint(storage.place(source)))
    return load_backbone(source)


def is_run(source: str | os.PathLike) -> bool:
    """Whether `open_model` takes it for a run or a checkpoint."""
    path = storage.place(source)
    return storage.remote(path) or (path.is_dir() and not (path / "config.json").exists())


def from_checkpoint(found: Checkpoint, averaged: bool = False) -> Embedder:
    """The backbone of a checkpoint, or the moving average of it, with the pixel normalization and flip of its config.

    Raises ValueError where there is no average.
    """
    state = read_backbone(found, averaged)
    if state is None:
        raise ValueError(f"{found.path} has no moving average: its run had no engine.ema; leave --averaged out")
    config = found.config()
    classes = found.entry("classes.txt")
    trained_with = _trained_with(found)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": config.backbone.model_dump(mode="json"),
        "image_size": list(found.image_size()),
        "input": "uint8 (batch, 3, height, width), values 0 to 255; the model subtracts mean and divides by std itself",
        "channel_order": "RGB",
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "flip": config.evaluate.flip,
        "output": "float32 (batch, embedding_dim), normalized: dot products are cosines",
        "num_classes": found.manifest["num_classes"],
        "classes_sha256": classes and classes["sha256"],
        "step": found.step,
        "weights": "averaged" if averaged else "trained",
        "trained_at_commit": trained_with.get("git_commit", "unknown"),
        "partial_fc_version": version("partial_fc"),
    }
    return _assemble(description, state, found.path)


def _trained_with(found: Checkpoint) -> dict[str, str]:
    """The environment in config.yaml: brought along by the checkpoint, or in its run folder; {} where there is none."""
    brought = found.read("config.yaml")
    if brought is not None or storage.remote(found.path):
        name = storage.join(found.path, "config.yaml")
        return read_environment(text_of(brought or b"", name), name)
    run = found.path.parent.parent
    return read_environment(read_config_yaml(run)[0], run / "config.yaml")


def save_backbone(model: Embedder, folder: Path) -> None:
    """Writes model.safetensors and config.json into `folder`. Raises ValueError if a parameter is not finite."""
    weights = folder / "model.safetensors"
    state = {name: tensor.detach().contiguous() for name, tensor in model.backbone.state_dict().items()}
    diverged = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if diverged:
        raise ValueError(
            f"the backbone's {diverged[0]} is not finite: training has diverged; export another checkpoint"
        )
    save_file(state, weights)
    config = model.config | {"model_sha256": sha256_of(weights)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read it


def load_image(path: str | os.PathLike, size: tuple[int, int], *, keep_damaged: bool = False) -> Tensor:
    """(3, H, W) uint8 RGB of an image file, as `partial-fc prepare folder` makes it: cut to the shape, resized.

    size: (H, W), the model's `image_size`. Raises ValueError for a file that is no image, and for a JPEG that has lost
    data, unless keep_damaged.
    """
    read = read_image(path, keep_damaged=keep_damaged)
    if isinstance(read, str):
        more = ", or keep_damaged=True" if read == "damaged" else ""
        raise ValueError(f"{os.fspath(path)} is {read}: wanted a whole image file{more}")
    return torch.from_numpy(fit(read[1], size)).permute(2, 0, 1).contiguous()


def _assemble(config: dict[str, Any], state: dict[str, Tensor], source: storage.Place) -> Embedder:
    chosen = config["backbone"]
    net = build_trained(chosen["name"], chosen["embedding_dim"], tuple(config["image_size"]), state, source)
    return Embedder(net, config["mean"], config["std"], config["flip"], config).eval()


def _folder(source: str | os.PathLike, revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    text = os.fspath(source)
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise ValueError(f"{text} is no folder, nor a hub repository as owner/name")
    if path.parent.is_dir():
        raise ValueError(f"{text} is no folder, but {path.parent} is: wanted a run or an exported folder in it")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"{text} is no folder here; to load it from the Hugging Face hub: {pip_install('huggingface_hub')}"
        ) from None
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=["config.json", "model.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{text} is no folder here, and the Hugging Face hub did not give it: {error}") from None
