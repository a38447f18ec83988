"""The backbone whole on every rank, its gradients averaged by DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine


class DDPEngine(BaseEngine):
    """A backbone on every rank whose gradients DistributedDataParallel averages; in one process, or where all of it is
    frozen, the plain module.
    """

    def _begin(self) -> None:
        if self.settings.compile:
            # A graph for each batch size: which one is used must not depend on the sizes that came before. From the
            # ninth on torch would compile no more, and do so again after a resume.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 16
            self.backbone.compile(dynamic=False)
        if self.frozen:  # DistributedDataParallel does not take it: here is what it does to begin with
            for tensor in (*self.backbone.parameters(), *self.backbone.buffers()):
                tensor.detach().copy_(distributed.broadcast(tensor.detach()))
        elif distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # views save a copy of all gradients; zero_grad must then keep them
            self.model = DistributedDataParallel(self.backbone, device_ids=ids, gradient_as_bucket_view=True)

    def _joining(self) -> AbstractContextManager:
        return nullcontext() if self._last or self.model is self.backbone else self.model.no_sync()
