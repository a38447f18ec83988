"""Where two classes meet: in the plane of both angles, and on the circle.

A sample of class 1 at the angles theta_1 and theta_2 from the two centers is past its boundary where its own logit,
with margin, is at least the other one's: r n_1 psi(theta_1) >= r n_2 cos(theta_2). The boundary of class 2 is the same
with the classes exchanged, and what lies past neither is the margin between them.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Wedge

from partial_fc.figures.margins import Named, psi
from partial_fc.figures.style import INK, MUTED, SERIES, broken, grid, label_outer
from partial_fc.head.margin import Margin

DEFAULT = "softmax;normsoftmax;sphereface:lambda_min=0;cosface;arcface;combined:m2=0.3,m3=0.2"
CIRCLE_DEFAULT = "normsoftmax;cosface;arcface"
APART = math.radians(90)  # between the centers on the circle: what two of many classes in many dimensions are
FIRST, SECOND = SERIES[0], SERIES[1]


def boundary(margin: Margin, angle: np.ndarray, ratio: float = 1.0) -> np.ndarray:
    """theta_2 (n,) at which a sample of class 1 with theta_1 = `angle` (n,), rad, is on its boundary.

    ratio: n_1 / n_2. NaN where no angle is: the sample is on the wrong side at any theta_2, or on the right one.
    """
    wanted = ratio * psi(margin, angle)
    return np.arccos(np.where(np.abs(wanted) <= 1, wanted, np.nan))


def circle_boundary(margin: Margin, apart: float = APART) -> float | None:
    """theta_1 of the boundary of class 1 on the arc between centers that are `apart`, rad: past it there is margin.

    By bisection of psi(theta) - cos(apart - theta), to the last bit. None where the sample is past the boundary
    nowhere on the arc, even at its own center.
    """

    def above(theta: float) -> bool:
        return psi(margin, np.array([theta]))[0] >= math.cos(apart - theta)

    if not above(0.0):
        return None
    low, high = 0.0, apart
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return low


def draw_boundaries(margins: Sequence[Named]) -> Figure:
    """A panel for each margin: the two boundaries in (theta_1, theta_2). CosFace (arXiv 1801.09414), ArcFace."""
    figure, panels = grid(len(margins), 3, 3.05, sharex=True, sharey=True)
    angle = np.radians(np.linspace(0, 180, 361))
    for axes, one in zip(panels.flat, margins, strict=False):
        value, line = psi(one.margin, angle), boundary(one.margin, angle)
        least = np.degrees(np.where(np.isnan(line), np.where(value > 1, 0, np.pi), line))
        degrees = np.degrees(angle)
        axes.fill_between(degrees, least, 180, color=FIRST, alpha=0.16, linewidth=0)
        axes.fill_betweenx(degrees, least, 180, color=SECOND, alpha=0.16, linewidth=0)
        axes.plot(degrees, np.degrees(line), color=FIRST)
        axes.plot(np.degrees(line), degrees, color=SECOND)
        if not one.margin.normalize_centers:
            for ratio in (0.8, 1.25):
                axes.plot(degrees, np.degrees(boundary(one.margin, angle, ratio)), color=MUTED, lw=1, ls=(0, (3, 2)))
        axes.text(6, 114, "1", color=FIRST, weight="bold", size=15, ha="center", va="top")
        axes.text(115, 5, "2", color=SECOND, weight="bold", size=15, ha="center")
        axes.set_title(broken(one.label))
        axes.set_aspect("equal")
        axes.set_xlim(0, 120)
        axes.set_ylim(0, 120)
        ticks = range(0, 121, 30)
        axes.set_xticks(ticks, [f"{tick}°" for tick in ticks])
        axes.set_yticks(ticks, [f"{tick}°" for tick in ticks])
    label_outer(panels, len(margins), "θ₁", "θ₂")
    return figure


def draw_circle(margins: Sequence[Named]) -> Figure:
    """A panel for each margin: two centers on the circle, each class's part, and the margin. AM-Softmax, Figs. 1, 3."""
    figure, panels = grid(len(margins), 3, 3.1)
    for axes, one in zip(panels.flat, margins, strict=False):
        _draw_one_circle(axes, one.margin)
        axes.set_title(broken(one.label))
    return figure


def _draw_one_circle(axes: Axes, margin: Margin) -> None:
    first, second = math.pi / 2 + APART / 2, math.pi / 2 - APART / 2
    around = np.linspace(-math.pi / 2, math.pi * 3 / 2, 2881)
    theta = [np.abs((around - center + math.pi) % (2 * math.pi) - math.pi) for center in (first, second)]
    own = [psi(margin, theta[0]) >= np.cos(theta[1]), psi(margin, theta[1]) >= np.cos(theta[0])]
    _arcs(axes, around, ~(own[0] | own[1]), MUTED, 0.3)
    for past, color in zip(own, (FIRST, SECOND), strict=True):
        _arcs(axes, around, past, color, 0.85)
    at = circle_boundary(margin)
    for center, color, name, sign in ((first, FIRST, "W₁", -1), (second, SECOND, "W₂", 1)):
        tip = np.array([math.cos(center), math.sin(center)])
        axes.annotate("", 0.86 * tip, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0})
        axes.text(*(1.24 * tip), name, color=color, weight="bold", ha="center", va="center")
        if at is not None:
            edge = center + sign * at
            axes.plot([0, 1.02 * math.cos(edge)], [0, 1.02 * math.sin(edge)], color=color, lw=1.2, ls=(0, (4, 2)))
    between = 0.0 if at is None else math.degrees(APART - 2 * at)
    said = "no room" if at is None else f"margin {between:.1f}°" if between > 0.05 else "no margin"
    axes.text(0, 1.2, said, ha="center", va="center", color=INK)
    axes.set_xlim(-1.3, 1.3)
    axes.set_ylim(-1.1, 1.35)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _arcs(axes: Axes, around: np.ndarray, chosen: np.ndarray, color: str, alpha: float) -> None:
    """A ring's parts where `chosen` holds over the ascending angles `around`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(int)))
    for start, stop in edges.reshape(-1, 2):
        ends = np.degrees([around[start], around[min(stop, len(around) - 1)]])
        axes.add_patch(Wedge((0, 0), 1.0, *ends, width=0.12, color=color, alpha=alpha, lw=0))
