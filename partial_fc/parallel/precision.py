"""What the backbone's products are rounded to, and the loss scale that float16 needs."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROWTH_STEPS = 2000  # finite steps after which torch.amp.GradScaler doubles its scale; overflow halves it


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """For a forward: products in 16 bits with bf16 and fp16; parameters stay as they are."""
    dtype = AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """For forward and backward: float32 products and convolutions of CUDA are TF32 with tf32, else full float32.

    Convolutions would be TF32 as torch is set.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def make_deterministic() -> None:
    """Has torch take deterministic algorithms alone, in this process, from here on. Before anything is multiplied."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch then asks for
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write
    torch.use_deterministic_algorithms(True)


@dataclass
class LossScale:
    """torch.amp.GradScaler's rule in numbers of the host: the step's decision is read there anyway."""

    value: float
    finite_steps: int = 0  # since the last change

    def update(self, finite: bool) -> None:
        """Notes a step; `finite`: no gradient of any rank was infinite or NaN."""
        if not finite:
            self.value, self.finite_steps = self.value / 2, 0
            return
        self.finite_steps += 1
        if self.finite_steps == GROWTH_STEPS:
            self.value, self.finite_steps = self.value * 2, 0
