"""Decoded pixels equal Pillow's, of every kind of file that both read; and which JPEGs are damaged."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from partial_fc.data import pixels
from partial_fc.data.pixels import damaged, decode, decode_by_opencv, decode_pixels

SIZE = (24, 16)  # width and height


def smooth(seed: int) -> Image.Image:
    """Gray, smooth, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 3), np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)


def image_of(mode: str) -> Image.Image:
    rgb = Image.merge("RGB", [smooth(seed) for seed in range(3)])
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth(0)).astype(np.uint16) * 257)
    if mode == "P":
        return rgb.quantize(16)
    image = rgb.convert(mode[0] if mode == "LA" else "RGB")
    if mode in ("LA", "RGBA"):
        image.putalpha(smooth(3))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8, upright, on white by the formula."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("I;16", "I"):  # which Pillow clips
        return np.repeat(np.asarray(image)[..., None] // 257, 3, axis=2).astype(np.uint8)
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


KEY = (255, 0, 0)
FORMS = [
    ("PNG", "1 L LA P RGB RGBA I;16", {}),
    ("PNG", "P", {"transparency": 1}),
    ("PNG", "1 L", {"transparency": 0}),
    ("PNG", "RGB", {"transparency": KEY}),
    ("JPEG", "1 L RGB CMYK YCbCr", {}),
    ("JPEG", "L RGB CMYK", {"progressive": True}),
    ("JPEG", "RGB", {"subsampling": 0, "quality": 95}),
    ("JPEG", "RGB", {"subsampling": 1, "restart_marker_blocks": 1}),
    ("MPO", "L RGB", {}),
    ("WEBP", "L LA P RGB RGBA", {}),
    ("WEBP", "RGB RGBA", {"lossless": True}),
    ("GIF", "1 L P RGB RGBA", {}),
    ("GIF", "P", {"transparency": 1}),
    ("BMP", "1 L P RGB RGBA", {}),
    ("PPM", "1 L RGB I;16", {}),
    ("TIFF", "1 L LA P RGB RGBA CMYK YCbCr I;16", {}),
    ("TIFF", "L LA RGB RGBA", {"big_tiff": True}),
    *(("TIFF", "1 L LA RGB RGBA", {"compression": c}) for c in ("tiff_lzw", "tiff_deflate", "packbits")),
    ("TIFF", "L RGB RGBA CMYK", {"compression": "jpeg"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("JPEG2000", "L LA RGB RGBA YCbCr I;16", {}),
    ("JPEG2000", "RGB RGBA", {"no_jp2": True}),
    ("JPEG2000", "RGB", {"irreversible": True}),
    ("AVIF", "L LA RGB RGBA", {"subsampling": "4:4:4", "speed": 10}),
]


@pytest.mark.parametrize(
    ("kind", "mode", "options"), [(kind, mode, options) for kind, modes, options in FORMS for mode in modes.split()]
)
def test_pixels_equal_pillows(kind, mode, options):
    image = image_of(mode)
    if "transparency" in options and mode != "P":
        image.paste(options["transparency"], (0, 0, 8, 8))
    data = encoded(image, kind, **options)
    got, wanted = decode_pixels(data), by_pillow(data)
    assert got.rgb.shape == wanted.shape and got.rgb.dtype == np.uint8
    rounding = got.transparent or mode in ("CMYK", "YCbCr")
    assert np.abs(got.rgb.astype(int) - wanted).max() <= rounding
    assert got.transparent == ("A" in mode and kind not in ("GIF", "BMP") or "transparency" in options)
    assert not got.by_opencv or decode_by_opencv(data).tobytes() == got.rgb.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned(kind, mode):
    if (kind, mode) == ("JPEG", "RGBA"):
        mode = "L"
    shapes = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"WEBP": {"lossless": True}, "AVIF": {"speed": 10}}.get(kind, {})
        data = encoded(image_of(mode), kind, exif=exif, **options)
        got, wanted = decode(data), by_pillow(data)
        assert got.shape == wanted.shape and np.abs(got.astype(int) - wanted).max() <= (mode == "RGBA"), orientation
        shapes.add(got.shape)
    assert len(shapes) == 2


def test_what_is_hidden_is_white_and_an_opaque_alpha_changes_nothing():
    rgb = image_of("RGB")
    hidden = np.dstack([np.asarray(rgb), np.full(SIZE[::-1], 255, np.uint8)])
    for kind in ("PNG", "WEBP", "TIFF"):
        opaque = encoded(Image.fromarray(hidden), kind, **({"lossless": True} if kind == "WEBP" else {}))
        got = decode_pixels(opaque)
        assert got[1:] == (False, True) and got.rgb.tobytes() == np.asarray(rgb).tobytes()
    hidden[:, :12, 3] = 0
    got = decode(encoded(Image.fromarray(hidden), "PNG"))
    assert (got[:, :12] == 255).all() and (got[:, 12:] == np.asarray(rgb)[:, 12:]).all()


def test_opaque_files_do_not_wait_for_pillow(monkeypatch):
    def refuse(*_):
        raise AssertionError("Pillow was asked")

    files = [encoded(image_of("RGB"), kind) for kind in ("JPEG", "PNG", "WEBP")]
    files += [encoded(image_of("P"), "PNG"), encoded(image_of("RGB"), "WEBP", lossless=True)]
    monkeypatch.setattr(pixels.Image, "open", refuse)
    assert all(decode_pixels(data).by_opencv for data in files)


def test_what_is_no_image():
    gray = cv2.imencode(".pfm", np.ones((4, 4), np.float32))[1].tobytes()  # which OpenCV gives as (H, W) float32
    whole = encoded(image_of("RGBA"), "PNG")
    for data in (b"", b"no image", gray, whole[:-30], b"\x89PNG", b"RIFF", b"\xff\xd8"):
        assert decode(data) is None and not damaged(data)


def cut(data: bytes, *ways: str) -> list[bytes]:
    """Cut or zeroed at some places of its image data, with the end-of-image marker put back."""
    start = data.find(b"\xff\xda") + 20
    places = range(start, len(data) - 8, (len(data) - start) // 5)
    end = {"end": b"\xff\xd9", "zeros and end": None}
    return [data[:at] + (end[way] or bytes(len(data) - at - 2) + b"\xff\xd9") for way in ways for at in places]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {}),
        ("RGB", {}),
        ("CMYK", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"restart_marker_blocks": 1}),
        ("RGB", {"subsampling": 2, "optimize": True}),
    ],
)
def test_damaged_jpegs(mode, options):
    data = encoded(image_of(mode).resize((96, 64)), "JPEG", **options)
    assert not damaged(data)
    assert not damaged(data + bytes(100)) and not damaged(data + b"what a phone puts behind it")
    assert damaged(data[:-2]) and damaged(data[:-1] + b"\0")
    ways = ("end", "zeros and end") if "progressive" not in options else ("zeros and end",)
    for broken in cut(data, *ways):
        accepted = decode(broken)
        assert damaged(broken) and accepted is not None
        assert accepted.tobytes() != decode(data).tobytes()


def test_warnings_that_say_nothing_of_the_pixels():
    data = encoded(image_of("RGB"), "JPEG")
    version = bytearray(data)
    version[data.find(b"JFIF\0") + 5] = 9
    icc = encoded(image_of("RGB"), "JPEG", icc_profile=bytes(200))
    assert not damaged(bytes(version)) and not damaged(icc)
    broken = bytearray(icc)
    broken[icc.find(b"ICC_PROFILE\0") + 12] = 7  # part 7 of 1
    assert decode(bytes(broken)) is not None and not damaged(bytes(broken))


def test_damaged_jpeg_2000_and_others():
    for options in ({}, {"no_jp2": True}):
        data = encoded(image_of("RGB"), "JPEG2000", **options)
        assert not damaged(data) and damaged(data[: len(data) // 2] + bytes(len(data) // 2))
    assert not damaged(encoded(image_of("RGB"), "PNG")) and not damaged(encoded(image_of("RGB"), "WEBP"))
