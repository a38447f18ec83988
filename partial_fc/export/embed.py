"""partial-fc embed: embeddings of images or of a data set into a file, by all ranks of torchrun."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from partial_fc import storage
from partial_fc.checkpoint import find_for_all
from partial_fc.export.images import Images, open_images
from partial_fc.export.model import Embedder, is_run, open_model
from partial_fc.export.rows import KINDS, write_rows
from partial_fc.files import printable
from partial_fc.folders import make_folder
from partial_fc.parallel import distributed

_ROWS_AT_ONCE = 1 << 16  # when the ranks' parts are joined
_SHOWN = 3  # images that are named on the console


class _Files(NamedTuple):
    embeddings: Path  # float32 (n, D)
    rows: Path  # line i: what row i is
    left_out: Path  # a line an image that could not be read; only where there is one

    def part(self, rank: int) -> "_Files":
        return _Files(*(path.with_name(f"{path.name}.partial-{rank}") for path in self))


def embed_images(
    model: str | Path,
    source: Path,
    out: Path,
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int = 2,
    keep_damaged: bool = False,
) -> int:
    """Writes the normalized embeddings of all images of `source` to `out` (.safetensors or .npy). A collective.

    model: an exported folder, a hub repository, a run or a checkpoint, folders or URLs. source: an image, or a
    folder of images in any layout, cut and resized as `prepare folder` does, or a prepared data set. `out`, float32
    (n, D), is the tensor "embeddings"; beside it a .jsonl says what each row is: name, and of a data set label and
    class. The files are the same at any number of ranks, which share a file system, and appear when they are complete.
    No rank keeps more than a batch. workers: reader processes a rank, of a data set.

    Files of a folder that are no images, cannot be read or are damaged (JPEGs that have lost data: keep_damaged takes
    them) are left out, counted and named, in a .left_out.jsonl; a sample of a data set that is no image is an error.
    Returns n. Raises RunError on all ranks, also where an embedding is NaN or 0.
    """
    source, out = Path(source), Path(out)
    files = _Files(out, out.with_suffix(".jsonl"), out.with_suffix(".left_out.jsonl"))
    rank, world_size = distributed.rank(), distributed.world_size()
    found = find_for_all(storage.place(model), f"embedding {source}") if is_run(model) else None
    with distributed.together(f"embedding {source}"):
        if out.suffix not in KINDS or batch_size < 1:
            raise ValueError(
                f"got {out} and batches of {batch_size}: wanted a name in {' or '.join(KINDS)}, batches of 1 or more"
            )
        for file in files:
            if file.exists():
                raise FileExistsError(f"{file} exists: delete it, or choose another name to write to")
        net = open_model(model, found).to(device)
        images = open_images(source, net.image_size, keep_damaged=keep_damaged)
        make_folder(out.parent, "name to write to")
    seen = (images.fingerprint(), net.config)
    if any(other != seen for other in distributed.gather_objects(seen)):
        raise distributed.RunError(
            f"the ranks see different models or different images in {source}: put both on a shared file system"
        )
    left_out: list[dict] = []
    ours = 0
    try:
        with distributed.together(f"embedding {source}"):
            ours, left_out = _embed_part(net, images, files.part(rank), batch_size, workers, device)
        counts = distributed.gather_objects(ours)
        missing = [row for rows in distributed.gather_objects(left_out) for row in rows]
        missing += [{"name": name, "reason": "not_an_image"} for name in images.others]
        with distributed.together(f"writing {out}"):
            if not sum(counts):
                raise ValueError(f"none of the {len(images)} images of {source} could be read, {_reasons(missing)}")
            if rank == 0:
                _join(files, [files.part(r) for r in range(world_size)], counts, net.embedding_dim, missing)
                if missing:
                    text = f"left out: {_reasons(missing)}, see {files.left_out}; {_some(missing)}"
                    print(printable(text), flush=True)
                print(f"{out}: {sum(counts):,} embeddings of {net.embedding_dim} numbers", flush=True)
    finally:
        for path in files.part(rank):
            path.unlink(missing_ok=True)
    return sum(counts)


@torch.no_grad()
def _embed_part(
    net: Embedder, images: Images, files: _Files, batch_size: int, workers: int, device: torch.device
) -> tuple[int, list[dict]]:
    """Writes this rank's whole batches; returns the number of rows and what was left out."""
    # Batches are the same whatever the number of ranks, and so are sums in them.
    mine = distributed.part(-(-len(images) // batch_size), distributed.rank(), distributed.world_size())
    positions = np.arange(mine.start * batch_size, min(mine.stop * batch_size, len(images)))
    count, left_out = 0, []
    bar = tqdm(
        total=len(positions),
        desc=f"embedding {images.source.name}, this rank's part",
        unit=" images",
        mininterval=1,
        delay=2,
        disable=distributed.rank() > 0,
    )
    with open(files.embeddings, "wb") as numbers, open(files.rows, "w") as rows, bar:
        for read in images.batches(positions, batch_size, workers):
            bar.update(len(read.images) + len(read.left_out))
            left_out += read.left_out
            if not read.rows:
                continue
            embeddings = net(read.images.to(device)).cpu()
            sound = (embeddings.norm(dim=1) - 1).abs() < 1e-3  # not of NaN, nor of zeros, which overflows leave
            if not sound.all():
                name = read.rows[int(sound.long().argmin())]["name"]
                raise ValueError(f"the embedding of {name} is not of length 1: the model is untrained or has diverged")
            numbers.write(np.ascontiguousarray(embeddings.numpy(), dtype="<f4").data)
            rows.writelines(json.dumps(row) + "\n" for row in read.rows)
            count += len(read.rows)
    return count, left_out


def _join(files: _Files, parts: list[_Files], counts: list[int], dim: int, left_out: list[dict]) -> None:
    """The ranks' parts one after the other: the embeddings last, so that they never stand without the rest."""
    partial = _Files(*(path.with_name(f"{path.name}.partial") for path in files))
    try:
        if left_out:
            partial.left_out.write_text("".join(json.dumps(row) + "\n" for row in left_out))
        with open(partial.rows, "wb") as out:
            for part in parts:
                with open(part.rows, "rb") as rows:
                    shutil.copyfileobj(rows, out)

        def numbers() -> Iterator[np.ndarray]:
            for part in parts:
                with open(part.embeddings, "rb") as file:
                    while len(some := np.fromfile(file, "<f4", _ROWS_AT_ONCE * dim)):
                        yield some

        shape = (sum(counts), dim)
        write_rows(partial.embeddings, "embeddings", shape, numbers(), {"format": "pt"}, kind=files.embeddings.suffix)
        if left_out:
            os.replace(partial.left_out, files.left_out)
        os.replace(partial.rows, files.rows)
        os.replace(partial.embeddings, files.embeddings)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _reasons(left_out: list[dict]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(row["reason"] for row in left_out).items())


def _some(left_out: list[dict]) -> str:
    names = ", ".join(row["name"] for row in left_out[:_SHOWN])
    return f"{names}{', …' * (len(left_out) > _SHOWN)}"
