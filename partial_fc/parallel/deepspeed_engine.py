"""The backbone by DeepSpeed: ZeRO shares out optimizer state, gradients and parameters over the ranks.

DeepSpeed partitions and joins float32 tensors and runs the optimizer on its part. What a step is (precision, the loss
scale, clipping, skipping) is the base's, so that both engines follow the same run and read each other's checkpoints.
"""

import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from partial_fc.config import Engine
from partial_fc.environment import pip_install
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine
from partial_fc.parallel.precision import AUTOCAST

BUCKET = 500_000_000  # numbers that are reduced at once, DeepSpeed's default; a buffer of that size is allocated

# What of its config may be given: it ignores keys that it does not know, and others follow from our settings, or change
# what is computed or kept.
OPEN = {
    *("zero_optimization", "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state"),
    *("comms_logger", "flops_profiler", "aio"),
}
OURS = {  # not in zero_optimization; unknown keys it refuses there by itself
    *("stage", "offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", "compute_grad_norm"),
    *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
    *("zero_quantized_gradients", "mics_shard_size", "round_robin_gradients", "ignore_unused_parameters"),
    *("elastic_checkpoint", "legacy_stage1", "zenflow"),
}


def check_deepspeed(settings: Engine, device: torch.device) -> None:
    """Raises ValueError for keys of engine.deepspeed that are not for it, and as `import_deepspeed` does."""
    zero = settings.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"engine.deepspeed.zero_optimization is {zero!r}; wanted a section, as {{key: value}}")
    refused = [*(settings.deepspeed.keys() - OPEN), *(f"zero_optimization.{key}" for key in zero.keys() & OURS)]
    if refused:
        raise ValueError(
            f"engine.deepspeed.{min(refused)} is not for this section: it follows from engine.*, optim.* and data.*, "
            f"changes what a checkpoint holds, or is unknown; leave it out. There are {', '.join(sorted(OPEN))}"
        )
    import_deepspeed(device)


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, set up for `device`. Raises ValueError where it is not installed or has no process group."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would else look for one, and warn where it finds none
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ValueError(
            f"engine.name deepspeed needs DeepSpeed, which cannot be imported ({error}): {pip_install('deepspeed')}"
        ) from None
    if not distributed.joined():
        raise ValueError(
            "engine.name deepspeed needs a process group, be it of one process: start it as "
            "torchrun --standalone --nproc_per_node=1 launch/train.py ..., or give engine.name=ddp"
        )
    # what it says at every start or step that we know: SGD is tested, here; it calls collectives by their old names
    logging.getLogger("DeepSpeed").addFilter(_news)
    old_names = r".*torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated"
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
    # it would compile collectives over shared memory on its first start on a CPU, for a minute, with a C++ compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()


def deepspeed_config(settings: Engine, parameters: int, accumulate: int, device: torch.device) -> dict:
    """What DeepSpeed is told: ours, and engine.deepspeed over it."""
    zero = {"stage": settings.zero_stage, "reduce_bucket_size": max(min(parameters, BUCKET), 1)}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    elif settings.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # where it is wanted we compute it; stage 3 and offload cannot go without
    return {
        **settings.deepspeed,
        "train_micro_batch_size_per_gpu": 1,  # it counts samples by that, for its own log
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's own optimizers
        "zero_optimization": zero | settings.deepspeed.get("zero_optimization", {}),
    }


class DeepSpeedEngine(BaseEngine):
    """A backbone whose optimizer state, gradients and parameters DeepSpeed shares out, as engine.zero_stage says.

    It works in the process group that distributed.job opened. Stages 2 and 3 join gradients after each micro-batch.
    The gradients of every step are looked through before it: DeepSpeed would skip what is not finite by itself, and
    the head must then skip too. Running statistics are a rank's own, rank 0's are kept.

    Raises ValueError as `check_deepspeed` does and for a frozen backbone, RunError for an engine.deepspeed that
    DeepSpeed does not take.
    """

    def _begin(self) -> None:
        settings, device = self.settings, self.device
        if self.frozen:
            raise ValueError(
                "no parameter of the backbone is trained: DeepSpeed has nothing to do; give engine.name=ddp"
            )
        self.deepspeed = import_deepspeed(device)
        self.stage, self._asks = settings.zero_stage, True
        if settings.channels_last:  # parameters are parts of flat tensors; images and feature maps stay as they are
            self.backbone.to(memory_format=torch.contiguous_format)
        dtype = AUTOCAST.get(settings.precision)
        if dtype is not None:  # inside of DeepSpeed's forward, which switches off what is outside
            self.backbone.forward = torch.autocast(device.type, dtype)(self.backbone.forward)
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        size = sum(parameter.numel() for parameter in self.backbone.parameters())
        try:
            self.model, *_ = self.deepspeed.initialize(
                model=self.backbone,
                optimizer=self.optimizer,
                config=deepspeed_config(settings, size, self.accumulate, device),
            )
        except (ValueError, AssertionError) as error:  # raised alike on all ranks
            raise distributed.RunError(
                f"DeepSpeed does not take engine.deepspeed {settings.deepspeed}: {error}"
            ) from error
        self.zero = self.model.optimizer  # at stage 0 the optimizer itself

    def warm_up(self, images: Tensor) -> None:
        """As the base's, and with an update of nothing: it makes the optimizer's state, of zeros, that `load` fills."""
        reached: set[str] = set()
        trainable = [(name, p) for name, p in self.backbone.named_parameters() if p.requires_grad]
        hooks = [p.register_hook(lambda _, name=name: reached.add(name)) for name, p in trainable]
        self._reached = reached
        super().warm_up(images)
        for hook in hooks:
            hook.remove()

    def optimizer_state(self) -> dict[str, Tensor]:
        """As the base's, gathered parameter by parameter onto the host of rank 0; empty on the others. A collective."""
        if self.stage == 0:
            return super().optimizer_state()
        gathered = self.deepspeed.utils.safe_get_full_optimizer_state
        state, first = {}, next(iter(self._states()), {})
        for name, parameter in self.backbone.named_parameters():
            if not parameter.requires_grad:
                continue
            for key, part in first.items():
                value = part if key == "step" else gathered(parameter, key)
                if distributed.rank() == 0:
                    state[f"{name}.{key}"] = value.cpu().clone()
        return state

    def backbone_state(self) -> dict[str, Tensor]:
        """As the base's, at stage 3 gathered onto the host of rank 0 and empty on the others. A collective."""
        state = self.backbone.state_dict()
        if self.stage < 3:
            return state
        for name, parameter in self.backbone.named_parameters():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                if distributed.rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
        return state if distributed.rank() == 0 else {}

    def _load_backbone(self, state: dict[str, Tensor]) -> None:
        if self.stage < 3:
            super()._load_backbone(state)
        else:
            tensors = dict(self.backbone.named_buffers()) | dict(self.backbone.named_parameters())
            for name, value in state.items():
                tensor = tensors[name]
                if hasattr(tensor, "ds_tensor"):  # this rank's part
                    tensor.ds_tensor.data.copy_(self._part_of(value, tensor))
                if tensor.shape == value.shape:  # a buffer, or small enough to stay whole on every rank
                    tensor.data.copy_(value)
        if self.stage > 0:
            self.zero.refresh_fp32_params()

    def _load_optimizer(self, state: dict[str, Tensor]) -> None:
        if self.stage == 0:
            return super()._load_optimizer(state)
        self._zero_states()  # where `state` has nothing: that of a run that made no update yet
        utils = self.deepspeed.utils
        parameters = dict(self.backbone.named_parameters())
        for name, value in state.items():
            parameter, _, key = name.rpartition(".")
            if key == "step":  # the same for all parameters: each had a gradient in every step
                for tensors in self._states():
                    tensors["step"].copy_(value)
            elif self.stage == 3:
                part = self._part_of(value, parameters[parameter])
                utils.safe_set_local_optimizer_state(parameters[parameter], part, key)
            else:
                utils.safe_set_full_optimizer_state(parameters[parameter], value, key)

    # ---- what the base leaves to an engine

    def _joining(self) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(self._last)
        return nullcontext()

    def _forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def _backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)  # losses come weighted

    def _unused(self) -> list[str]:
        return [name for name, p in self.backbone.named_parameters() if p.requires_grad and name not in self._reached]

    def _make_state(self) -> None:
        if self.stage > 0:
            torch._foreach_zero_(self._gradients())
            self._update(lr=0.0)
            self._zero_states()

    def _gradients(self) -> list[Tensor]:
        if self.stage == 0:
            return super()._gradients()
        if self.settings.offload:
            stage_3 = self.stage == 3
            if not stage_3:  # pinned copies may be under way; without a CUDA device there is nothing to wait for
                self.zero._wait_for_offload_copies()
            flat = self.zero.fp32_partitioned_groups_flat if stage_3 else self.zero.single_partition_of_fp32_groups
            return [part.grad for part in flat]
        return [gradient for group in self.zero.averaged_gradients.values() for gradient in group]

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        norm = get_total_norm(gradients).to(self.device)
        return norm if self.stage == 0 else distributed.all_reduce_sum(norm.square()).sqrt()

    def _update(self, lr: float) -> None:
        self._set_rates(lr)
        self.model.step()
        if not self.model.was_step_applied():
            raise distributed.RunError(
                "DeepSpeed left out an update of the backbone that the class centers had: the square of the gradient's "
                "norm is beyond float32; give optim.clip, or a lower optim.lr"
            )

    def _drop(self) -> None:
        if self.stage == 0:
            return super()._drop()
        self.zero.zero_grad()
        if self.stage < 3:
            self.zero.micro_step_id = -1  # as before the first of a step
            for group in self.zero.averaged_gradients:
                self.zero.averaged_gradients[group] = self.zero.all_grad_tensors[group] = None
        if self.settings.offload:
            self.zero.reset_cpu_buffers()

    # ---- parts

    def _states(self) -> list[dict[str, Tensor]]:
        """What the optimizer keeps of this rank's flat parts of the parameters."""
        states = self.optimizer.state.values()
        return [{key: value for key, value in state.items() if isinstance(value, Tensor)} for state in states]

    def _zero_states(self) -> None:
        for tensors in self._states():
            for tensor in tensors.values():
                tensor.zero_()

    def _part_of(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's part of a parameter's values at stage 3: its equal share of them, flat, zeros behind the last."""
        size = parameter.ds_tensor.numel()
        part = value.flatten()[distributed.rank() * size : (distributed.rank() + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel()))
