"""One trial as a process of its own: launch/train.py on one core, resumable like any run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from partial_fc.config_file import read_config_yaml, save_config
from partial_fc.documents import parse_json
from partial_fc.environment import environment, read_environment
from partial_fc.evaluate.evaluation_file import read_evaluation
from partial_fc.files import open_regular, write_atomically
from partial_fc.folder_lock import FolderLock
from partial_fc.folders import make_folder
from partial_fc.parallel import launcher
from partial_fc.parallel.process import signal_at_end_of_parent
from partial_fc.progress import DIVERGED
from partial_fc.study import ledger
from partial_fc.study.plan import TUNING, Trial, config_of

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch" / "train.py"


@contextmanager
def the_only_study_in(runs: Path) -> Iterator[None]:
    """Holds the folder of run folders: two studies, of two ledgers, have the same folder for equal trials."""
    make_folder(runs, "--runs")
    with closing(FolderLock(runs, f"another study trains in {runs}: wait for it, or give another --runs")):
        yield


class Process:
    """A running trial. `end()` gives its ledger entry, or None where nothing came of it."""

    def __init__(self, trial: Trial, runs: Path):
        if not LAUNCH.is_file():
            raise ValueError(f"{LAUNCH} is missing: a study runs from a checkout of the repository")
        self.trial = trial
        self.run = runs / f"{_in_a_path(trial.row)}_{trial.stage}_seed{trial.seed}_{trial.digest}"
        self.run.mkdir(parents=True, exist_ok=True)
        config = self.run / "trial.yaml"
        save_config(config_of(trial, self.run), config)
        self.versions = environment()  # of the start: the checkout may change meanwhile
        self.samples_before = self.samples_done()  # of earlier pieces
        self.started = time.monotonic()
        with open(self.run / "log.txt", "a") as log:
            self.log_start = log.tell()  # of this piece
            # a session of its own: Ctrl-C in a terminal is for the study alone, which asks its trials to save and stop
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCH), str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
                # of a study that is killed the trials are asked to save and stop, and do not train on as orphans
                preexec_fn=signal_at_end_of_parent(signal.SIGTERM, os.getpid()),
            )

    def poll(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def stop(self) -> None:
        """Asks it to save and to stop."""
        if not self.poll():
            self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def samples_done(self) -> float:
        """How many samples it has trained on, by its last row of metrics."""
        row = _last_row(self.run)
        epoch = None if row is None else row.get("epoch")
        return min(epoch / self.trial.epochs, 1.0) * self.trial.samples if isinstance(epoch, int | float) else 0.0

    def end(self) -> dict | None:
        """The entry of a trial that has finished or diverged; None if it was stopped, killed by a signal or broken."""
        seconds = _add_seconds(self.run, time.monotonic() - self.started)
        code = self.process.returncode
        if code < 0 or (code == 0 and (self.run / "preempted").exists()) or self.broken():
            return None
        if code == 0:
            outcome = {"status": ledger.DONE, **_outcome(self.run)}
        else:
            outcome = {"status": ledger.FAILED, "error": self._error()}
        return {
            "digest": self.trial.digest,
            "row": self.trial.row,
            "stage": self.trial.stage,
            "overrides": self.trial.overrides,
            "tuned": self.trial.tuned,
            "seed": self.trial.seed,
            "epochs": self.trial.epochs,
            "data": self.trial.data,
            **outcome,
            "seconds": round(seconds, 1),
            "commit": self.versions["git_commit"],
            "versions": {name: version for name, version in self.versions.items() if name != "git_commit"},
            "device": device_of(self.run),
        }

    def broken(self) -> bool:
        """Whether it ended with an error that says nothing about its settings: a full disk, a missing package."""
        return self.process.returncode > 0 and DIVERGED not in self._error()

    def why(self) -> str:
        """Of a trial that ended without an entry."""
        code = self.process.returncode
        if code > 0:
            return f"{self._error()}, see {self.run / 'log.txt'}"
        return f"signal {-code} ended it" if code < 0 else "it was asked to stop"

    def clean_up(self) -> None:
        """Once it is entered: a tuning run's checkpoints are of no more use; those of final runs stay, for figures."""
        if self.trial.stage == TUNING:
            shutil.rmtree(self.run / "checkpoints", ignore_errors=True)

    def _error(self) -> str:
        """The line of this piece's log that says why, or its last one."""
        with open(self.run / "log.txt", "rb") as log:
            log.seek(self.log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        # a path of this machine is of no use in a ledger that is read elsewhere
        error = (errors or lines or ["it said nothing"])[-1]
        return error.replace(str(REPOSITORY), "").replace(str(self.run), self.run.name)


def _in_a_path(row: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", row)


def _outcome(run: Path) -> dict:
    """What the ledger keeps of a finished run."""
    evaluation = read_evaluation(run / "evaluation.json")
    if evaluation is None or "trained" not in evaluation["models"]:
        raise ValueError(f"{run} has no evaluation.json of its trained backbone: delete the folder, to train it again")
    sets = evaluation["models"]["trained"]
    row = _last_row(run) or {}
    return {
        "result": {
            name: {
                "tar_at_far": {far: at and at["tar"] for far, at in result["tar_at_far"].items()},
                "dir_at_far": {far: at and at["dir"] for far, at in result["dir_at_far"].items()},
                "rank1": result["rank1"],
                "num_distractors": result["num_distractors"],
                "fold_accuracy": result["fold_accuracy"],
            }
            for name, result in sets.items()
        },
        "loss": row.get("loss"),
        "target_cosine": row.get("target_cosine"),
    }


def device_of(run: Path) -> str:
    """What its last piece was trained on; "unknown" in folders of earlier versions, whose config.yaml lacks it."""
    text, _ = read_config_yaml(run)
    return read_environment(text, run / "config.yaml").get("device", "unknown")


def _last_row(run: Path) -> dict | None:
    """The last complete row of metrics.jsonl."""
    file = run / "metrics.jsonl"
    try:
        with open_regular(file) as opened:
            lines = opened.read().splitlines()
    except (OSError, ValueError):
        return None
    for line in reversed(lines):
        try:
            row = parse_json(line, file)
        except ValueError:
            continue  # being written
        if isinstance(row, dict):
            return row
    return None


def _add_seconds(run: Path, seconds: float) -> float:
    """The wall time of all pieces of a trial so far."""
    file = run / "seconds"
    total = seconds + (float(file.read_text()) if file.exists() else 0.0)
    write_atomically(file, f"{total}\n")
    return total


def _environment() -> dict[str, str]:
    """One thread, no process group, this checkout's package."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return launcher.alone(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
