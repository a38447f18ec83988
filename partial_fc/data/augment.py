"""Random changes to an image, a pure function of the generator passed in. H height, W width."""

import math

import numpy as np

from partial_fc.config import Affine
from partial_fc.opencv import cv2


def augment(image: np.ndarray, rng: np.random.Generator, flip: bool, affine: Affine | None) -> np.ndarray:
    """Out: (H, W, 3) uint8 like `image`, which is left as it is.

    flip: mirror left and right with probability 0.5.
    affine: rotate, shift and scale; what comes in from outside repeats the border's pixels.
    """
    # All are drawn, whatever is in use: switching the flip off leaves the affine maps of a run as they were.
    mirrored, *draws = rng.random(5)
    if flip and mirrored < 0.5:
        image = cv2.flip(image, 1)
    if affine is None:
        return image
    height, width = image.shape[:2]
    angle, right, down, log_scale = (2 * draw - 1 for draw in draws)
    # OpenCV counts from the middle of the first pixel, so the image's middle is at (size - 1) / 2.
    middle = ((width - 1) / 2, (height - 1) / 2)
    matrix = cv2.getRotationMatrix2D(middle, angle * affine.degrees, math.exp(log_scale * affine.scale))
    matrix[:, 2] += right * affine.translate * width, down * affine.translate * height
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
