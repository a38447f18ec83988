"""`prepare shuffle`: the same samples, in a random order that depends on the seed alone."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from partial_fc.data.shards import Index, Sample, load_index, verify, write_shards
from partial_fc.prepare import shuffle
from partial_fc.prepare.shuffle import prepare_shuffled
from tests.http_store import serving
from tests.test_prepare_tars import image

N, CLASSES = 120, 12


@pytest.fixture
def ordered(tmp_path) -> Path:
    """Shards in order of identity."""
    kinds = ["png", "jpg"] * (N // 2)
    samples = (Sample(image(i, kind), kind, i * CLASSES // N, f"ä/{i}") for i, kind in enumerate(kinds))
    names = [f"person {i}" for i in range(CLASSES)]
    options = dict(prepared={"kind": "folder", "image_size": [8, 8]}, shard_bytes=30_000)
    write_shards(tmp_path / "ordered", samples, names, arrays={"quality": np.arange(N) / 7}, **options)
    return tmp_path / "ordered"


def rows(index: Index) -> list[tuple]:
    return [(index.read(i), int(index.label[i]), index.name(i), index.extra["quality"][i]) for i in range(N)]


def sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "index.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("chunk_bytes", [pytest.param(1, marks=pytest.mark.slow), 3000, 10**9])
def test_the_same_samples_in_random_order(ordered, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    before = load_index(ordered)
    after = prepare_shuffled(ordered, tmp_path / "out", seed=3, shard_bytes=25_000, chunk_bytes=chunk_bytes)
    verify(after)
    assert sorted(rows(after)) == sorted(rows(before)) and rows(after) != rows(before)
    assert after.classes() == before.classes() and after.prepared["image_size"] == [8, 8]
    assert np.abs(np.diff(after.label)).mean() > 2 > np.abs(np.diff(before.label)).mean()
    assert not (tmp_path / "out.scratch").exists()
    with serving(tmp_path) as store:
        there = prepare_shuffled(f"{store.url}/ordered", tmp_path / "there", seed=3, shard_bytes=25_000)
    assert sums(there.path) == sums(after.path)
    other = prepare_shuffled(ordered, tmp_path / "other", seed=4)
    assert rows(other) != rows(after) and sorted(rows(other)) == sorted(rows(after))


def test_it_goes_on_where_it_was_killed(ordered, tmp_path, monkeypatch):
    wanted = sums(prepare_shuffled(ordered, tmp_path / "wanted").path)
    written, write = [], shuffle._write_scratch

    def killed_at_the_third(index: Index, shard: int, *rest: object) -> None:
        written.append(shard)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(index, shard, *rest)

    monkeypatch.setattr(shuffle, "_write_scratch", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_shuffled(ordered, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sums(prepare_shuffled(ordered, tmp_path / "out").path) == wanted
    assert written == [0, 1, 2, *range(2, len(load_index(ordered).shards))]


def test_what_cannot_be_shuffled_is_named(ordered, tmp_path):
    index = load_index(ordered)
    with open(ordered / index.shards[1].name, "r+b") as file:
        file.seek(int(index.offset[index.samples_per_shard[0]]))
        file.write(b"something else")
    with pytest.raises(ValueError, match=r"shard-000001.tar: sample 0000000\d\d \(ä/\d+\) is not what was prepared"):
        prepare_shuffled(ordered, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists"):
        prepare_shuffled(ordered, tmp_path / "there")
    samples = [Sample(image(i), "png", i) for i in range(2)]
    pairs = dict(pairs=np.array([[0, 1, 1]]), prepared={"image_size": [8, 8]})
    write_shards(tmp_path / "pairs", samples, ["a", "b"], **pairs)
    with pytest.raises(ValueError, match="is a list of pairs"):
        prepare_shuffled(tmp_path / "pairs", tmp_path / "out")
