"""OpenCV with a limit to the pixels of an image that it decodes: the only module that imports it.

OpenCV takes up to 2^30 pixels: a PNG of 1.2 MB then asks for 2.9 GB. It reads its limit from the environment, once,
when it is loaded; so it is set here, before that. OPENCV_IO_MAX_IMAGE_PIXELS is the setting: where it is set, it
holds. A program that imports cv2 before partial_fc has OpenCV's own limit.
"""

import os

from partial_fc.files import MAX_PIXELS

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))

import cv2  # noqa: E402 - the limit first

__all__ = ["MAX_PIXELS", "cv2"]
