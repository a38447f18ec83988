"""partial-fc study table --picture: every row of a plan, a dot a seed, so that effects stand beside their spread."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from partial_fc.figures.style import LINE, color_of, new_figure, save, styled
from partial_fc.study.table import Line

ROW = 0.25  # inches: a line of text at 11 points is 0.2


def draw_study(lines: Sequence[Line], path: Path) -> None:
    """A panel a column of the table, a row of dots a line: the seeds, pale, and their mean.

    Lines divide groups of rows that are compared with each other, and then each place in a group has its color. Rows
    without any result are left out.

    Raises ValueError where none has one, and for a file that is neither .png nor .svg.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: wanted a name that ends in .png or .svg")
    groups = [[line for line in group if any(line.values.values())] for group in group_lines(lines)]
    groups = [group for group in groups if group]
    if not groups:
        raise ValueError("there is nothing to draw yet: no row has a result in the ledger")
    shown = [line for group in groups for line in group]
    colors = [color_of(place if len(groups) > 1 else 0) for group in groups for place in range(len(group))]
    borders = [sum(map(len, groups[:number])) - 0.5 for number in range(1, len(groups))]
    columns = list(shown[0].values)
    sets = list(dict.fromkeys(column.rpartition(" ")[0] for column in columns))
    with styled():
        figure = new_figure(len(sets) * (ROW * len(shown) + 0.9))
        panels = figure.subplots(len(sets), len(columns) // len(sets), squeeze=False, sharey=True)
        for column, axes in zip(columns, panels.flat, strict=True):
            _draw_column(axes, [line.values[column].values() for line in shown], colors, borders)
            axes.set_title(column)
        panels[0, 0].set_yticks(range(len(shown)), [line.name for line in shown])
        panels[0, 0].set_ylim(len(shown) - 0.4, -0.6)
        save(figure, path)


def group_lines(lines: Sequence[Line]) -> list[list[Line]]:
    """Rows that are compared with each other, on the way to one that is compared with none, in the plan's order."""
    by_name = {line.name: line for line in lines}
    groups: dict[str, list[Line]] = {}
    for line in lines:
        root, seen = line, set()
        while root.against in by_name and root.against != root.name and root.name not in seen:
            seen.add(root.name)
            root = by_name[root.against]
        groups.setdefault(root.name, []).append(line)
    return list(groups.values())


def _draw_column(axes: Axes, rows: Sequence, colors: Sequence[str], borders: Sequence[float]) -> None:
    for place, (values, color) in enumerate(zip(rows, colors, strict=True)):
        values = list(values)
        if not values:
            continue
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=5, markeredgewidth=0)
        axes.plot(sum(values) / len(values), place, "|", color=color, markersize=12, markeredgewidth=2.2)
    for border in borders:
        axes.axhline(border, color=LINE, linewidth=1.2)
    axes.grid(axis="y", visible=False)
    axes.locator_params(axis="x", nbins=3)
