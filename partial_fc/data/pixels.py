"""Bytes of an image file to pixels, and whether they are all there.

OpenCV decodes, and turns the image as its EXIF data say. It drops transparency, and shows the colors that are hidden
under it (it multiplies a TIFF's by it); it does not turn AVIF, and gets the YCbCr of JPEG 2000 wrong. Pillow decodes
these. Transparent pixels are composited on white.

    H, W height and width of the image
"""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from partial_fc.opencv import cv2

_ORIENTATION = 0x0112  # EXIF
_JPEG = b"\xff\xd8"
_WEBP_FLAGS = {b"VP8X": 20, b"VP8L": 24}  # the byte whose bit 4 is transparency, of the extended and the lossless form
_JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")  # in its box, and the bare code stream
# libjpeg's other warnings, of an unknown version or color transform, say nothing of the pixels.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression sequence")


class Pixels(NamedTuple):
    rgb: np.ndarray  # (H, W, 3) uint8
    transparent: bool  # some were, and are composited on white
    by_opencv: bool  # `decode_by_opencv` gives the same


def decode(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB, upright; gray becomes RGB, transparency white. None if it cannot be decoded."""
    pixels = decode_pixels(data)
    return None if pixels is None else pixels.rgb


def decode_pixels(data: bytes) -> Pixels | None:
    """As `decode`, and how it was done."""
    rgb = decode_by_opencv(data)
    if rgb is None:
        return None
    as_it_is = Pixels(rgb, transparent=False, by_opencv=True)
    if _surely_opaque(data):
        return as_it_is
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Pillow's 16-bit gray clips when it is converted; what may be transparent there stays as OpenCV has it.
            transparent = image.has_transparency_data and not image.mode.startswith("I")
            turned = image.format == "AVIF" and image.getexif().get(_ORIENTATION, 1) != 1
            if not (transparent or turned or image.format == "JPEG2000" and image.mode == "RGB"):
                return as_it_is
            upright = ImageOps.exif_transpose(image)
            if transparent:
                upright = upright.convert("RGBA")
                transparent = upright.getextrema()[3][0] < 255  # many files have an alpha channel that is all opaque
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            on_white = np.array(upright.convert("RGB"))
            return Pixels(on_white, transparent, by_opencv=np.array_equal(on_white, rgb))
    except UnidentifiedImageError:  # none of the kinds that only OpenCV knows has transparency
        return as_it_is
    except Exception:  # what Pillow raises for damaged files has no common base
        return None


def decode_by_opencv(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB, upright but for AVIF, transparency dropped. None if it cannot be decoded."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # empty, or larger than OpenCV's limit
        return None
    if image is None or image.dtype != np.uint8 or image.ndim != 3:  # a gray PFM comes as (H, W) float32
        return None
    return image


def damaged(data: bytes) -> bool:
    """Whether some pixels of a file that can be decoded are made up.

    Decoders fill what a JPEG has lost, by a cut or by zeros, with gray or noise, and libjpeg's warning is all that says
    so. For JPEG 2000 it is an error of Pillow's. Other files that are cut do not decode, and zeros in them are pixels.
    """
    if data.startswith(_JPEG):
        try:  # at an eighth of the size: all codes are read, few pixels made
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
        except ValueError as error:
            return str(error).startswith(_DAMAGE) and "ICC" not in str(error)
    elif data.startswith(_JPEG2000):
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except UnidentifiedImageError:
            return False
        except Exception:  # as above
            return True
    return False


def _surely_opaque(data: bytes) -> bool:
    """By the first bytes; False where Pillow has to look. For training: it takes less than a microsecond."""
    if data.startswith(_JPEG):
        return True
    if data.startswith(b"\x89PNG"):  # bit 4 of the color type, or a table or color that is transparent
        return not data[25] & 4 and data.find(b"tRNS", 0, data.find(b"IDAT")) < 0
    if data.startswith(b"RIFF"):
        return data[12:16] == b"VP8 " or data[12:16] in _WEBP_FLAGS and not data[_WEBP_FLAGS[data[12:16]]] & 16
    return False
