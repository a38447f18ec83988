"""The data-parallel backbone behind three methods: engine(images), engine.backward(loss), engine.step(lr)."""

from collections.abc import Collection

import torch
from torch import nn

from partial_fc.config import Engine
from partial_fc.parallel.base_engine import BaseEngine, check_device
from partial_fc.parallel.ddp_engine import DDPEngine
from partial_fc.parallel.deepspeed_engine import DeepSpeedEngine, check_deepspeed

ENGINES: dict[str, type[BaseEngine]] = {"ddp": DDPEngine, "deepspeed": DeepSpeedEngine}


def check_engine(settings: Engine, device: torch.device) -> None:
    """Raises ValueError for settings that this device, process or installation does not have."""
    check_device(settings, device)
    if settings.name == "deepspeed":
        check_deepspeed(settings, device)


def build_engine(
    backbone: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    settings: Engine,
    *,
    accumulate: int,
    clip: float | None,
    batch_sizes: Collection[int] = (),
) -> BaseEngine:
    """The engine that the settings name. A collective."""
    kind = ENGINES[settings.name]
    return kind(backbone, optimizer, device, settings, accumulate=accumulate, clip=clip, batch_sizes=batch_sizes)
