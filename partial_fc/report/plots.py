"""Plots as SVG text that lives inside the page: it takes colors and fonts from the page, in light and in dark."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

SERIES = 6  # colors of the page's palette; further series repeat them dashed
SIZE = (4.3, 2.7)  # inches at 72 units: text of 9 units is readable at phone width, where a unit is about a pixel
POINTS = 300  # a curve of more rows is averaged in so many buckets

# matplotlib wants real colors: each stands for a variable of the page's style sheet and is replaced by it.
_INK, _MUTED, _LINE, _PAPER = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _PAPER: "--paper"}
_VARIABLES |= {f"#0500{i:02x}": f"--series-{i}" for i in range(SERIES)}

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run may be called a$b$
    "svg.hashsalt": "partial_fc",  # the same data give the same bytes
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Series:
    """A labeled curve; color is a place in the palette, None the muted gray of what is there for comparison."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int | None


def curves(name: str, series: Sequence[Series], *, log: bool = False, percent: bool = False) -> str:
    """Values over steps; each curve ends in its last value, and its label if there are several.

    Here as in the other plots `name` is unique in the page.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        ends = []
        for one in series:
            x, y = _thinned(one.x, one.y)
            axes.plot(x, y, **_line(one.color))
            drawn, logged = y[np.isfinite(y)], one.y[np.isfinite(one.y)]
            if len(drawn):
                value = f"{logged[-1]:.0%}" if percent else _short(logged[-1])
                label = f"{_clipped(one.label)} {value}" if len(series) > 1 else value
                ends.append((x[-1], drawn[-1], label, one.color))
        if log:
            axes.set_yscale("log")
        elif not percent and all((one.y[np.isfinite(one.y)] >= 0).all() for one in series):
            axes.set_ylim(bottom=0)
        if percent:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        if not log:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        _label_ends(axes, ends)
        return _svg(figure, name)


def shares(name: str, steps: np.ndarray, parts: np.ndarray, labels: Sequence[str]) -> str:
    """Shares of a whole over steps (n,), one above the other: parts (n, SERIES at most), each labeled at its end."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        thin = np.stack([_thinned(steps, part)[1] for part in parts.T])
        thin = thin / thin.sum(axis=0)
        tops = np.cumsum(thin, axis=0)
        x = _thinned(steps, parts[:, 0])[0]
        if len(x) == 1:  # an area wants two ends
            x, thin, tops = np.array([x[0] - 1, x[0]]), np.repeat(thin, 2, axis=1), np.repeat(tops, 2, axis=1)
        ends = []
        whole = parts.sum(axis=0) / parts.sum()
        for color, (part, top, label) in enumerate(zip(thin, tops, labels, strict=True)):
            axes.fill_between(x, top - part, top, color=_color(color), linewidth=0, alpha=0.75)
            ends.append((x[-1], top[-1] - part[-1] / 2, f"{label} {whole[color]:.0%}", color))
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.set_xlabel("step; beside it the mean of the run")
        _label_ends(axes, ends)
        return _svg(figure, name)


def roc(name: str, series: Sequence[Series]) -> str:
    """TAR over FAR (logarithmic); each curve is labeled where it passes one half, or starts if that is above."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        labels = []
        for one in series:
            x, y = one.x[one.x > 0], one.y[one.x > 0]
            axes.plot(x, y, drawstyle="steps-post", **_line(one.color))
            middle = int(np.argmin(np.abs(y - 0.5)))
            labels.append((x[middle], y[middle], one, middle == 0))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_major_formatter(power_of_ten)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(right=1)
        axes.set_ylim(-0.02, 1.04)
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_xlabel("false accept rate")
        axes.set_ylabel("true accept rate")
        for x, y, (_, _, one, at_start) in _spread(labels, gap=0.1):
            text = axes.annotate(
                _clipped(one.label, 24),
                (x, y),
                xytext=(6, -4) if at_start else (-6, 0),
                textcoords="offset points",
                ha="left" if at_start else "right",
                va="top" if at_start else "center",
                color=_color(one.color),
                weight="bold",
            )
            text.set_bbox({"facecolor": _PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 0.5})
        return _svg(figure, name)


def histogram(
    name: str, edges: np.ndarray, genuine: np.ndarray, impostor: np.ndarray, thresholds: Sequence[tuple[str, float]]
) -> str:
    """Share of the genuine and of the impostor pairs per bin of the score, logarithmic, with labeled thresholds."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        low, high = _occupied(edges, genuine + impostor)
        floor = 0.5 / max(impostor.sum(), genuine.sum())
        for counts, label, color, side in ((impostor, "impostor", 1, "right"), (genuine, "genuine", 0, "left")):
            share = np.maximum(counts / counts.sum(), floor)
            axes.stairs(share, edges, baseline=floor, fill=True, color=_color(color), alpha=0.25, linewidth=0)
            axes.stairs(share, edges, baseline=floor, color=_color(color), linewidth=1.4)
            place = (np.average((edges[1:] + edges[:-1]) / 2, weights=counts), share.max())
            offset = {"xytext": (-3 if side == "right" else 3, 4), "textcoords": "offset points"}
            axes.annotate(label, place, ha=side, color=_color(color), weight="bold", **offset)
        axes.set_yscale("log")
        axes.set_ylim(floor, 9)  # above 1, room for the labels
        axes.set_xlim(low, high)
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(power_of_ten)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("cosine score")
        axes.set_ylabel("share of the pairs")
        for label, at in thresholds:
            axes.axvline(at, color=_MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
            beyond = at > (low + high) / 2
            offset = {"xytext": (-3 if beyond else 3, -1), "textcoords": "offset points"}
            place = {"xy": (at, 1), "xycoords": ("data", "axes fraction"), **offset}
            axes.annotate(label, ha="right" if beyond else "left", va="top", color=_MUTED, size=8, **place)
        return _svg(figure, name)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
    return figure, figure.add_subplot()


def _color(series: int | None) -> str:
    return _MUTED if series is None else f"#0500{series % SERIES:02x}"


def _line(series: int | None) -> dict:
    dashed = series is not None and series >= SERIES
    return {"color": _color(series), "linestyle": (0, (4, 2)) if dashed else "-"}


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of equal runs of rows."""
    if len(x) <= POINTS:
        return x, y
    starts = np.arange(POINTS) * len(x) // POINTS
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _occupied(edges: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The range of the bins that hold anything, with a little room."""
    bins = np.flatnonzero(counts)
    room = 0.04 * (edges[bins[-1] + 1] - edges[bins[0]])
    return edges[bins[0]] - room, edges[bins[-1] + 1] + room


def _label_ends(axes: Axes, ends: list[tuple]) -> None:
    """Labels to the right of the curves' ends, moved apart where they would overlap."""
    axes.get_xlim(), axes.get_ylim()  # settles the limits, which matplotlib leaves open until asked
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [(1.0, to_axes.transform((x, y))[1], label, color) for x, y, label, color in ends]
    for x, y, (_, _, label, color) in _spread(places, gap=0.085):
        axes.annotate(
            label,
            (x, y),
            xycoords="axes fraction",
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            color=_color(color),
            weight="bold",
            annotation_clip=False,
        )


def _spread(places: list[tuple], gap: float) -> list[tuple[float, float, tuple]]:
    """(x, y, place) with the y of neighbors at least `gap` apart, moved as little as going upward allows."""
    spread, last = [], -np.inf
    for place in sorted(places, key=lambda place: place[1]):
        last = max(place[1], last + gap)
        spread.append((place[0], last, place))
    return spread


def _short(value: float) -> str:
    """1200000 → 1.2M; at most three significant digits."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def _clipped(label: str, length: int = 16) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


def power_of_ten(value: float, _: object = None) -> str:
    """A tick's label: 0.001 as 10 with a raised -3. matplotlib's own would need its mathematical text."""
    return "10" + f"{round(math.log10(value))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element; `name` keeps its ids apart from those of other plots in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = text.replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
