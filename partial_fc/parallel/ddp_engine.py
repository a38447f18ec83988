"""The backbone whole on every rank, its gradients averaged by DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
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

    def __call__(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) to embeddings (b, D).

        A batch that damaged samples have made smaller than planned is filled up with copies of its own images, whose
        embeddings are dropped: a graph for its size would take half a minute, in which all ranks wait. Batch norm
        counts the copies. A batch with no image left runs uncompiled.
        """
        count, larger = len(images), [size for size in self.batch_sizes if size >= len(images)]
        if not self.settings.compile or not larger or min(larger) == count:
            return super().__call__(images)
        if count == 0:
            with torch.compiler.set_stance("force_eager"):
                return super().__call__(images)
        return super().__call__(images[torch.arange(min(larger), device=images.device) % count])[:count]

    def _joining(self) -> AbstractContextManager:
        return nullcontext() if self._last or self.model is self.backbone else self.model.no_sync()
