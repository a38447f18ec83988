"""Images to embed, from a folder of any layout or from a prepared data set, behind one face."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from partial_fc.data.reader import image_size, images_in_order
from partial_fc.data.shards import Index, load_index
from partial_fc.prepare.folder import images_below
from partial_fc.prepare.images import as_utf8, fit, in_threads, read_image


class Read(NamedTuple):
    """Some images and what they are."""

    images: Tensor  # (b, 3, H, W) uint8 RGB
    rows: list[dict]  # b of them: name, and label and class where they are known
    left_out: list[dict]  # name and reason of those that could not be read


class Images(Protocol):
    source: Path  # what was given: a folder, or one file
    others: list[str]  # names of the files that are not named like images

    def __len__(self) -> int: ...

    def batches(self, positions: np.ndarray, batch_size: int, workers: int) -> Iterator[Read]:
        """The images at `positions`, `batch_size` at a time, fewer where some could not be read."""

    def fingerprint(self) -> str:
        """Equal on ranks that see the same images."""


class Folder:
    """Every image file below a folder, in the order of `images_below`, cut and resized as `prepare folder` does.

    Or one file, however it is named.
    """

    def __init__(self, path: Path, size: tuple[int, int], keep_damaged: bool = False):
        self.source, self.path, self.size, self.keep_damaged = path, path, size, keep_damaged
        others: list[str] = []
        if path.is_dir():
            self.files, others = images_below(os.fspath(path))
        else:
            self.path, self.files = path.parent, [os.fspath(path)]
        self.others = [self.name(file) for file in others]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, file: str) -> str:
        return as_utf8(os.path.relpath(file, self.path))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file) + b"\0")
        return digest.hexdigest()

    def batches(self, positions: np.ndarray, batch_size: int, workers: int) -> Iterator[Read]:
        def pixels(file: str) -> np.ndarray | str:
            read = read_image(file, keep_damaged=self.keep_damaged)
            return read if isinstance(read, str) else fit(read[1], self.size)

        files = [self.files[position] for position in positions]
        read = in_threads(pixels, files)
        for start in range(0, len(files), batch_size):
            images, rows, left_out = [], [], []
            for file in files[start : start + batch_size]:
                image = next(read)
                if isinstance(image, str):
                    left_out.append({"name": self.name(file), "reason": image})
                else:
                    rows.append({"name": self.name(file)})
                    images.append(torch.from_numpy(image).permute(2, 0, 1))
            yield Read(torch.stack(images) if images else torch.empty(0, 3, *self.size).byte(), rows, left_out)


class DataSet:
    """The samples of a prepared data set. One that is no image is an error that names it, as in an evaluation."""

    def __init__(self, index: Index):
        self.source, self.index, self.classes, self.others = index.path, index, index.classes(), []

    def __len__(self) -> int:
        return self.index.num_samples

    def fingerprint(self) -> str:
        return self.index.fingerprint

    def batches(self, positions: np.ndarray, batch_size: int, workers: int) -> Iterator[Read]:
        if not len(positions):
            return
        done = 0
        for batch in images_in_order(self.index, positions, batch_size, workers):
            samples = positions[done : done + len(batch.images)]
            done += len(samples)
            rows = [
                {"name": self.index.key(sample), "label": label, "class": self.classes[label]}
                | ({} if self.index.names is None else {"source": self.index.name(sample)})
                for sample, label in zip(samples.tolist(), batch.labels.tolist(), strict=True)
            ]
            yield Read(batch.images, rows, [])


def open_images(path: Path, size: tuple[int, int], *, keep_damaged: bool = False) -> Images:
    """A data set's samples if `path` has an index.json, else every image file below the folder, or the one file.

    keep_damaged: of a folder. Raises ValueError for a data set of another size than (H, W) `size`, and where there is
    no image.
    """
    if (path / "index.json").exists():
        index = load_index(path)
        if image_size(index) != tuple(size):
            raise ValueError(
                f"{path} has images of {image_size(index)} pixels, the model wants {tuple(size)}: prepare the data set "
                "at that size"
            )
        return DataSet(index)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, wanted an image, a folder of images, or a data set of `partial-fc prepare`"
        )
    folder = Folder(path, size, keep_damaged)
    if not folder.files:
        raise ValueError(f"{path} has no image in it or below; {len(folder.others)} files of other kinds")
    return folder


def some_images(images: Images, count: int) -> Tensor:
    """At most `count` (n, 3, H, W) uint8, spread evenly. Raises ValueError if fewer than two can be read."""
    positions = np.unique(np.linspace(0, len(images) - 1, count).astype(np.int64))
    batches = list(images.batches(positions, count, 0))
    read = torch.cat([batch.images for batch in batches])
    if len(read) < 2:
        bad = [f"{row['name']} is {row['reason']}" for batch in batches for row in batch.left_out]
        named = f" ({', '.join(bad[:3])})" if bad else ""
        raise ValueError(
            f"{images.source}: {len(read)} of {len(positions)} images could be read{named}; wanted two or more"
        )
    return read
