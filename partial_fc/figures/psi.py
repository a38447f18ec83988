"""psi(theta): what stands in the target's logit in place of cos(theta). AM-Softmax (arXiv 1801.05599), Fig. 2."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from partial_fc.figures.margins import Named, band, psi
from partial_fc.figures.style import label_ends, line_of, new_figure

DEFAULT = "softmax;sphereface:lambda_min=5;sphereface:margin=2,lambda_min=0;cosface;arcface"


def draw_psi(margins: Sequence[Named]) -> Figure:
    """A curve for each margin over [0, 180] degrees; shaded where it depends on |x| or on draws."""
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    angle = np.linspace(0, np.pi, 721)
    ends = []
    for number, one in enumerate(margins):
        value = psi(one.margin, angle)
        low, high = band(one.margin, angle)
        if (high > low).any():
            axes.fill_between(np.degrees(angle), low, high, color=line_of(number)["color"], alpha=0.15, linewidth=0)
        axes.plot(np.degrees(angle), value, **line_of(number))
        ends.append((value[-1], one.label, line_of(number)["color"]))
    axes.set_xlim(0, 180)
    axes.set_xticks(range(0, 181, 30), [f"{degrees}°" for degrees in range(0, 181, 30)])
    axes.set_xlabel("angle θ between embedding and own class center")
    axes.set_ylabel("ψ(θ)")
    label_ends(axes, ends)
    return figure
