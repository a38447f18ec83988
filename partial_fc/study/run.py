"""partial-fc study run: the trials that a ledger lacks, some side by side, until they are done or time is up."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from partial_fc.study import ledger
from partial_fc.study.choice import JUDGED_BY, ended, judge, to_do, tuned_values, untunable
from partial_fc.study.plan import TUNING, Plan, load_plan
from partial_fc.study.trial import Process

POLL = 0.5  # seconds
PATIENCE = 120  # seconds for a trial to finish its step and save
BAR = "{percentage:3.1f}%|{bar:20}| {elapsed}, {remaining} left{postfix}"


def run_study(
    path: Path,
    *,
    ledger_file: Path | None = None,
    runs: Path = Path("runs/study"),
    jobs: int = 1,
    hours: float | None = None,
    retry_failed: bool = False,
) -> bool:
    """Runs what the ledger lacks of the plan. True if nothing is missing at the end.

    ledger_file: unset, ledger.jsonl beside the plan. jobs: trials side by side. hours: then, and at SIGINT or SIGTERM,
    trials are asked to save and stop; the same call goes on from there. retry_failed: trials that failed are run again.
    A trial that a signal ends is not tried again in this call and not entered.

    Raises ValueError or OSError for a plan, data set or ledger that cannot be used.
    """
    if jobs < 1:
        raise ValueError(f"got {jobs} jobs, wanted at least 1")
    plan = load_plan(path)
    if plan.tuning is not None:
        print(f"tuning is judged by {JUDGED_BY}")
    file = default_ledger(path) if ledger_file is None else ledger_file
    with asked_to_stop(hours) as asked, ledger.opened(file) as entries:
        aside = _work(plan, entries, runs, jobs, asked, retry_failed)
        left = to_do(plan, entries.entries)[0]
    for row in plan.rows:
        if row.tuned_as is not None and tuned_values(plan, row, entries.entries) is None:
            print(f"{row.name} waits for the tuning of {row.tuned_as}: run {plan.tuned_in.path} first")
        if untunable(plan, row, entries.entries):
            print(f"{row.name}: every tuning trial failed, so it has no final runs; see {file}")
    for trial, entry in ended(plan, entries.entries):
        if entry["status"] == ledger.FAILED:
            print(f"failed: {trial}: {entry['error']}")
    for name, why in aside.items():
        print(f"not entered: {name}: {why}")
    if left:
        print(f"{asked() or 'Stopped'}: {len(left)} trials could start next; the same command goes on")
    return not left


def default_ledger(plan: Path) -> Path:
    return Path(plan).parent / "ledger.jsonl"


def _work(
    plan: Plan, entries: ledger.Ledger, runs: Path, jobs: int, asked: Callable[[], str | None], retry_failed: bool
) -> dict[str, str]:
    """The loop. Returns the trials that were put aside, and why."""
    known = entries.entries
    again = {digest for digest, entry in known.items() if retry_failed and entry["status"] == ledger.FAILED}
    running: list[Process] = []
    aside: dict[str, str] = {}
    put_aside: set[str] = set()

    def missing() -> tuple[list, float]:
        return to_do(plan, {digest: entry for digest, entry in known.items() if digest not in again})

    trials, left = missing()
    total = left
    resumed = 0.0  # samples of earlier pieces: no work of this call
    quiet = 1 if sys.stderr.isatty() else 60  # seconds between lines of a log file
    tqdm.monitor_interval = 0  # its thread beside a fork
    with tqdm(total=total, desc="study", bar_format=BAR, mininterval=quiet, smoothing=0.0) as bar:
        try:
            while not asked():
                for process in [one for one in running if one.poll()]:
                    running.remove(process)
                    entry = process.end()
                    if entry is None:
                        aside[str(process.trial)] = process.why()
                        put_aside.add(process.trial.digest)
                        continue
                    entries.append(entry)
                    again.discard(process.trial.digest)
                    bar.write(_line(process, entry))
                    trials, left = missing()
                busy = put_aside | {process.trial.digest for process in running}
                ready = {trial.digest: trial for trial in trials if trial.digest not in busy}  # equal trials are one
                for trial in list(ready.values())[: jobs - len(running)]:
                    running.append(Process(trial, runs))
                    resumed += running[-1].samples_before
                if not running:
                    break
                bar.total = total - resumed
                done = total - left + sum(process.samples_done() for process in running) - resumed
                bar.n = min(max(done, 0), bar.total)  # a trial put aside, or one that has to go back to its checkpoint
                bar.set_postfix_str("; ".join(str(process.trial) for process in running), refresh=False)
                bar.update(0)
                time.sleep(POLL)
        finally:
            _stop(running, entries)
    return aside


def _stop(running: list[Process], entries: ledger.Ledger) -> None:
    """Lets the running trials save; one that finishes meanwhile is entered."""
    for process in running:
        process.stop()
    deadline = time.monotonic() + PATIENCE
    for process in running:
        while not process.poll() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not process.poll():
            print(f"{process.trial}: it did not stop within {PATIENCE} s and was killed; it goes on from a checkpoint")
            process.kill()
        entry = process.end()
        if entry is not None:
            entries.append(entry)


def _line(process: Process, entry: dict) -> str:
    if entry["status"] == ledger.FAILED:
        return f"{process.trial}: failed: {entry['error']}"
    number = f"{judge(entry):.4f}" if process.trial.stage == TUNING else "done"
    return f"{process.trial}: {number}, {entry['seconds']:.0f} s"


@contextmanager
def asked_to_stop(hours: float | None) -> Iterator[Callable[[], str | None]]:
    """Why to stop, as soon as there is a reason: the time is up, or SIGINT or SIGTERM came."""
    started = time.monotonic()
    reason: str | None = None

    def ask(number: int, frame: object) -> None:
        nonlocal reason
        reason = signal.Signals(number).name

    def asked() -> str | None:
        if reason is None and hours is not None and time.monotonic() - started >= hours * 3600:
            return f"The {hours:g} hours are up"
        return reason

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in signals]
    try:
        yield asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
