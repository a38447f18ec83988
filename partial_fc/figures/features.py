"""Embeddings of Fashion-MNIST as points: in the plane and on the circle, and on the sphere."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from partial_fc.figures.style import CLASSES, INK, LINE, MUTED, PAPER, broken, grid
from partial_fc.figures.toy import Toy

DEFAULT = "softmax;normsoftmax:scale=8;cosface:scale=8,margin=0.1;cosface:scale=8,margin=0.2"
SPHERE_DEFAULT = "softmax;normsoftmax:scale=10;cosface:scale=10,margin=0.2;cosface:scale=10,margin=0.4"
POINTS = 2500  # of the test images, so that a picture stays small


def draw_plane(toys: Sequence[tuple[str, Toy]], labels: np.ndarray, names: Sequence[str]) -> Figure:
    """A column for each (label, 2-D network): features above, their directions below. As CosFace has it."""
    figure, panels = grid(len(toys), 4, 2.25, rows_each=2)
    for (above, below), (label, toy) in zip(_pairs(panels, len(toys)), toys, strict=True):
        points, classes = toy.embeddings[:POINTS], labels[:POINTS]
        _scatter(above, points, classes)
        reach = np.quantile(np.abs(points), 0.998) * 1.05
        above.set_xlim(-reach, reach)
        above.set_ylim(-reach, reach)
        above.set_title(broken(label, 14))
        above.tick_params(labelsize=8)
        above.locator_params(nbins=4)
        _draw_directions(below, toy, points, classes)
        _write_spread(below, toy, labels)
        for axes in (above, below):
            axes.set_aspect("equal")
    _name_classes(figure, names)
    return figure


def _draw_directions(axes: Axes, toy: Toy, points: np.ndarray, classes: np.ndarray) -> None:
    """How many features point where: a rose around the circle, and the centers as lines."""
    edges = np.linspace(-np.pi, np.pi, 181)
    angle = np.arctan2(points[:, 1], points[:, 0])
    counts = np.array([np.histogram(angle[classes == c], edges)[0] for c in range(len(toy.centers))])
    heights = np.sqrt(counts / counts.max())  # or the narrow classes would dwarf the wide ones
    for number, (center, height) in enumerate(zip(toy.centers, heights, strict=True)):
        color = CLASSES[number % len(CLASSES)]
        outer = 1 + 0.75 * height
        around, radius = np.repeat(edges, 2)[1:-1], np.repeat(outer, 2)
        x = np.concatenate([np.cos(around) * radius, np.cos(around[::-1])])
        y = np.concatenate([np.sin(around) * radius, np.sin(around[::-1])])
        axes.fill(x, y, color=color, alpha=0.75, linewidth=0)
        tip = center / np.linalg.norm(center)
        axes.plot([0, tip[0]], [0, tip[1]], color=color, linewidth=2)
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=MUTED, linewidth=0.8))
    axes.set_xlim(-1.8, 1.8)
    axes.set_ylim(-1.8, 1.8)
    axes.set_axis_off()


def draw_sphere(toys: Sequence[tuple[str, Toy]], labels: np.ndarray, names: Sequence[str]) -> Figure:
    """A column for each (label, 3-D network): the sphere from the front and from behind. AM-Softmax, Fig. 5."""
    figure, panels = grid(len(toys), 4, 2.15, rows_each=2)
    centers = [_unit(toy.centers) for _, toy in toys]
    turns = [aligned(one, centers[0]) for one in centers]
    view = _view(np.concatenate([one @ turn.T for one, turn in zip(centers, turns, strict=True)]))
    for column, (label, toy), own, turn in zip(_pairs(panels, len(toys)), toys, centers, turns, strict=True):
        seen = (view @ turn).T
        for axes, side in zip(column, (1, -1), strict=True):
            _draw_half(axes, _unit(toy.embeddings[:POINTS]) @ seen, labels[:POINTS], own @ seen, side)
        column[0].set_title(broken(label, 14))
        _write_spread(column[1], toy, labels)
    for axes, side in zip(panels[:, 0], ("front", "back") * (len(panels) // 2), strict=True):
        axes.text(-1.2, 0, side, rotation=90, ha="center", va="center", color=MUTED)
    _name_classes(figure, names)
    return figure


def aligned(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) that brings points (C, 3) as close to target (C, 3) as can be, as p -> p @ rotation.T."""
    u, _, vt = np.linalg.svd(target.T @ points)
    return u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt


def _view(centers: np.ndarray) -> np.ndarray:
    """A rotation (3, 3) to a view in which no center (n, 3) stands at the rim, where little can be seen."""
    number = np.arange(2000) + 0.5
    height, turn = 1 - 2 * number / 2000, np.pi * (1 + 5**0.5) * number  # even over the sphere
    flat = np.sqrt(1 - height**2)
    views = np.stack([flat * np.cos(turn), height, flat * np.sin(turn)], axis=1)
    forward = views[np.argmax(np.minimum(np.abs(views @ centers.T), 0.45).mean(axis=1))]
    right = np.cross([0.0, 1.0, 0.0], forward)
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def _draw_half(axes: Axes, points: np.ndarray, classes: np.ndarray, centers: np.ndarray, side: int) -> None:
    """The half of the sphere that looks along z (side 1) or away from it (-1), seen from there."""
    axes.add_patch(Circle((0, 0), 1, facecolor="#f1f1ed", edgecolor=LINE, linewidth=1))
    turn = np.array([side, 1.0, side])
    for circle in _graticule():
        seen = circle * turn
        seen[seen[:, 2] < 0] = np.nan
        axes.plot(seen[:, 0], seen[:, 1], color=LINE, linewidth=0.7)
    seen = points * turn
    front = seen[:, 2] > 0
    _scatter(axes, seen[front, :2], classes[front])
    for number, center in enumerate(centers * turn):
        if center[2] > 0:
            color = CLASSES[number % len(CLASSES)]
            axes.plot(*center[:2], "o", markersize=7, color=color, markeredgecolor=INK, markeredgewidth=1.2)
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-1.05, 1.05)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _graticule() -> list[np.ndarray]:
    around = np.linspace(0, 2 * np.pi, 121)
    cos, sin = np.cos(around), np.sin(around)
    up = np.radians([-45, 0, 45])
    parallels = [(cos * np.cos(at), np.full_like(around, np.sin(at)), sin * np.cos(at)) for at in up]
    meridians = [(cos * np.cos(at), sin, cos * np.sin(at)) for at in np.radians([45, 90, 135])]
    return [np.stack(circle, axis=1) for circle in parallels + meridians]


def median_angle(toy: Toy, labels: np.ndarray) -> float:
    """The median angle, in degrees, between a test image's embedding and its own class center."""
    cosine = (_unit(toy.embeddings) * _unit(toy.centers)[labels]).sum(axis=1)
    return float(np.degrees(np.median(np.arccos(np.clip(cosine, -1, 1)))))


def _write_spread(axes: Axes, toy: Toy, labels: np.ndarray) -> None:
    said = f"{median_angle(toy, labels):.1f}°"
    axes.text(0.5, -0.01, said, transform=axes.transAxes, ha="center", va="top", color=MUTED)


def _pairs(panels: np.ndarray, count: int) -> list[np.ndarray]:
    """The two axes (2,) of each panel of a grid with two rows each."""
    columns = panels.shape[1]
    return [panels[2 * (number // columns) :, number % columns][:2] for number in range(count)]


def _scatter(axes: Axes, points: np.ndarray, classes: np.ndarray) -> None:
    colors = np.array(CLASSES)[classes % len(CLASSES)]
    axes.scatter(points[:, 0], points[:, 1], c=colors, s=4, alpha=0.55, linewidths=0, rasterized=True)


def _name_classes(figure: Figure, names: Sequence[str]) -> None:
    dot = dict(marker="o", linestyle="", markersize=8)
    marks = [Line2D([], [], color=CLASSES[number % len(CLASSES)], **dot) for number in range(len(names))]
    figure.legend(
        marks,
        names,
        loc="outside lower center",
        ncols=5 if len(names) > 8 else 4,
        handletextpad=0.1,
        columnspacing=1.2,
        facecolor=PAPER,
    )
