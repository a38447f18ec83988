"""ROC and CMC of run folders, from their evaluation.json. AM-Softmax (arXiv 1801.05599), Fig. 6."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from partial_fc.figures.style import label_ends, line_of, new_figure
from partial_fc.report.plots import power_of_ten
from partial_fc.report.runs import Run


def curves_of(runs: Sequence[Run]) -> dict[str, list[tuple[str, dict]]]:
    """Title of a row to (label, result) of its curves: one run's sets in one row, several runs in a row for each set.

    Runs that were not evaluated are left out; results are those of evaluation.json, of the trained backbone.
    """
    results = [(run.name, run.evaluation["models"]["trained"]) for run in runs if trained(run)]
    if len(results) == 1:
        return {results[0][0]: list(results[0][1].items())}
    titles = dict.fromkeys(title for _, sets in results for title in sets)
    return {title: [(name, sets[title]) for name, sets in results if title in sets] for title in titles}


def trained(run: Run) -> bool:
    """Whether its trained backbone was evaluated."""
    return run.evaluation is not None and "trained" in run.evaluation["models"]


def draw_verification(rows: Mapping[str, Sequence[tuple[str, dict]]]) -> Figure:
    """A row of ROC and CMC for each title; sets of one run that share their pairs share the ROC of the first."""
    figure = new_figure(3.4 * len(rows))
    panels = figure.subplots(len(rows), 2, squeeze=False, sharex="col", sharey="col")
    longest = max(1, *(len(result["cmc"]) for curves in rows.values() for _, result in curves))
    for (left, right), (title, curves) in zip(panels, rows.items(), strict=True):
        drawn = []
        for number, (_, result) in enumerate(curves):
            if result["roc"] not in drawn:
                far, tar = np.array(result["roc"], dtype=float).reshape(-1, 2).T
                left.plot(far[far > 0], tar[far > 0], drawstyle="steps-post", **line_of(number))
                drawn.append(result["roc"])
            right.plot(np.arange(len(result["cmc"])) + 1, result["cmc"], **line_of(number))
        left.set_title(f"{title}: ROC")
        right.set_title(f"{title}: CMC")
        left.set_xscale("log")
        left.set_xlim(right=1)
        left.xaxis.set_major_locator(LogLocator(numticks=5))
        left.xaxis.set_major_formatter(power_of_ten)
        left.set_ylabel("true accept rate")
        right.set_xscale("log")
        right.set_xlim(1, max(longest, 2))
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= longest]
        right.set_xticks(ticks, [str(tick) for tick in ticks])
        right.set_ylabel("identified")
        for axes in (left, right):
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(-0.02, 1.03)
            axes.tick_params(labelbottom=True)
        ends = []
        for number, (label, result) in enumerate(curves):
            if result["cmc"]:
                ends.append((result["cmc"][-1], label, line_of(number)["color"]))
            else:
                ends.append((0.0, f"{label} (no CMC)", line_of(number)["color"]))
        label_ends(right, ends)
    for axes, name in zip(panels[-1], ("false accept rate", "rank"), strict=True):
        axes.set_xlabel(name)
    return figure
