"""The training steps that partial-fc benchmark backbone compares: one backbone under several engine options.

Shapes: b this rank's batch, D embedding size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc import backbone
from partial_fc.benchmark.measure import WARM_UP, peak_beyond, place_of, return_large_blocks
from partial_fc.config import Engine, Optim
from partial_fc.optim import build_optimizer
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import build_engine

OPTIONS = {  # what a variant is put together from, with + between
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    # the default scale overflows in the first steps, which would be skipped and measured
    "fp16": {"precision": "fp16", "loss_scale": 1.0},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "checkpoint_activations": {"checkpoint_activations": True},
    "ema": {"ema": 0.9999},
}
LR = 0.01


@dataclass(frozen=True)
class Cell:
    """One size of the problem. batch is global, size the images' height and width in pixels."""

    name: str
    dim: int
    size: int
    batch: int
    ranks: int = 1


def settings_of(variant: str) -> Engine:
    """The engine's settings of a variant, as bf16+channels_last. Raises ValueError for what is none."""
    settings = {}
    for option in variant.split("+"):
        if option not in OPTIONS:
            raise ValueError(f"--variants: got {option!r} in {variant!r}; wanted some of {', '.join(OPTIONS)}")
        if settings.keys() & OPTIONS[option].keys():
            raise ValueError(f"--variants: got {variant!r}, one setting twice; wanted each once, and one precision")
        settings |= OPTIONS[option]
    return Engine(**settings)


class Backbone:
    """A backbone with its engine, as training has it, and a loss that costs nothing in place of the head."""

    def __init__(self, variant: str, cell: Cell, device: torch.device):
        net = backbone.build_seeded(cell.name, cell.dim, (cell.size, cell.size), seed=0).to(device).train()
        optimizer = build_optimizer(net, Optim())
        self.engine = build_engine(net, optimizer, device, settings_of(variant), accumulate=1, clip=None)
        self.engine.warm_up(data(variant, cell, 0, device)[0])

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward and update on images (b, 3, H, W) and targets (b, D); this rank's mean squared error ().

        Raises RunError for gradients that are not finite: the update would be skipped, and so not measured.
        """
        loss = (self.engine(images) - targets).square().mean()
        self.engine.backward(loss)
        if not self.engine.finite():
            raise distributed.RunError("the gradients of a step are not finite; leave out fp16")
        self.engine.clip()
        self.engine.step(LR)
        return loss.detach()

    def kept(self) -> int:
        """Bytes of what stays between steps: parameters, buffers, gradients, the optimizer's state, an average."""
        net, average = self.engine.backbone, self.engine.average or {}
        tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters()), *average.values()]
        tensors += [value for state in self.engine.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def data(variant: str, cell: Cell, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (b, 3, H, W) and targets (b, D): the same in all steps, so that the loss falls, and for all variants."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(cell.batch, 3, cell.size, cell.size, generator=generator)
    targets = torch.randn(cell.batch, cell.dim, generator=generator)
    part = distributed.part(cell.batch, distributed.rank(), distributed.world_size())
    mine = slice(part.start, part.stop)
    return images[mine].to(device), targets[mine].to(device)


def measure_memory(cell: Cell, variant: str, threads: int, device: str) -> tuple[int, int | None]:
    """Bytes that stay between steps, and the peak of a step beyond them and its batch, where somebody tells.

    The peak is of a step after the warm-up, so that libraries, threads and the compiler are not counted.
    """
    return_large_blocks()
    torch.set_num_threads(threads)
    place = place_of(device)
    net, batch = Backbone(variant, cell, place), data(variant, cell, 0, place)
    for _ in range(WARM_UP):
        net.step(*batch)
    peak = peak_beyond(lambda: net.step(*batch), place)
    return net.kept(), peak
