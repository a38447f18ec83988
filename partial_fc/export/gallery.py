"""Class centers as a gallery: one normalized embedding a class, or one a sub-center."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from partial_fc.checkpoint import Checkpoint, read_centers
from partial_fc.export.rows import write_rows

_BYTES_AT_ONCE = 1 << 26  # of the class centers: what is in memory is a few times this


def write_gallery(found: Checkpoint, folder: Path) -> tuple[int, ...]:
    """Writes class_centers.safetensors and classes.txt into `folder`; returns the shape of the class centers.

    The tensor "class_centers", (C, D) float32 or with k sub-centers (C, k, D): row i is class i of classes.txt, caught
    up with the updates that it missed and scaled to length 1, so that dot products with embeddings are cosines. Lengths
    and biases, which plain softmax has, stay in the checkpoint. In slices, without a process group.
    """
    manifest = found.manifest
    num_classes, dim, k = manifest["num_classes"], manifest["embedding_dim"], manifest.get("sub_centers", 1)
    shape = (num_classes, dim) if k == 1 else (num_classes, k, dim)
    names = found.classes()  # verified, before the long part
    at_once = max(_BYTES_AT_ONCE // (8 * k * dim), 1)

    def normalized() -> Iterator[np.ndarray]:
        with tqdm(total=num_classes, desc="class centers", unit=" classes", mininterval=1, delay=2) as bar:
            for centers in read_centers(found, at_once):
                yield nn.functional.normalize(centers, dim=-1).float().numpy()
                bar.update(len(centers))

    metadata = {"format": "pt", "normalized": "true", "step": str(found.step)}
    write_rows(folder / "class_centers.safetensors", "class_centers", shape, normalized(), metadata)
    (folder / "classes.txt").write_bytes("".join(f"{name}\n" for name in names).encode())
    return shape
