"""The backbone whole on every rank, its gradients averaged by DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc.config import Engine
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine


class DDPEngine(BaseEngine):
    """A backbone on every rank whose gradients DistributedDataParallel averages; in one process the plain module."""

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        settings: Engine | None = None,
        *,
        accumulate: int = 1,
        clip: float | None = None,
    ):
        super().__init__(backbone, optimizer, device, settings, accumulate=accumulate, clip=clip)
        if self.settings.compile:
            # A graph for each batch size: which one is used must not depend on the sizes that came before. From the
            # ninth on torch would compile no more, and do so again after a resume.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 16
            self.backbone.compile(dynamic=False)
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            # views save a copy of all gradients; zero_grad must then keep them
            self.model = DistributedDataParallel(self.backbone, device_ids=ids, gradient_as_bucket_view=True)

    def _joining(self) -> AbstractContextManager:
        return nullcontext() if self._last or self.model is self.backbone else self.model.no_sync()
