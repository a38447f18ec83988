"""Matrix products of the head: which library, which precision. Results and sums are in the operands' own dtype.

On CPUs float32 products go to oneDNN, which torch brings beside MKL: on an AMD machine with AVX-512 (Zen 5, torch
2.14, one thread) it made the head's products 2.2 times as fast as `torch.mm`, which calls MKL.
"""

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]


def matmul_nt(a: Tensor, b: Tensor, precision: Precision = "float32") -> Tensor:
    """a (m, k) times b (n, k) transposed: (m, n).

    precision: "float32" rounds nothing but the sums; "tf32" rounds float32 operands to 10 bits of mantissa, inside CUDA
    devices that can; "bfloat16" rounds them to 7 bits. Sums are float32 in all three. float64 operands stay float64.
    """
    if a.dtype == torch.float64:
        return torch.mm(a, b.T)
    if precision == "bfloat16":
        a, b = a.bfloat16(), b.bfloat16()
        if a.device.type == "cuda":
            return torch.mm(a, b.T, out_dtype=torch.float32)
        # a CPU's bf16 product rounds its result to bf16 as well: a logit of 64 to a quarter
        a, b = a.float(), b.float()
    if precision == "tf32":
        return _tf32(a, b)
    if a.device.type == "cpu" and _has_onednn() and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T)


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


def _tf32(a: Tensor, b: Tensor) -> Tensor:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return torch.mm(a, b.T)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
