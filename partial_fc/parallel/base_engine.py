"""What the engines share: the order of a step, precision, clipping, averages, the state of whole tensors."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from partial_fc.config import Engine
from partial_fc.parallel import distributed
from partial_fc.parallel.precision import LossScale, autocast, products

MOMENTS = {  # what torch's optimizers keep of a parameter
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "step"},
}


def check_device(settings: Engine, device: torch.device) -> None:
    """Raises ValueError for settings that this device does not have."""
    if device.type == "cuda":
        return
    if settings.precision == "tf32":
        raise ValueError(
            f"engine.precision tf32 is something that CUDA devices do; this run is on {device.type}: give fp32"
        )
    if settings.sync_batchnorm:
        raise ValueError(
            f"engine.sync_batchnorm is for CUDA devices, torch's SyncBatchNorm has nothing else; this run is on "
            f"{device.type}: give engine.sync_batchnorm=false"
        )


def rate_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each parameter group as a multiple of that of engine.step(lr): see BaseEngine.

    It is read from `initial_lr`, as torch's schedulers call the rate that a group was made with, so that another engine
    on the same optimizer finds the same ratios. Rates of 0 in all groups, as `build_optimizer` has them, are equal.
    """
    rates = [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]
    own = float(optimizer.defaults["lr"])
    base = own if own in rates and own > 0 else max(rates)
    return [rate / base if base > 0 else 1.0 for rate in rates]


class BaseEngine:
    """A backbone on every rank; in one process, as it stands here, the plain module.

    A step is `accumulate` times engine(images) and engine.backward(loss), then engine.step(lr) or engine.skip().
    Between them stand, where they are wanted, engine.finite() and engine.clip(), which tell the head what to do alike.
    settings: see config.Engine. clip: the largest norm of the gradient; None: any. batch_sizes: numbers of images that
    this rank's micro-batches have where none is damaged, for an engine that compiles.

    The optimizer's parameter groups keep the ratio of their rates. The rate of `step` is for the groups that have
    the optimizer's own rate; where every group was given another one, for the group with the largest. With a frozen
    backbone only the head is trained; its optimizer may hold no parameter, as SGD([{"params": []}]).

    Raises ValueError for settings that this device does not have and for an optimizer other than torch's SGD or AdamW,
    RunError for activations that the backbone cannot checkpoint.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        settings: Engine | None = None,
        *,
        accumulate: int = 1,
        clip: float | None = None,
        batch_sizes: Collection[int] = (),
    ):
        self.batch_sizes = frozenset(batch_sizes)
        self.settings = settings = settings or Engine()
        self.accumulate, self.max_norm = accumulate, clip
        check_device(settings, device)
        if type(optimizer) not in MOMENTS:
            raise ValueError(
                f"the optimizer is a {type(optimizer).__name__}; wanted torch.optim.SGD or AdamW, whose state "
                "checkpoints keep"
            )
        if settings.sync_batchnorm:
            backbone.sync_batchnorm()
        if settings.channels_last:
            backbone.to(memory_format=torch.channels_last)
        if settings.checkpoint_activations:
            try:
                backbone.checkpoint_activations()
            except AssertionError as error:  # what timm's models say that cannot
                raise distributed.RunError(
                    f"engine.checkpoint_activations: this backbone cannot ({error}); give false, or "
                    "another backbone.name"
                ) from error
        self.backbone, self.optimizer, self.device = backbone, optimizer, device
        self.model: nn.Module = backbone
        self.frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
        self._ratios = rate_ratios(optimizer)
        self.loss_scale = LossScale(settings.loss_scale) if settings.precision == "fp16" else None
        self.grad_scale = 1.0  # what the gradients of this step were multiplied by
        self.gradient_norm: Tensor | None = None  # () of the last step, if it was one, before it was clipped
        self.average = None if settings.ema is None else {k: v.clone() for k, v in backbone.state_dict().items()}
        self._asks = self.loss_scale is not None  # whether gradients are looked through before a step
        self._backwards = 0  # of this step
        self._buffers: list[Tensor] | None = None  # as they were before the step: a forward moves running statistics
        self._moved: list[Tensor] = []  # as the last forward left them: recomputing activations moves them again
        self._begin()

    def warm_up(self, images: Tensor) -> None:
        """One discarded forward and backward on `images` (b, 3, H, W), before any state is loaded.

        DDP orders its gradient buckets anew after its first backward, so a resumed run would sum its first step in
        another order than the run it continues (seen at 3 and 4 ranks, not at 2).

        Raises RunError, on all ranks, for parameters that no embedding depends on: DDP would wait for their gradients.
        """
        self._backwards = self.accumulate - 1  # the one that ranks join their gradients in
        # gradients of 0: larger ones may overflow in fp16, and DeepSpeed's offload would remember that
        loss = 0.0 * self(images).sum()
        self.backward(loss + torch.zeros((), device=loss.device, requires_grad=True) if self.frozen else loss)
        unused = self._unused()
        if unused:
            raise distributed.RunError(
                f"no embedding depends on {len(unused)} of the backbone's parameters, {unused[0]} the first of them: "
                "take another backbone.name"
            )
        self._make_state()
        self.skip()

    def __call__(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) to embeddings (b, D)."""
        if self._buffers is None:
            self._buffers = self._copy_buffers()
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self._joining(), products(self.settings.precision):
            embeddings = self._forward(images)
        if self.settings.checkpoint_activations:
            self._moved = self._copy_buffers()
        return embeddings

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this micro-batch; the last one of a step joins those of all ranks."""
        if self.loss_scale is not None:
            self.grad_scale = self.loss_scale.value
            loss = loss * self.grad_scale
        with self._joining(), products(self.settings.precision):
            self._backward(loss)
        self._restore_buffers(self._moved)
        self._backwards += 1

    def finite(self) -> bool:
        """Whether no gradient of any rank is infinite or NaN, equal on all ranks; else all `skip`.

        Where nobody asks the answer is yes: with DDP and no loss scale. Else one host read after the backward, and one
        number over all ranks. Divides the gradients by the loss scale, and changes that for the steps to come.
        """
        if not self._asks:
            return True
        gradients = self._gradients()
        overflow = (~get_total_norm(gradients, torch.inf).isfinite()).float().to(self.device)
        finite = distributed.all_reduce_max(overflow).item() == 0
        if self.loss_scale is not None:
            _multiply(gradients, 1 / self.grad_scale)
            self.loss_scale.update(finite)
        return finite

    def clip(self, of_the_head: Tensor | None = None) -> float | Tensor:
        """Notes the gradient's norm, and scales it down to the largest one, if any, as torch's clip_grad_norm_ does.

        of_the_head: the norm () of the class centers' gradient, which then counts and is to be scaled alike. Returns
        the `grad_scale` of the head's step. No host read.
        """
        gradients = self._gradients()
        norm = self._total_norm(gradients)
        if of_the_head is not None:
            norm = torch.hypot(norm, of_the_head.to(norm))
        self.gradient_norm = norm
        if self.max_norm is None:
            return self.grad_scale
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        _multiply(gradients, factor)
        return self.grad_scale if of_the_head is None else self.grad_scale / factor

    def step(self, lr: float) -> None:
        """The optimizer's update. Raises RuntimeError where micro-batches are missing."""
        if self._backwards != self.accumulate:
            raise RuntimeError(
                f"step after {self._backwards} of {self.accumulate} micro-batches: the ranks join their gradients in "
                "the last one's backward; call engine.backward for all of them, or engine.skip()"
            )
        self._update(lr)
        self._forget()
        if self.average is not None:
            with torch.no_grad():
                for name, value in self.backbone.state_dict().items():
                    if value.is_floating_point():
                        self.average[name].lerp_(value, 1 - self.settings.ema)
                    else:
                        self.average[name].copy_(value)

    def skip(self) -> None:
        """Undoes a step that shall not have happened: drops its gradients, puts running statistics back."""
        self._restore_buffers(self._buffers or [])
        self.gradient_norm = None
        self._drop()
        self._forget()

    def changing(self) -> dict[str, float]:
        """Numbers that change in training, by name. Waits for them."""
        numbers = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.value}
        return numbers if self.gradient_norm is None else numbers | {"gradient_norm": self.gradient_norm.item()}

    # ---- checkpoints

    @property
    def files(self) -> list[str]:
        """The names in `state`."""
        there = {"average": self.average, "loss_scale": self.loss_scale}
        return ["backbone", "optimizer", *(name for name, value in there.items() if value is not None)]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint keeps, by file: backbone and optimizer, average and loss scale where there are such.

        All ranks call it; rank 0's tensors are the ones to keep. The same names and shapes with every engine.
        """
        state = {"backbone": self.backbone_state(), "optimizer": self.optimizer_state()}
        if self.average is not None:
            state["average"] = self.average
        if self.loss_scale is not None:
            scale = self.loss_scale
            state["loss_scale"] = {
                "value": torch.tensor(scale.value, dtype=torch.float64),
                "finite_steps": torch.tensor(scale.finite_steps),
            }
        return state

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

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restores what `state` gave on rank 0, with any engine. Every rank on its own: there is no collective in it.

        Where none is there an average begins at the backbone, a loss scale at its first. Raises ValueError for the
        state of another optimizer.
        """
        found = {name.rpartition(".")[2] for name in state["optimizer"]}
        known = MOMENTS[type(self.optimizer)]
        if not found <= known:
            raise ValueError(
                f"its backbone's optimizer was written with {', '.join(sorted(found))}, this run's keeps "
                f"{', '.join(sorted(known))}: put optim.name back, or give another run.dir"
            )
        with torch.no_grad():
            self._load_backbone(state["backbone"])
            self._load_optimizer(state["optimizer"])
            if self.average is not None:
                for name, value in state.get("average", state["backbone"]).items():
                    self.average[name].copy_(value)
        if self.loss_scale is not None and "loss_scale" in state:
            scale = state["loss_scale"]
            self.loss_scale = LossScale(scale["value"].item(), int(scale["finite_steps"]))

    def _load_backbone(self, state: dict[str, Tensor]) -> None:
        self.backbone.load_state_dict(state)

    def _load_optimizer(self, state: dict[str, Tensor]) -> None:
        parameters = dict(self.backbone.named_parameters())
        self.optimizer.state.clear()
        for name, value in state.items():
            parameter, _, key = name.rpartition(".")
            if key != "step":  # a count that AdamW wants on the host
                value = torch.empty_like(parameters[parameter], dtype=value.dtype).copy_(value)
            self.optimizer.state[parameters[parameter]][key] = value

    # ---- what an engine does in its own way

    def _begin(self) -> None:
        """At the end of the constructor: makes of `backbone` the `model` that forwards go through."""

    def _joining(self) -> AbstractContextManager:
        """Around forward and backward: ranks join their gradients in the last micro-batch's backward alone."""
        return nullcontext()

    def _forward(self, images: Tensor) -> Tensor:
        with autocast(self.settings.precision, self.device):
            return self.model(images)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _unused(self) -> list[str]:
        """Names of the parameters that the backward of the warm-up did not reach."""
        return [name for name, p in self.backbone.named_parameters() if p.requires_grad and p.grad is None]

    def _make_state(self) -> None:
        """After the warm-up's backward: makes what of the state must be there before it can be loaded."""

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the averaged gradient, to be changed in place."""
        return [parameter.grad for parameter in self.backbone.parameters() if parameter.grad is not None]

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """() the norm of the whole gradient, of which `gradients` are this rank's part."""
        return get_total_norm(gradients).to(self.device)  # that of none is on the host

    def _update(self, lr: float) -> None:
        self._set_rates(lr)
        self.optimizer.step()
        self._drop()

    def _set_rates(self, lr: float) -> None:
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = lr * ratio

    def _drop(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=False)

    # ---- parts

    @property
    def _last(self) -> bool:
        """Whether the micro-batch at hand is the last one of its step."""
        return self._backwards == self.accumulate - 1

    def _copy_buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.backbone.buffers()]

    def _restore_buffers(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.backbone.buffers(), values, strict=False):
            buffer.copy_(value)

    def _forget(self) -> None:
        self._buffers, self._moved, self._backwards = None, [], 0


def _multiply(gradients: list[Tensor], factor: float | Tensor) -> None:
    """In place; none where the backbone is frozen, which torch's own would not take."""
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device) if isinstance(factor, Tensor) else factor)
