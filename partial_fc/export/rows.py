"""Arrays that need not fit into memory: float32 rows into a .safetensors or .npy file, some at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

KINDS = (".safetensors", ".npy")


def write_rows(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    slices: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    kind: str | None = None,
) -> None:
    """Writes float32 `slices`, which joined have `shape`, to `path`: the tensor `name` of a .safetensors file, or .npy.

    `kind` is the ending that decides, where it is not that of `path`. `metadata` is for .safetensors.
    Raises ValueError where the slices are more or fewer rows.
    """
    wanted = 4 * int(np.prod(shape))
    written = 0
    with open(path, "wb") as file:
        if (kind or path.suffix) == ".npy":
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        else:
            file.write(_safetensors_header(name, shape, wanted, metadata or {}))
        for rows in slices:
            written += file.write(np.ascontiguousarray(rows, dtype="<f4").data)
    if written != wanted:
        raise ValueError(f"{path}: got {written} bytes of rows, wanted {wanted} for the shape {shape}")


def _safetensors_header(name: str, shape: tuple[int, ...], size: int, metadata: Mapping[str, str]) -> bytes:
    """Its length in 8 bytes, then JSON, padded to a multiple of 8 so that the numbers are aligned."""
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": dict(metadata), name: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
