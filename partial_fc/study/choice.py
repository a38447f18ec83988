"""Which point of its grid a row is run at: the one number that is stated in advance."""

from partial_fc.study import ledger
from partial_fc.study.plan import Plan, Row, Trial

FAR = "0.0001"
JUDGED_BY = "the mean of TAR@FAR=1e-4 over the tuning sets"


def judge(entry: dict) -> float:
    """JUDGED_BY. Raises ValueError where a set has too few impostor pairs to show that FAR."""
    for name, result in entry["result"].items():
        if result["tar_at_far"][FAR] is None:
            raise ValueError(f"the tuning set {name} has too few impostor pairs for FAR 1e-4: take a larger one")
    return sum(result["tar_at_far"][FAR] for result in entry["result"].values()) / len(entry["result"])


def choose(trials: list[Trial], entries: dict[str, dict]) -> dict | None:
    """The tuned values of the best of a row's tuning trials; None until all have ended, or where all have failed.

    Of equally good ones the first in the grid's order is taken. A failed trial is never the best.
    """
    if not trials:
        return {}
    if any(trial.digest not in entries for trial in trials):
        return None
    done = [trial for trial in trials if entries[trial.digest]["status"] == ledger.DONE]
    return max(done, key=lambda trial: judge(entries[trial.digest])).tuned if done else None


def tuned_values(plan: Plan, row: Row, entries: dict[str, dict]) -> dict | None:
    """What the row's final runs have beside its own settings; None where that is not known yet, or nothing worked."""
    if row.tuned_as is None:
        return choose(plan.tuning_trials(row), entries)
    other = next(other for other in plan.tuned_in.rows if other.name == row.tuned_as)
    return choose(plan.tuned_in.tuning_trials(other), entries)


def to_do(plan: Plan, entries: dict[str, dict]) -> tuple[list[Trial], float]:
    """The trials that can start now, in their order, and the samples that all missing ones train on.

    A plan with tuning goes row by row, those of `first` before the others, so that some rows are complete when it is
    stopped. One without goes seed by seed, so that all rows are equally far.
    """
    ready: list[tuple[int, Trial]] = []  # with the seed's place
    samples = 0.0
    place = {name: number for number, name in enumerate(plan.first)}
    for row in sorted(plan.rows, key=lambda row: place.get(row.name, len(place))):
        missing = [(0, trial) for trial in plan.tuning_trials(row) if trial.digest not in entries]
        tuned = tuned_values(plan, row, entries)
        if tuned is not None:
            finals = enumerate(plan.final_trials(row, tuned))
            missing += [(number, trial) for number, trial in finals if trial.digest not in entries]
        elif missing:
            samples += len(plan.seeds) * plan.final_samples(row)
        samples += sum(trial.samples for _, trial in missing)
        ready += missing
    if plan.tuning is None:
        ready.sort(key=lambda pair: pair[0])  # stable: rows stay in their order
    return [trial for _, trial in ready], samples


def untunable(plan: Plan, row: Row, entries: dict[str, dict]) -> bool:
    """Whether every tuning trial of the row has failed."""
    trials = plan.tuning_trials(row)
    return bool(trials) and all(entries.get(trial.digest, {}).get("status") == ledger.FAILED for trial in trials)


def ended(plan: Plan, entries: dict[str, dict]) -> list[tuple[Trial, dict]]:
    """The plan's trials that the ledger has, with their entries."""
    found = []
    for row in plan.rows:
        trials = plan.tuning_trials(row)
        tuned = tuned_values(plan, row, entries)
        trials += [] if tuned is None else plan.final_trials(row, tuned)
        found += [(trial, entries[trial.digest]) for trial in trials if trial.digest in entries]
    return found
