"""What a run says while it runs: console lines, metrics.jsonl, wandb. On rank 0 only."""

import json
import math
import os
import resource
import secrets
import sys
import time
from pathlib import Path

import torch
import wandb

from partial_fc.config import Config
from partial_fc.progress import Progress

KEPT = ("metrics.jsonl", "wandb_id")  # of a run folder: with them a run's curves go on on another machine


class Metrics:
    """Collects the steps between two log rows and writes the row. Close it at the end of the run."""

    def __init__(self, config: Config, run: Path, *, start_step: int, total_steps: int, steps_per_epoch: int):
        self.run, self.total_steps, self.steps_per_epoch = run, total_steps, steps_per_epoch
        self.global_batch_size = config.data.global_batch_size
        cut_back(run / "metrics.jsonl", start_step)
        self.file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - open for the whole run
        self.wandb = _start_wandb(config, run)
        self.started = time.monotonic()
        self.first_step = start_step
        self._reset()

    def _reset(self) -> None:
        self.since, self.steps, self.data_wait = time.monotonic(), 0, 0.0

    def step(self, data_wait: float) -> None:
        """Notes one step that waited `data_wait` seconds for its batch."""
        self.steps += 1
        self.data_wait += data_wait

    def row(
        self,
        step: int,
        *,
        loss: float | None,
        lr: float,
        target_cosine: float,
        head: dict,
        engine: dict,
        progress: Progress,
    ) -> None:
        """Writes the row of the steps since the last one; `step` counts the run's finished steps, `loss` is their mean.

        head, engine: their numbers that change in training, by name.

        A disk that is full costs rows, not the run.
        """
        seconds = time.monotonic() - self.since
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss,
            "lr": lr,
            "samples_per_second": self.steps * self.global_batch_size / seconds,
            "step_time": seconds / self.steps,
            "data_wait": self.data_wait / self.steps,
            "target_cosine": target_cosine if math.isfinite(target_cosine) else None,
            **{f"head.{name}": value for name, value in head.items()},
            **{f"engine.{name}": value if math.isfinite(value) else None for name, value in engine.items()},
            "memory": _memory(),
            "skipped_steps": progress.skipped_steps,
            "undecodable": progress.undecodable,
        }
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            print(f"metrics.jsonl: step {step} is not written: {error}", file=sys.stderr)
        self.wandb.log(row, step=step)
        elapsed = time.monotonic() - self.started
        left = elapsed / (step - self.first_step) * (self.total_steps - step)
        print(console_line(row, self.total_steps, left), flush=True)
        self._reset()

    def close(self) -> None:
        self.file.close()
        self.wandb.finish()


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
    fields += [f"{name} {row[key]}" for name, key in (("skipped", "skipped_steps"), ("undecodable",) * 2) if row[key]]
    return " | ".join(fields)


def cut_back(path: Path, step: int) -> None:
    """Drops the rows of metrics.jsonl past `step`: a resumed run writes them again. A torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(kept))
    temporary.rename(path)


def wandb_mode(config: Config) -> str:
    """The mode of the config; unset: the environment's WANDB_MODE, else online where a key is set, else offline."""
    if config.track.wandb is not None:
        return config.track.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    # without a key an online init fails: choose before it is tried
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.exists() and "wandb.ai" in netrc.read_text())
    return "online" if has_key else "offline"


def _start_wandb(config: Config, run: Path) -> wandb.Run:
    """One wandb run a run folder; offline where online does not work."""
    options = dict(
        project=config.track.project,
        name=run.name,
        id=_wandb_id(run),
        resume="allow",
        dir=run,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True, init_timeout=30),
    )
    mode = wandb_mode(config)
    try:
        started = wandb.init(mode=mode, **options)
    except wandb.Error as error:
        if mode != "online":
            raise
        print(f"wandb: online did not work ({error}), so offline")
        mode = "offline"
        started = wandb.init(mode=mode, **options)
    print(f"wandb: {mode}" + (f"; upload it with: wandb sync {run}/wandb/offline-run-*" if mode == "offline" else ""))
    return started


def _wandb_id(run: Path) -> str:
    """One wandb run a run folder: a restarted job goes on under the same id."""
    path = run / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


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
