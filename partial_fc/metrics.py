"""What a run says while it runs: console lines, metrics.jsonl, and the trackers. On rank 0 only."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from partial_fc.config import Config
from partial_fc.data.remote import Fetches
from partial_fc.documents import parse_json
from partial_fc.files import open_regular, write_atomically
from partial_fc.parallel import distributed
from partial_fc.phases import NAMES, Phases, slowest_rank
from partial_fc.progress import Progress
from partial_fc.trackers import finish, start_tensorboard, start_wandb

KEPT = ("metrics.jsonl", "wandb_id")  # of a run folder: with them a run's curves go on on another machine
NOTABLE = 0.1  # of a step that ranks wait for the slowest: then the console names it


class RankTimes(NamedTuple):
    """What the ranks took since the last row."""

    seconds: Tensor  # (W, len(NAMES)) in each phase
    data_wait: float  # seconds that rank 0's program waited for batches
    memory: int  # bytes at the peak, of the rank that has most
    first_wait: float  # seconds until the first batch of the run's start, of the rank that waited longest
    fetches: Fetches  # of all ranks' readers

    @classmethod
    def gather(cls, phases: Phases, fetches: Fetches) -> "RankTimes":
        """A collective: one of a few numbers."""
        seconds = phases.read()
        others = [phases.data_wait(), float(_memory()), phases.first_wait or 0.0, *map(float, fetches)]
        mine = torch.cat([seconds, torch.tensor(others, dtype=torch.float64)])
        everyone = distributed.all_gather(mine.to(phases.device)).cpu()
        times, wait, memory, first_wait, asked = everyone.split([len(seconds), 1, 1, 1, len(fetches)], dim=1)
        total = Fetches(*(int(count) for count in asked.sum(dim=0)))
        return cls(times, wait[0].item(), int(memory.max()), first_wait.max().item(), total)


class Metrics:
    """Writes a row of numbers every few steps. Close it at the end of the run."""

    def __init__(
        self,
        config: Config,
        run: Path,
        *,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        streamed: bool = False,
    ):
        """streamed: shards are read from copies in the cache, which rows then tell of."""
        self.streamed = streamed
        self.run, self.total_steps, self.steps_per_epoch = run, total_steps, steps_per_epoch
        self.global_batch_size = config.data.global_batch_size
        cut_back(run / "metrics.jsonl", start_step)
        self.file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - open for the whole run
        self.wandb = start_wandb(config, run)
        self.tensorboard = start_tensorboard(config, run, start_step)
        self.started = time.monotonic()
        self.first_step = self.last_step = start_step

    def row(
        self,
        step: int,
        *,
        loss: float | None,
        lr: float,
        batch: dict[str, float],
        head: dict[str, float],
        engine: dict[str, float],
        ranks: RankTimes,
        progress: Progress,
    ) -> None:
        """Writes the row of the steps since the last one; `step` counts the run's finished steps, `loss` is their mean.

        batch, head, engine: numbers of the last batch, and what changes in training of head and backbone, by name.

        A disk that is full costs rows, not the run.
        """
        first = self.last_step == self.first_step
        steps, self.last_step = step - self.last_step, step
        seconds = ranks.seconds.mean(dim=0) / steps
        step_time = seconds.sum().item()
        samples_per_second = self.global_batch_size / step_time
        slowest, lag, phase = slowest_rank(ranks.seconds / steps)
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss,
            "lr": lr,
            "samples_per_second": samples_per_second,
            "samples_per_second_per_device": samples_per_second / len(ranks.seconds),
            "step_time": step_time,
            "data_wait": ranks.data_wait / steps,
            **({"first_batch": ranks.first_wait} if first else {}),
            **(_streaming(ranks.fetches) if self.streamed else {}),
            **{f"phase.{name}": value for name, value in zip(NAMES, seconds.tolist(), strict=True)},
            **({"slowest_rank": slowest, "slowest_lag": lag, "slowest_phase": phase} if len(ranks.seconds) > 1 else {}),
            **{name: _finite(value) for name, value in batch.items()},
            **{f"head.{name}": _finite(value) for name, value in head.items()},
            **{f"engine.{name}": _finite(value) for name, value in engine.items()},
            "memory": ranks.memory,
            "skipped_steps": progress.skipped_steps,
            "undecodable": progress.undecodable,
        }
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            print(f"metrics: step {step} is not written: {error}", file=sys.stderr)
        with self._no_error_of("tensorboard"):
            if self.tensorboard is not None:
                for name, value in row.items():
                    if isinstance(value, int | float) and name != "step":
                        self.tensorboard.add_scalar(name.replace(".", "/"), value, step)
        with self._no_error_of("wandb"):
            if self.wandb is not None:
                self.wandb.log(row, step=step)
        elapsed = time.monotonic() - self.started
        left = elapsed / (step - self.first_step) * (self.total_steps - step)
        print(console_line(row, self.total_steps, left), flush=True)

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            print(f"metrics: the last rows are not written: {error}", file=sys.stderr)
        with self._no_error_of("tensorboard"):
            if self.tensorboard is not None:
                finish("tensorboard", self.tensorboard.close)
        with self._no_error_of("wandb"):
            if self.wandb is not None:
                finish("wandb", self.wandb.finish)

    @contextmanager
    def _no_error_of(self, tracker: Literal["tensorboard", "wandb"]) -> Iterator[None]:
        """Its disk may be full, its service may die or lose its network: that costs what it tracks, not the run."""
        try:
            yield
        except Exception as error:
            print(f"{tracker}: {type(error).__name__}: {error}: nothing more goes to it", file=sys.stderr)
            setattr(self, tracker, None)


def _streaming(fetches: Fetches) -> dict[str, float | None]:
    """Of the steps since the last row, over all ranks."""
    asked = fetches.found + fetches.fetched
    return {
        "data.fetched_bytes": fetches.bytes,
        "data.fetched_shards": fetches.fetched,
        "data.cache_hits": fetches.found / asked if asked else None,  # share of the shards that readers asked for
    }


def console_line(row: dict, total_steps: int, seconds_left: float) -> str:
    """One line that people read while they wait."""
    waiting = row["data_wait"] / row["step_time"]
    fields = [
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}",
        f"epoch {row['epoch']:5.2f}",
        "loss       –" if row["loss"] is None else f"loss {row['loss']:7.4f}",
        "cos      –" if row["target_cosine"] is None else f"cos {row['target_cosine']:6.3f}",
        f"lr {row['lr']:.2e}",
        f"{row['samples_per_second']:6.0f} samples/s",
        f"{row['step_time'] * 1000:4.0f} ms/step, {waiting:3.0%} of it waiting for data",
        f"{row['memory'] / 2**30:.2f} GiB",
        f"{_clock(seconds_left)} left",
    ]
    if "first_batch" in row:
        fields.append(f"first batch after {row['first_batch']:.1f} s")
    if row.get("data.fetched_bytes"):
        fields.append(f"{row['data.fetched_bytes'] / 1e6:,.0f} MB fetched")
    if row.get("slowest_lag", 0) > NOTABLE * row["step_time"]:
        fields.append(f"rank {row['slowest_rank']} last by {row['slowest_lag'] * 1000:.0f} ms ({row['slowest_phase']})")
    fields += [f"{name} {row[key]}" for name, key in (("skipped", "skipped_steps"), ("undecodable",) * 2) if row[key]]
    return " | ".join(fields)


def cut_back(path: Path, step: int) -> None:
    """Drops the rows of metrics.jsonl past `step`: a resumed run writes them again. Lines that are no rows go too."""
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return
    kept = []
    for line in lines:
        try:
            wanted = parse_json(line, path)["step"] <= step
        except (ValueError, LookupError, TypeError):  # torn by a kill
            continue
        if wanted:
            kept.append(line + b"\n")
    write_atomically(path, b"".join(kept))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _memory() -> int:
    """Peak bytes: of the accelerator where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
