"""How the figures look: the report's colors on a light page, text to read at 800 pixels, labels at the curves."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The light half of report/page.html.j2, whose series can be told apart by the colour-blind.
INK, MUTED, LINE, PAPER = "#1c1e21", "#666b73", "#e1e1dc", "#fdfdfc"
SERIES = ("#0072b2", "#d55e00", "#008a66", "#b5508a", "#a67c00", "#5b6bc0")
CLASSES = (*SERIES, "#3aa7dd", "#7c4a2a", "#e08fb6", "#50555c")  # ten classes; the figures name them as well

WIDTH = 8.0  # inches: at 800 pixels 11 points are 15 pixels
DPI = 150

STYLE = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "font.size": 11,
    "text.parse_math": False,  # a run may be called a$b$
    "svg.fonttype": "none",
    "svg.hashsalt": "partial_fc",  # the same data give the same bytes
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


def new_figure(height: float) -> Figure:
    """An empty figure, WIDTH x `height` inches; drawn and saved under `STYLE`. Needs no display."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def grid(count: int, most: int, height: float, rows_each: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns) for `count` panels, at most so many beside each other; spare ones are off.

    Rows are as even as can be: of four panels, at most three beside each other, two and two. height: inches of a row.
    rows_each: rows of a panel, whose axes stand below each other.
    """
    lines = -(-count // most)
    columns = -(-count // lines)
    rows = rows_each * lines
    figure = new_figure(height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for spare in axes[-rows_each:, (count - 1) % columns + 1 :].flat:
        spare.set_axis_off()
    return figure, axes


def label_outer(panels: np.ndarray, count: int, x: str, y: str) -> None:
    """Axis labels below the lowest panel of each column and beside the first of each row; only `count` are in use."""
    rows, columns = panels.shape
    for number in range(count):
        row, column = divmod(number, columns)
        if number + columns >= count:
            panels[row, column].set_xlabel(x)
            panels[row, column].tick_params(labelbottom=True)
        if column == 0:
            panels[row, column].set_ylabel(y)


def color_of(number: int) -> str:
    return SERIES[number % len(SERIES)]


def line_of(number: int) -> dict:
    """Color and dashes of a curve: past the palette it begins again, dashed."""
    return {"color": color_of(number), "linestyle": "-" if number < len(SERIES) else (0, (4, 2))}


def broken(label: str, length: int = 20) -> str:
    """A label in two lines where it is longer than `length`: the margin's name above its parameters.

    One without a space, such as a run folder's name, is cut into pieces of that length.
    """
    name, _, rest = label.partition(" ")
    if not rest:
        return "\n".join(wrap(label, length))
    return f"{name}\n{rest}" if len(label) > length else label


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes (y, label, color) beside the right edge of the axes at the height of y, moved apart where they overlap."""
    axes.get_xlim(), axes.get_ylim()  # settles the limits, which matplotlib leaves open until asked
    to_axes = axes.transData + axes.transAxes.inverted()
    edge, bounds = axes.get_xlim()[1], axes.get_ylim()
    heights = [to_axes.transform((edge, np.clip(y, *bounds)))[1] for y, _, _ in ends]
    labels = [broken(label) for _, label, _ in ends]
    line = 0.2 / (axes.figure.get_figheight() * axes.get_position().height)  # 0.2 inches, as a part of the axes
    sizes = [line * (label.count("\n") + 1) for label in labels]
    for place, label, (_, _, color) in zip(spread(heights, sizes), labels, ends, strict=True):
        axes.annotate(
            label,
            (1.0, place),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
            linespacing=1.0,
            annotation_clip=False,
        )


def spread(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Middles of labels of these sizes, in their order, near `heights`, without overlap, and above 0.03 at the bottom.

    Blocks of labels that would overlap are merged and stand at the mean of what their members wanted.
    """
    order = np.argsort(heights, kind="stable")
    blocks: list[tuple[float, list[int]]] = []  # middle of a block, its members upward
    for number in order:
        blocks.append((float(heights[number]), [int(number)]))
        while len(blocks) > 1:
            (below, lower), (above, upper) = blocks[-2:]
            reach = (sum(sizes[i] for i in lower) + sum(sizes[i] for i in upper)) / 2
            if above - below >= reach:
                break
            weight = len(lower) + len(upper)
            blocks[-2:] = [((below * len(lower) + above * len(upper)) / weight, lower + upper)]
    placed, top = [0.0] * len(heights), -np.inf
    for number, (middle, members) in enumerate(blocks):
        least = 0.03 - sizes[members[0]] / 2 if number == 0 else top
        top = max(middle - sum(sizes[i] for i in members) / 2, least)
        for member in members:
            placed[member] = top + sizes[member] / 2
            top += sizes[member]
    return placed


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as its name's ending says, png or svg."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=DPI, metadata=metadata)


def styled():
    """The style, for a with statement around drawing and saving."""
    return matplotlib.rc_context(STYLE)
