"""What PartialFC accepts."""

import math
from collections.abc import Sequence

import torch

from partial_fc.head import elementwise
from partial_fc.head.embedding_losses import CenterLoss, EmbeddingLoss
from partial_fc.head.margin import Margin, WarmUp
from partial_fc.head.matmul import Precision, check_precision
from partial_fc.head.sampling import HardNegatives, Sampler
from partial_fc.manifest import MOST_CLASSES


def check_arguments(
    num_classes: int,
    embedding_dim: int,
    margin: Margin | WarmUp | None,
    sample_rate: float,
    *,
    sampler: Sampler | None,
    dropout: float,
    embedding_losses: Sequence[EmbeddingLoss],
    init_std: float | None,
    chunk: int | None,
    cache_bytes: int,
    cache_dtype: torch.dtype,
    matmul_precision: Precision,
    compile: bool | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises ValueError for the first argument of PartialFC that is out of range, or does not go with another."""
    if num_classes < 1 or embedding_dim < 1:
        raise ValueError(f"num_classes and embedding_dim are {num_classes} and {embedding_dim}; both must be positive")
    if num_classes > MOST_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; a class id has 31 bits here: give {MOST_CLASSES} at most")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is {sample_rate}; give a probability in (0, 1]")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a probability in [0, 1)")
    if not isinstance(embedding_losses, Sequence) or not all(
        isinstance(loss, EmbeddingLoss) for loss in embedding_losses
    ):
        raise ValueError(f"embedding_losses are {embedding_losses!r}; give a list of objects such as CenterLoss()")
    if sum(isinstance(loss, CenterLoss) for loss in embedding_losses) > 1:
        raise ValueError(f"embedding_losses are {embedding_losses!r}; give one CenterLoss at most")
    if any(isinstance(loss, CenterLoss) and type(loss) is not CenterLoss for loss in embedding_losses):
        raise ValueError(
            f"embedding_losses are {embedding_losses!r}; a CenterLoss is what its head makes of it: derive a loss of "
            "yours from EmbeddingLoss"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; give torch.float32 or torch.float64")
    if not (margin is None or isinstance(margin, Margin | WarmUp)):
        raise ValueError(f"margin is {margin!r}; give an object such as CosFace(scale=64, margin=0.35)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; give a positive number of rows")
    if init_std is not None and not 0 < init_std < math.inf:
        raise ValueError(f"init_std is {init_std}; give a positive number")
    if cache_bytes < 0 or cache_dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(
            f"cache_bytes and cache_dtype are {cache_bytes} and {cache_dtype}; give 0 or more, and torch.float32, "
            "torch.bfloat16, or for a float64 head torch.float64"
        )
    if not (sampler is None or callable(sampler)) or isinstance(sampler, type):
        raise ValueError(f"sampler is {sampler!r}; give f(head, step, labels), or an object as HardNegatives(16)")
    if isinstance(sampler, HardNegatives) and margin is not None and margin.at(0).sub_centers > 1:
        raise ValueError(
            f"sampler is HardNegatives, and the margin has {margin.at(0).sub_centers} sub-centers a class: it knows "
            "one; give another sampler, or none"
        )
    if compile not in (None, True, False):
        raise ValueError(f"compile is {compile!r}; give True, False, or None for True where it pays")
    if compile and not elementwise.compiler_works(device.type):
        raise ValueError(
            f"compile is True, but torch.compile finds no compiler for {device.type} here: install g++ and openssl, or "
            "give False"
        )
    check_precision(matmul_precision, dtype, device)
