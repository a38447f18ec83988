"""partial-fc study run: the trials that a ledger lacks, some side by side, until they are done or time is up."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from partial_fc.environment import environment
from partial_fc.parallel.process import handled
from partial_fc.study import ledger
from partial_fc.study.choice import JUDGED_BY, ended, judge, to_do, tuned_values, untunable
from partial_fc.study.plan import TUNING, Plan, load_plan
from partial_fc.study.trial import Process, the_only_study_in

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
    A trial that a signal ends is not tried again in this call and not entered. After one that ends with an error, other
    than a divergence, no more are started: the cause may be of all of them.

    Raises ValueError or OSError for a plan, data set or ledger that cannot be used, and, when the running trials have
    ended, for a trial with such an error.
    """
    if jobs < 1:
        raise ValueError(f"got {jobs} jobs, wanted at least 1")
    plan = load_plan(path, trust_code=True)
    if plan.tuning is not None:
        print(f"tuning is judged by {JUDGED_BY}")
    commit = environment()["git_commit"]
    if commit == "unknown" or commit.endswith("-dirty"):
        print(f"warning: git says {commit}: the commit in the ledger will not pin the code; commit what is changed")
    file = default_ledger(path) if ledger_file is None else ledger_file
    with asked_to_stop(hours) as asked, ledger.opened(file) as entries, the_only_study_in(runs):
        aside = _work(plan, entries, runs, jobs, asked, retry_failed)
        left = to_do(plan, entries.entries)[0]
    waiting = False
    for row in plan.rows:
        tuned_in, tuned_as, of = plan, row, ""
        if row.tuned_as is not None:
            tuned_in, of = plan.tuned_in, f" of {row.tuned_as}"
            tuned_as = next(other for other in tuned_in.rows if other.name == row.tuned_as)
        if untunable(tuned_in, tuned_as, entries.entries):
            print(f"{row.name}: every tuning trial{of} failed, so it has no final runs; see {file}")
        elif row.tuned_as is not None and tuned_values(plan, row, entries.entries) is None:
            print(f"{row.name} waits for the tuning of {row.tuned_as}: run {plan.tuned_in.path} first")
            waiting = True
    for trial, entry in ended(plan, entries.entries):
        if entry["status"] == ledger.FAILED:
            print(f"failed: {trial}: {entry['error']}")
    for process in aside:
        print(f"not entered: {process.trial}: {process.why()}")
    if left:
        print(f"{asked() or 'Stopped'}: {len(left)} trials could start next; the same command goes on")
    if broken := [process for process in aside if process.broken()]:
        raise ValueError(
            f"{broken[0].trial} ended with an error that is no divergence, so no more trials were started: "
            f"{broken[0].why()}. Mend its cause; the same command goes on"
        )
    return not left and not waiting


def default_ledger(plan: Path) -> Path:
    return Path(plan).parent / "ledger.jsonl"


def _work(
    plan: Plan, entries: ledger.Ledger, runs: Path, jobs: int, asked: Callable[[], str | None], retry_failed: bool
) -> list[Process]:
    """The loop. Returns the trials that were put aside."""
    known = entries.entries
    again = {digest for digest, entry in known.items() if retry_failed and entry["status"] == ledger.FAILED}
    running: list[Process] = []
    aside: list[Process] = []
    broken = False

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
                        aside.append(process)
                        broken |= process.broken()
                        bar.write(f"{process.trial}: put aside: {process.why()}")
                        continue
                    entries.append(entry)
                    process.clean_up()
                    again.discard(process.trial.digest)
                    bar.write(_line(process, entry))
                    trials, left = missing()
                busy = {process.trial.digest for process in aside + running}
                ready = {trial.digest: trial for trial in trials if trial.digest not in busy}  # equal trials are one
                for trial in [] if broken else list(ready.values())[: jobs - len(running)]:
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
            _stop(running, entries, aside)
    return aside


def _stop(running: list[Process], entries: ledger.Ledger, aside: list[Process]) -> None:
    """Lets the running trials save; one that finishes meanwhile is entered, a broken one is put aside."""
    for process in running:
        process.stop()
    deadline = time.monotonic() + PATIENCE
    for process in running:
        while not process.poll() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not process.poll():
            print(f"{process.trial}: it did not stop within {PATIENCE} s and was killed; it goes on from a checkpoint")
            process.kill()
    for process, entry in [(process, process.end()) for process in running]:  # all have ended if an append fails
        if entry is not None:
            entries.append(entry)
            process.clean_up()
        elif process.broken():
            aside.append(process)


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

    with handled((signal.SIGINT, signal.SIGTERM), ask):
        yield asked
