"""Fashion-MNIST: 70,000 gray images of 28 x 28 pixels in ten classes (arXiv 1708.07747), from Debian's package."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from partial_fc.documents import MIB, read_bytes
from partial_fc.prepare.packages import cache_folder, fetch_packages

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
BYTES = 64 * MIB  # of a file, unpacked; the largest has 47 million
PACKAGE = "dataset-fashion-mnist"
INSTEAD = "Any folder with its four files (train-images-idx3-ubyte.gz, …) does instead: `--fashion-mnist /folder`."


def fetch_fashion_mnist() -> Path:
    """The folder with the four files, fetched (31 MB) unless it is there. Raises OSError where apt cannot."""
    fetched = fetch_packages([PACKAGE], cache_folder("datasets") / "fashion-mnist", "Fashion-MNIST", INSTEAD)
    return fetched / PACKAGE / "usr" / "share" / "datasets" / "fashion-mnist"


def load_fashion_mnist(folder: Path, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) uint8 of `part`, train (60,000) or t10k (10,000).

    Raises FileNotFoundError for a folder without the files, ValueError for files that are not Fashion-MNIST's.
    """
    images, labels = (
        read_idx(_file(Path(folder), name)) for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    )
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder} has images {images.shape} and labels {labels.shape}, wanted (n, 28, 28) and (n,). {INSTEAD}"
        )
    if labels.size and labels.max() >= len(CLASSES):
        raise ValueError(f"{folder} has the label {labels.max()}, wanted 0 to {len(CLASSES) - 1}. {INSTEAD}")
    return images, labels


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, plain or gzipped: 0 0 8 d, d sizes (big endian), the values.

    Raises ValueError for a file that is damaged, of another kind, or of another length than its sizes say.
    """
    data = read_bytes(path, BYTES)
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                data = file.read(BYTES + 1)  # 1 MB may stand for 1 GB
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is cut off or damaged ({error}): fetch it again") from None
        if len(data) > BYTES:
            raise ValueError(f"{path} unpacks to more than {BYTES:,} bytes: fetch it again")
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} begins with {data[:4].hex(' ') or 'nothing'}, wanted 00 00 08 and the number of dimensions: "
            "give an IDX file of unsigned bytes"
        )
    start = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist()) if len(data) >= start else None
    if shape is None or len(data) - start != math.prod(shape):
        wanted = f"{data[3]} sizes" if shape is None else f"{math.prod(shape):,} values of shape {shape}"
        raise ValueError(f"{path} has {max(len(data) - start, 0):,} bytes for {wanted}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has no {name}.gz. {INSTEAD}")
