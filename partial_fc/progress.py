"""What a run has come through so far: equal on all ranks, and kept in its checkpoints."""

import math
import sys
from dataclasses import asdict, dataclass, field

from partial_fc.files import one_line, shortened
from partial_fc.parallel.distributed import RunError

SKIPS_IN_A_ROW = 10  # steps without a finite loss after which a run stops
OVERFLOWS_IN_A_ROW = 30  # steps that halve the loss scale, from 65536 to 6e-5: then it is not the scale
DIVERGED = "training has diverged"  # in every message about it: a study tells by it what is a result of the settings
TOLERATED_UNDECODABLE = 10  # samples; below it data.max_undecodable is not asked, a run has seen too few


@dataclass
class Progress:
    """Counts since the start of the run, and the losses since the last row of metrics.jsonl."""

    samples: int = 0
    undecodable: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0  # for a loss that was not finite
    overflows_in_a_row: int = 0  # of a finite loss's gradients, with fp16 or DeepSpeed: counted as skipped too
    losses: list[float] = field(default_factory=list)

    def state(self) -> dict:
        return asdict(self)

    @classmethod
    def restored(cls, values: dict, place: object) -> "Progress":
        """What `state` gave, from the checkpoint `place`. Raises ValueError for anything else."""
        counts = {name: value for name, value in values.items() if name != "losses"}
        losses = values.get("losses", [])
        good = all(type(count) is int and count >= 0 for count in counts.values()) and isinstance(losses, list)
        if not good or not all(type(loss) in (int, float) for loss in losses):
            raise ValueError(
                f"{place}/manifest.json: settings.progress: got {shortened(values)}, wanted counts, losses"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{place}/manifest.json: settings.progress: {error}") from None

    def step(
        self, step: int, loss: float, samples: int, undecodable: int, bad_here: list[str], applied: bool = True
    ) -> None:
        """Notes a step of `samples` over all ranks, `undecodable` of them; `bad_here` says which of this rank's.

        applied: whether backbone and head were updated.
        """
        for bad in bad_here:
            print(f"step {step}: sample {one_line(bad)}; its batch is one shorter", file=sys.stderr)
        self.samples += samples
        self.undecodable += undecodable
        if math.isfinite(loss):
            self.skipped_in_a_row = 0
            self.losses.append(loss)
            self.overflows_in_a_row = 0 if applied else self.overflows_in_a_row + 1
        else:
            self.skipped_in_a_row += 1
        self.skipped_steps += not (applied and math.isfinite(loss))

    def check(self, step: int, max_undecodable: float) -> None:
        """Raises RunError, on all ranks, that names the cause where too much went wrong for the run to go on."""
        if self.undecodable > max(TOLERATED_UNDECODABLE, max_undecodable * self.samples):
            raise RunError(
                f"{self.undecodable} of {self.samples} samples could not be decoded, more than data.max_undecodable "
                f"{max_undecodable} allows: check the shards of data.train"
            )
        if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise RunError(
                f"{DIVERGED}: the loss was not finite in {SKIPS_IN_A_ROW} successive steps, the last one {step}: an "
                "embedding is NaN or infinite. Lower optim.lr or raise optim.warmup_steps; the same command goes on "
                "from the latest checkpoint. If that was written right before these steps and gives no finite loss "
                "either, delete its folder to go on from the one before it"
            )

        if self.overflows_in_a_row >= OVERFLOWS_IN_A_ROW:
            raise RunError(
                f"{DIVERGED}: the gradients of {OVERFLOWS_IN_A_ROW} successive steps, the last one {step}, were not "
                "finite, though the loss was and engine.precision=fp16 halves its scale in each: lower optim.lr, or "
                "take bf16 or fp32. The same command goes on from the latest checkpoint"
            )

    def mean_loss(self) -> float | None:
        """The mean of the losses since the last call; None if all steps were skipped."""
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses = []
        return mean
