"""The backbone whole on every rank, its gradients averaged by DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
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
            # a graph for each batch size: which one is used must not depend on the sizes that came before
            self.backbone.compile(dynamic=False)
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            # views save a copy of all gradients; zero_grad must then keep them
            self.model = DistributedDataParallel(self.backbone, device_ids=ids, gradient_as_bucket_view=True)

    def warm_up(self, images: Tensor) -> None:
        """As the base's, and needed for one thing more.

        DDP orders its gradient buckets anew after its first backward, so a resumed run would sum its first step in
        another order than the run it continues (seen at 3 and 4 ranks, not at 2).
        """
        super().warm_up(images)

    def _joining(self) -> AbstractContextManager:
        return nullcontext() if self._last or self.model is self.backbone else self.model.no_sync()
