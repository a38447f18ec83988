"""A data set again, its samples in random order: for shards in order of identity, which no window mixes well.

Two passes, so that a disk or a bucket is read from its beginning to its end, and memory holds one chunk:

    1   of each shard a scratch file of its images, those of chunk 0 of the new order first
    2   of each chunk its part of every scratch file, put in order and written to shards

A chunk is a run of successive samples of the new order. What is where in a scratch file follows from the index, so
nothing else is kept: the same command goes on at the shard where it was killed, and begins the second pass anew.

What goes to a bucket is written to a local folder first, and then uploaded, its index.json last.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from partial_fc import storage
from partial_fc.data.remote import default_folder
from partial_fc.data.shards import SHARD_BYTES, Index, Sample, load_index, require_new, write_shards
from partial_fc.files import one_line
from partial_fc.prepare.images import kind_of
from partial_fc.seeds import seed_for
from partial_fc.storage import Place, remote

INDEX = "index.json"
CHUNK_BYTES = 256 * 2**20  # of images, which memory holds


def prepare_shuffled(
    source: Place,
    out: Place,
    *,
    seed: int = 0,
    scratch: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> Index:
    """Write the samples of the data set `source` to the new one `out`, in random order; both a folder or its URL.

    Images stay as they are, byte for byte, and so do classes, labels and names. The order is a function of the seed.
    The scratch files, in `out` + ".scratch", take as much as the images. For a URL they are in the folder `scratch`,
    and so are the shards until they are uploaded: twice as much; None: in the cache's folder.

    Raises FileExistsError if `out` exists, FileNotFoundError without a data set, OSError for a shard that cannot be
    read or uploaded, ValueError for a list of pairs and for a sample that has changed.
    """
    if remote(out):
        return _into_bucket(source, out, seed, scratch or default_folder(), shard_bytes, chunk_bytes)
    out = Path(out)
    require_new(out)
    return _shuffled(load_index(source), source, out, seed, shard_bytes, chunk_bytes)


def _into_bucket(source: Place, out: str, seed: int, scratch: Path, shard_bytes: int, chunk_bytes: int) -> Index:
    if storage.exists(f"{out}/{INDEX}"):
        raise FileExistsError(f"{out} exists: delete it, or choose another URL to write to")
    storage.check_writable(out, ".partial_fc")  # not after hours
    index = load_index(source)
    which = hashlib.sha256(repr((index.fingerprint, out, seed, shard_bytes)).encode()).hexdigest()[:16]
    here, uploaded = scratch / f"shuffled_{which}", scratch / f"shuffled_{which}.uploaded"
    if not here.exists():  # else a killed run has written it
        uploaded.unlink(missing_ok=True)
        _shuffled(index, source, here, seed, shard_bytes, chunk_bytes)
    names = sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file())
    names.sort(key=lambda name: name == INDEX)  # without it there is no data set
    done = set(uploaded.read_text().splitlines() if uploaded.exists() else [])
    for name in tqdm(names, desc="uploading", unit=" files", mininterval=1):
        if name not in done:
            storage.upload(here / name, f"{out}/{name}")
            with uploaded.open("a") as file:
                file.write(f"{name}\n")
    shutil.rmtree(here)
    uploaded.unlink()
    return load_index(out)


def _shuffled(index: Index, source: Place, out: Path, seed: int, shard_bytes: int, chunk_bytes: int) -> Index:
    if index.pairs is not None:
        raise ValueError(f"{source} is a list of pairs, which is not trained on: its order is no matter")
    order = np.random.Generator(np.random.Philox(seed_for("shuffle", seed))).permutation(index.num_samples)
    ends = np.cumsum(index.size[order], dtype=np.int64)
    chunk_of = np.empty(index.num_samples, np.int32)
    chunk_of[order] = (ends - 1) // chunk_bytes
    place = np.empty(index.num_samples, np.int64)  # of each sample in the new order
    place[order] = np.arange(index.num_samples)

    scratch = out.with_name(f"{out.name}.scratch")
    kept = scratch / f"{index.fingerprint[:16]}_{seed}_{chunk_bytes}"
    kept.mkdir(parents=True, exist_ok=True)
    firsts = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))
    own = [_as_written(*pair, place) for pair in zip(firsts[:-1], firsts[1:], strict=True)]
    for shard in tqdm(range(len(index.shards)), desc="first pass", unit=" shards", mininterval=1):
        if not (kept / str(shard)).exists():
            _write_scratch(index, shard, own[shard], kept / str(shard))

    made = write_shards(
        out,
        _in_order(index, order, chunk_of, own, kept),
        index.classes(),
        shard_bytes=shard_bytes,
        prepared=index.prepared | {"kind": "shuffle", "source": one_line(source), "seed": seed},
        total=index.num_samples,
        arrays={name: values[order] for name, values in index.extra.items()},
    )
    shutil.rmtree(scratch)
    return made


def _as_written(first: int, stop: int, place: np.ndarray) -> np.ndarray:
    """A shard's samples as its scratch file has them: by chunk, and by their place in the new order."""
    samples = np.arange(first, stop)
    return samples[np.argsort(place[samples])]  # chunks are runs of places


def _write_scratch(index: Index, shard: int, samples: np.ndarray, to: Path) -> None:
    descriptor = index.open_shard(shard)
    partial = to.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            for sample in samples.tolist():
                data = os.pread(descriptor, int(index.size[sample]), int(index.offset[sample]))
                if len(data) != index.size[sample] or not index.intact(sample, data):
                    raise ValueError(
                        f"{index.shard_of(sample)}: sample {index.described(sample)} is not what was prepared: its "
                        "CRC32 is another; copy the shard again, or prepare the data set again"
                    )
                file.write(data)
    finally:
        os.close(descriptor)
    partial.rename(to)


def _in_order(
    index: Index, order: np.ndarray, chunk_of: np.ndarray, own: list[np.ndarray], kept: Path
) -> Iterator[Sample]:
    """The samples in the new order. One chunk of images is in memory."""
    ends = [np.concatenate([[0], np.cumsum(index.size[samples], dtype=np.int64)]) for samples in own]
    chunks = chunk_of[order]
    bounds = np.searchsorted(chunks, np.arange(chunks[-1] + 2))
    for chunk, (first, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        images: dict[int, bytes] = {}
        for shard, samples in enumerate(own):
            rows = slice(*np.searchsorted(chunk_of[samples], [chunk, chunk + 1]))
            if rows.start == rows.stop:
                continue
            with open(kept / str(shard), "rb") as file:
                file.seek(int(ends[shard][rows.start]))
                for sample in samples[rows].tolist():
                    images[sample] = file.read(int(index.size[sample]))
        for sample in order[first:stop].tolist():
            data = images.pop(sample)
            yield Sample(data, kind_of(data), int(index.label[sample]), index.name(sample))
