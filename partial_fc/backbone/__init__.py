"""Backbones by name: images (b, 3, H, W) to embeddings (b, D), which the head normalizes."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from partial_fc.backbone.iresnet import BLOCKS, iresnet
from partial_fc.backbone.mobilefacenet import mobilefacenet
from partial_fc.backbone.net import STRIDE, EmbeddingNet
from partial_fc.backbone.resnet28 import resnet28
from partial_fc.backbone.smallnet import smallnet
from partial_fc.backbone.spherenet import spherenet20
from partial_fc.backbone.timm_models import PREFIX, timm_model
from partial_fc.seeds import seed_for

MOST_DIMENSIONS = 1 << 20  # a slip of the hand, not a network

BACKBONES: dict[str, Callable[[int, tuple[int, int]], EmbeddingNet]] = {
    **{name: partial(iresnet, name) for name in BLOCKS},
    "spherenet20": spherenet20,
    "resnet28": resnet28,
    "smallnet": smallnet,
    "mobilefacenet": mobilefacenet,
}


def build(name: str, embedding_dim: int, image_size: tuple[int, int]) -> EmbeddingNet:
    """The backbone called `name`, freshly initialized from torch's default generator (seed it first).

    `image_size` is (H, W). The net maps float images (b, 3, H, W) to float32 embeddings (b, embedding_dim),
    also under autocast.

    timm/<model> is a model of timm. Raises ValueError for an unknown name, sides that are no multiple of 16 (for timm:
    that the model does not take) or an embedding_dim below 1 or above MOST_DIMENSIONS.
    """
    if name not in BACKBONES and not name.startswith(PREFIX):
        nearest = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"backbone.name is {name!r}, wanted one of {', '.join(BACKBONES)}, {PREFIX}MODEL{hint}")
    if embedding_dim < 1:
        raise ValueError(f"backbone.embedding_dim is {embedding_dim}, wanted at least 1 (512 for faces)")
    if embedding_dim > MOST_DIMENSIONS:
        raise ValueError(
            f"backbone.embedding_dim is {embedding_dim}, wanted at most {MOST_DIMENSIONS:,} (512 for faces)"
        )
    if name.startswith(PREFIX):
        return timm_model(name.removeprefix(PREFIX), embedding_dim, image_size)
    height, width = image_size
    if min(height, width) < STRIDE or height % STRIDE or width % STRIDE:
        nearest_size = tuple(max(1, round(side / STRIDE)) * STRIDE for side in image_size)
        raise ValueError(
            f"the images are {height} x {width} pixels, wanted sides that are multiples of {STRIDE}: prepare "
            f"the data at another size, for example {nearest_size[0]} x {nearest_size[1]}"
        )
    return BACKBONES[name](embedding_dim, (height, width))


def build_seeded(name: str, embedding_dim: int, image_size: tuple[int, int], seed: int) -> EmbeddingNet:
    """`build` with initial parameters that are a function of `seed`; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("backbone", seed))
        return build(name, embedding_dim, image_size)


def build_trained(
    name: str, embedding_dim: int, image_size: tuple[int, int], state: Mapping[str, Tensor], whose: object
) -> EmbeddingNet:
    """`build` with the parameters and buffers `state`, read from the file `whose`.

    Raises ValueError where names, shapes or dtypes are not the backbone's, before it takes memory: a file that someone
    else made may ask for any size, and can fill it only where it is as large itself.
    """
    try:
        with torch.device("meta"), _Uninitialized():
            wanted = build(name, embedding_dim, image_size).state_dict()
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from None
    for key in [*wanted, *state]:
        got, kind = (_kind(tensors.get(key)) for tensors in (state, wanted))
        if got != kind:
            raise ValueError(
                f"{whose}: got {got} for {key:.80}, wanted {kind}: the parameters are not those of the {name} of "
                f"{embedding_dim} dimensions for images of {image_size[0]} x {image_size[1]} that it is said to be"
            )
    net = build_seeded(name, embedding_dim, image_size, seed=0)
    net.load_state_dict(state)
    return net


def _kind(tensor: Tensor | None) -> str:
    return "no tensor" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class _Uninitialized(TorchFunctionMode):
    """No tensor is drawn: the first one on the meta device would load torch's compiler, 2 s."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **kwargs or {})
