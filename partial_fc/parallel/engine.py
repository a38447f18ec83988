"""The data-parallel backbone behind three methods: engine(images), engine.backward(loss), engine.step(lr)."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc.parallel import distributed


class DDPEngine:
    """A backbone on every rank whose gradients DistributedDataParallel averages; in one process the plain module."""

    def __init__(self, backbone: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device):
        self.backbone, self.optimizer = backbone, optimizer
        self.model: nn.Module = backbone
        self._buffers: list[Tensor] | None = None  # as they were before the step: a forward moves running statistics
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            # views save a copy of all gradients; zero_grad must then keep them
            self.model = DistributedDataParallel(backbone, device_ids=ids, gradient_as_bucket_view=True)

    def warm_up(self, images: Tensor) -> None:
        """One discarded forward and backward on `images` (b, 3, H, W), before any state is loaded.

        DDP orders its gradient buckets anew after its first backward, so a resumed run would sum its first step in
        another order than the run it continues (seen at 3 and 4 ranks, not at 2).
        """
        self.backward(self(images).sum())
        self.skip()

    def __call__(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) to embeddings (b, D)."""
        if self._buffers is None:
            self._buffers = [buffer.clone() for buffer in self.backbone.buffers()]
        return self.model(images)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self._buffers = None

    def skip(self) -> None:
        """Undoes a step that shall not have happened: drops its gradients, puts running statistics back."""
        self.optimizer.zero_grad(set_to_none=False)
        for buffer, before in zip(self.backbone.buffers(), self._buffers or [], strict=False):
            buffer.copy_(before)
        self._buffers = None

    def backbone_state(self) -> dict[str, Tensor]:
        return self.backbone.state_dict()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as <parameter name>.<state name>."""
        names = {parameter: name for name, parameter in self.backbone.named_parameters()}
        return {
            f"{names[parameter]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def load(self, backbone: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Restores what `backbone_state` and `optimizer_state` gave."""
        self.backbone.load_state_dict(backbone)
        parameters = dict(self.backbone.named_parameters())
        self.optimizer.state.clear()
        for name, value in optimizer.items():
            parameter, _, key = name.rpartition(".")
            self.optimizer.state[parameters[parameter]][key] = value.to(parameters[parameter].device)
