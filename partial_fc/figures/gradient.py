"""The length of the embedding's gradient against the embedding's own. After AM-Softmax (arXiv 1801.05599), Fig. 4."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from partial_fc.figures.margins import LATE, Named, typical_statistics
from partial_fc.figures.style import label_ends, line_of, new_figure
from partial_fc.head.margin import Margin
from partial_fc.head.partial_fc import PartialFC
from partial_fc.report.plots import power_of_ten
from partial_fc.seeds import seed_for

DEFAULT = "softmax;normsoftmax:scale=30;cosface:scale=30;arcface:scale=30;magface:scale=30"
CLASSES, DIM = 1000, 128
COSINES = (0.2, 0.7)  # with the own center: a sample that is not learned yet, and one that nearly is
LENGTHS = np.geomspace(0.5, 200, 80)
SMALLEST = 1e-6  # the picture's


def gradient_lengths(
    margin: Margin, lengths: np.ndarray, cosine: float, *, seed: int = 0, classes: int = CLASSES, dim: int = DIM
) -> np.ndarray:
    """|d loss / d x| (n,) of one sample of each length |x| (n,), through the head by autograd, in float64.

    Its direction has this cosine with its own class center; centers are random with |w| near 1. Annealing is at its
    end, running statistics are typical ones.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scale for other numbers of classes is no mistake here
        head = PartialFC(classes, dim, margin=margin, seed=seed, dtype=torch.float64)
    direction = _direction(head.full_weight()[0], cosine, seed)
    label = torch.zeros(1, dtype=torch.int64)
    gradients = []
    for length in lengths:
        head.set_statistics(typical_statistics(margin))
        head.step_count = LATE
        embedding = (length * direction).unsqueeze(0).requires_grad_()
        head(embedding, label).backward()
        head.skip_step()
        gradients.append(embedding.grad.norm().item())
    return np.array(gradients)


def _direction(center: Tensor, cosine: float, seed: int) -> Tensor:
    """A unit vector (D,) with this cosine with the center (D,), random otherwise."""
    generator = torch.Generator().manual_seed(seed_for("gradient", seed))
    own = center / center.norm()
    other = torch.randn(len(own), generator=generator, dtype=own.dtype)
    other = other - (other @ own) * own
    return cosine * own + (1 - cosine**2) ** 0.5 * other / other.norm()


def draw_gradient(margins: Sequence[Named], *, seed: int = 0, classes: int = CLASSES) -> Figure:
    """A panel for each cosine with the own center, both axes logarithmic; a slope of -1 is 1 / |x|."""
    figure = new_figure(4.2)
    panels = figure.subplots(1, len(COSINES), sharey=True)
    for axes, cosine in zip(panels, COSINES, strict=True):
        ends = []
        for number, one in enumerate(margins):
            value = gradient_lengths(one.margin, LENGTHS, cosine, seed=seed, classes=classes)
            axes.plot(LENGTHS, np.where(value > SMALLEST / 10, value, np.nan), **line_of(number))
            ends.append((max(value[-1], SMALLEST), one.label, line_of(number)["color"]))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(LENGTHS[0], LENGTHS[-1])
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
        axes.set_xlabel("|x|")
        axes.set_title(f"cos θ = {cosine:g}")
    panels[0].set_ylim(bottom=SMALLEST)
    panels[0].yaxis.set_major_formatter(power_of_ten)
    panels[0].set_ylabel("|∂ loss / ∂x|")
    label_ends(panels[-1], ends)
    return figure
