"""Histograms of target and negative cosines through a training: of a run's checkpoints, or of a small network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from partial_fc.figures.style import MUTED, SERIES, broken, grid, label_outer
from partial_fc.head.targets import unit

DEFAULT = "softmax;normsoftmax:scale=16;cosface:scale=16"
DIM = 16  # of the small networks: with ten classes cosines of -1/9 with all others have room

BINS = 80
EDGES = np.linspace(-1, 1, BINS + 1)
ROWS = 7  # moments of a training that a column shows
TARGET, NEGATIVE, HARDEST = SERIES[0], MUTED, SERIES[1]


@dataclass(frozen=True)
class Counts:
    """Counts (BINS,) of cosines in the bins of EDGES: with the own center, with all others, with the nearest other."""

    target: np.ndarray
    negative: np.ndarray
    hardest: np.ndarray


def count_cosines(embeddings: Tensor, labels: Tensor, centers: Tensor, sub_centers: int = 1) -> Counts:
    """Of embeddings (n, D), labels (n,) and centers (C, D), which need not be normalized. C is 2 or more.

    With k sub-centers, centers (k C, D), the nearest of each class counts.
    """
    cosine = unit(embeddings.float())[0] @ unit(centers.float())[0].T
    cosine = cosine.unflatten(1, (-1, sub_centers)).amax(dim=2)
    own = labels.unsqueeze(1)
    target = cosine.gather(1, own).squeeze(1)
    others = cosine.scatter(1, own, -torch.inf)
    negative = others[others > -torch.inf]
    return Counts(*(_histogram(values) for values in (target, negative, others.amax(dim=1))))


def _histogram(cosine: Tensor) -> np.ndarray:
    return np.histogram(cosine.clamp(-1, 1).numpy(), EDGES)[0]


def draw_cosines(trainings: Sequence[tuple[str, Mapping[int, Counts]]]) -> Figure:
    """A column for each (label, counts by step), time going down; each histogram is as high as its own peak."""
    moments = max(len(thinned(sorted(counts), ROWS)) for _, counts in trainings)
    figure, panels = grid(len(trainings), 3, max(0.7 * moments, 2.4), sharex=True)
    occupied = np.flatnonzero(sum(one.target + one.negative for _, counts in trainings for one in counts.values()))
    for axes, (label, counts) in zip(panels.flat, trainings, strict=False):
        _draw_column(axes, counts)
        axes.set_title(broken(label))
        axes.set_xlim(EDGES[occupied[0]] - 0.02, EDGES[occupied[-1] + 1] + 0.02)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    label_outer(panels, len(trainings), "cosine", "step")
    marks = [
        Patch(color=TARGET, alpha=0.45, linewidth=0),
        Patch(color=NEGATIVE, alpha=0.3, linewidth=0),
        Line2D([], [], color=HARDEST, linewidth=1.3),
    ]
    names = ["with the own class center", "with all others", "with the nearest other"]
    figure.legend(marks, names, loc="outside lower center", ncols=3, handlelength=1.2)
    return figure


def _draw_column(axes: Axes, counts: Mapping[int, Counts]) -> None:
    steps = thinned(sorted(counts), ROWS)
    for row, step in enumerate(steps):
        floor, one = -1.12 * row, counts[step]
        for values, color, alpha in ((one.negative, NEGATIVE, 0.3), (one.target, TARGET, 0.45)):
            axes.stairs(_rising(values, floor), EDGES, baseline=floor, fill=True, color=color, alpha=alpha, linewidth=0)
        bins = np.flatnonzero(one.hardest)
        first, last = bins[0], bins[-1] + 1  # else the outline runs along the floor as well
        height = _rising(one.hardest, floor)[first:last]
        axes.stairs(height, EDGES[first : last + 1], baseline=floor, color=HARDEST, linewidth=1.3)
        axes.axhline(floor, color=MUTED, linewidth=0.8)
    axes.set_yticks([-1.12 * row + 0.15 for row in range(len(steps))], [f"{step:,}" for step in steps])
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-1.12 * (len(steps) - 1), 1.05)


def _rising(counts: np.ndarray, floor: float) -> np.ndarray:
    return floor + 0.98 * counts / counts.max()


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the ascending steps, the first and last among them, close together where training is young."""
    if len(steps) <= most:
        return list(steps)
    chosen = {round((len(steps) - 1) * (number / (most - 1)) ** 2) for number in range(most)}
    return [steps[number] for number in sorted(chosen)]
