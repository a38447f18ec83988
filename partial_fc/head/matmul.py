"""Matrix products of the head: which library, which precision. Results and sums are in the operands' own dtype.

On CPUs float32 products go to oneDNN, which torch brings beside MKL: on an AMD machine with AVX-512 (Zen 5, torch
2.14, one thread) twice as fast as `torch.mm`, which calls MKL. `partial-fc benchmark head` prints it: the two limits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]


def matmul_nt(a: Tensor, b: Tensor, precision: Precision = "float32") -> Tensor:
    """a (m, k) times b (n, k) transposed: (m, n).

    precision: "float32" rounds nothing but the sums, and "tf32" float32 operands to 10 bits of mantissa, inside CUDA
    devices that can: both within `precision_of`, or else as torch is set. "bfloat16" rounds them to 7 bits. Sums are
    float32 in all three. float64 operands stay float64.
    """
    if a.dtype == torch.float64:
        return torch.mm(a, b.T)
    if precision == "bfloat16":
        a, b = a.bfloat16(), b.bfloat16()
        if a.device.type == "cuda":
            return torch.mm(a, b.T, out_dtype=torch.float32)
        # a CPU's bf16 product rounds its result to bf16 as well: a logit of 64 to a quarter
        a, b = a.float(), b.float()
    if a.device.type == "cpu" and _has_onednn() and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T)


def rounded(tensor: Tensor, precision: Precision) -> Tensor:
    """A float32 tensor to nearest, as a product of this precision reads it: bfloat16, for tf32 10 bits of mantissa."""
    if precision == "float32":
        return tensor
    if precision == "bfloat16":
        return tensor.bfloat16()
    nearest = ((tensor.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(tensor.isnan(), tensor, nearest)  # NaN's last bits carry over into 0


@contextmanager
def precision_of(precision: Precision) -> Iterator[None]:
    """Products of float32 in the body are TF32 on CUDA if that is wanted, else full float32, however torch is set."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    wanted = ("tf32" if precision == "tf32" else "ieee", "ieee")
    try:
        for setting, value in zip(settings, wanted, strict=True):
            setting.fp32_precision = value
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def check_precision(precision: Precision, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError for a precision that is unknown, or that this dtype or device does not have."""
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"matmul_precision is {precision!r}; give 'float32', 'tf32' or 'bfloat16'")
    if precision != "float32" and dtype != torch.float32:
        raise ValueError(f"matmul_precision {precision!r} is for a float32 head; this one is {dtype}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"matmul_precision 'tf32' is something that CUDA devices do; this head is on {device}: give 'float32'"
        )


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
