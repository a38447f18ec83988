"""How long embeddings of worse and worse images are. L2-softmax (Ranjan et al., arXiv 1703.09507) looked at it first.

Quality is resolution: an image is made smaller by averaging and enlarged again. n images, L resolutions.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from partial_fc.figures.style import label_ends, line_of, new_figure
from partial_fc.opencv import cv2

DEFAULT = "softmax;normsoftmax:scale=16;cosface:scale=16"
PARTS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)  # of the image's side
IMAGES = 1000
EXAMPLES = 2


def coarser(images: np.ndarray, part: float) -> np.ndarray:
    """Images (n, H, W) or (n, H, W, 3) uint8 with the detail of `part` of their pixels a side; same shape."""
    if part == 1:
        return images
    height, width = images.shape[1:3]
    small = (max(round(width * part), 1), max(round(height * part), 1))
    return np.stack(
        [
            cv2.resize(cv2.resize(image, small, interpolation=cv2.INTER_AREA), (width, height)).reshape(image.shape)
            for image in images
        ]
    )


def lengths_by_quality(embed: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """|x| (L, n) of the images (n, H, W, ...) at every one of PARTS; embed: images to embeddings (n, D)."""
    return np.stack([np.linalg.norm(embed(coarser(images, part)), axis=1) for part in PARTS])


def draw_quality(measured: Sequence[tuple[str, np.ndarray]], examples: np.ndarray) -> Figure:
    """A curve for each (label, |x| (L, n)), by its median on sharp images, quartiles shaded; examples below."""
    figure = new_figure(5.9)
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(3.3, 1.75))
    at = np.arange(len(PARTS))
    ends = []
    for number, (label, lengths) in enumerate(measured):
        low, middle, high = np.quantile(lengths, (0.25, 0.5, 0.75), axis=1) / np.median(lengths[0])
        axes.fill_between(at, low, high, color=line_of(number)["color"], alpha=0.13, linewidth=0)
        axes.plot(at, middle, marker="o", markersize=5, **line_of(number))
        ends.append((middle[-1], label, line_of(number)["color"]))
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.5, len(PARTS) - 0.5)
    axes.set_ylabel("|x| / its median at full resolution")
    label_ends(axes, ends)
    shown = examples[:EXAMPLES]
    for column, part in enumerate(PARTS):
        for row, image in enumerate(coarser(shown, part)):
            box = (column - 0.46, column + 0.46, -row - 0.46, -row + 0.46)
            strip.imshow(image, cmap="gray", vmin=0, vmax=255, extent=box, aspect="auto", interpolation="nearest")
    strip.set_xlim(-0.5, len(PARTS) - 0.5)
    strip.set_ylim(-len(shown) + 0.5, 0.5)
    strip.set_yticks([])
    strip.grid(visible=False)
    side = examples.shape[1]
    strip.set_xticks(at, [f"{max(round(side * part), 1)} px" for part in PARTS])
    return figure
