"""Shards behind URLs and compressed ones: read as the plain files are, whatever the server and the cache do."""

import gzip
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import zstandard

from partial_fc import checkpoint, storage
from partial_fc.benchmark.index import benchmark_index
from partial_fc.benchmark.stream import benchmark_stream
from partial_fc.data import remote
from partial_fc.data.ahead import upcoming
from partial_fc.data.groups import Groups
from partial_fc.data.order import Order
from partial_fc.data.reader import Batch, ReadError, _Samples, images_in_order, loader
from partial_fc.data.remote import Cache, Fetches
from partial_fc.data.shards import Index, Sample, load_index, verify, write_shards
from partial_fc.doctor.speed import stores
from partial_fc.prepare.shuffle import prepare_shuffled
from partial_fc.prepare.tar_places import shard_places
from partial_fc.prepare.tars import prepare_index
from tests.conftest import run_ranks
from tests.http_store import Store, serving
from tests.s3_server import BUCKET, s3  # noqa: F401 - a fixture
from tests.test_prepare_tars import image, write
from tests.test_train import begin, checksums, curve, finish, rows, train_here, wait_for, wait_for_step

SHARDS, SAMPLES = 5, 6  # of each


@pytest.fixture
def tars(tmp_path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for n in range(SHARDS):
        members = [
            (f"{n}{i}.{end}", d) for i in range(SAMPLES) for end, d in (("png", image(9 * n + i)), ("cls", b"%d" % i))
        ]
        write(folder / f"{n}.tar", members)
    return folder


@pytest.fixture
def store(tars, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.01, 0.02))
    with serving(tars) as found:
        yield found


def cached(folder: Path, shards: int | None = None, bytes_each: int = 0) -> Cache:
    return Cache(folder, None if shards is None else shards * bytes_each)


def read(index: Index, workers: int = 0, steps: int = 9) -> Iterable[Batch]:
    order = Order(index.samples_per_shard, 6, 2, 0, 6)
    options = dict(rank=0, world_size=1, seed=0, start_step=0, stop_step=steps, prefetch=2, flip=True, affine=None)
    return loader(index, order, workers=workers, **options)


def batches(index: Index, workers: int = 0, steps: int = 9) -> list[tuple]:
    return [(batch.images, batch.labels, batch.step, batch.bad) for batch in read(index, workers, steps)]


def assert_equal(found: list[tuple], wanted: list[tuple]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2:] == other[2:]


def compress(file: Path, kind: str) -> Path:
    data = file.read_bytes()
    ending = {"zst": ".tar.zst", "tgz": ".tgz"}.get(kind, ".tar.gz")
    packed = file.with_name(file.name.removesuffix(".tar") + ending)
    if kind == "two members":  # as pigz or cat make them
        packed.write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))
    else:
        packed.write_bytes(zstandard.compress(data) if kind == "zst" else gzip.compress(data))
    file.unlink()
    return packed


@pytest.mark.parametrize("kind", ["gz", "tgz", "zst", "two members"])
def test_compressed_shards_are_read_as_plain_ones(tars, tmp_path, kind):
    plain = prepare_index(str(tars), tmp_path / "plain", workers=1)
    wanted = batches(plain)
    sums = [shard.sha256 for shard in plain.shards]
    plain_tars = [file.read_bytes() for file in sorted(tars.glob("*.tar"))]
    packed = [compress(file, kind) for file in sorted(tars.glob("*.tar"))]
    prepare_index(str(tars), tmp_path / "packed", workers=1)
    index = load_index(tmp_path / "packed", cache=Cache(tmp_path / "cache"))
    assert_equal(batches(index), wanted)
    verify(index)
    assert [shard.compression for shard in index.shards] == ["zstd" if kind == "zst" else "gzip"] * SHARDS
    assert [index.cache.path(shard).read_bytes() for shard in index.shards] == plain_tars
    assert index.num_samples == plain.num_samples and len(sums) == SHARDS
    for name in ("label", "offset", "size", "shard", "crc32"):
        assert np.array_equal(getattr(index, name), getattr(plain, name))
    os.truncate(packed[0], packed[0].stat().st_size - 1)
    with pytest.raises(ValueError, match="has .* bytes, the index says"):
        load_index(tmp_path / "packed")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda data: data[:-9], "is no whole tar: it is no whole gzip file: Compressed file ended before"),
        (lambda data: data + b"more", "is no whole gzip file: Not a gzipped file"),
        (lambda data: data[:20] + b"\0" + data[21:], "rror -3 while decompressing"),
        (lambda data: gzip.compress(bytes(1 << 27)), "unpacks to more than .* 200 times its own"),
        (lambda data: b"<html>", "begins like a page of HTML"),
    ],
)
def test_a_damaged_gzip_and_a_bomb_are_named(tars, tmp_path, spoil, said):
    packed = compress(tars / "2.tar", "gz")
    packed.write_bytes(spoil(packed.read_bytes()))
    with pytest.raises(ValueError, match=f"2.tar.gz is no whole tar: .*{said.removeprefix('is no whole tar: ')}"):
        prepare_index(str(packed), tmp_path / "out", workers=1)


def remote_index(store: Store, tmp_path: Path, cache: Cache | None = None) -> Index:
    prepare_index(f"{store.url}/{{0..{SHARDS - 1}}}.tar", tmp_path / "remote", workers=1)
    store.asked.clear()
    return load_index(tmp_path / "remote", cache=cache or Cache(tmp_path / "cache"))


def test_shards_behind_urls_are_read_as_files_are(store, tars, tmp_path):
    wanted = batches(prepare_index(str(tars), tmp_path / "plain", workers=1))
    index = remote_index(store, tmp_path)
    assert not list(index.path.glob("*.tar")) and index.shards[1].url == f"{store.url}/1.tar"
    assert_equal(batches(index), wanted)
    assert sorted(store.asked) == [f"{n}.tar" for n in range(SHARDS)]  # each once
    verify(index)
    assert index.key(7) == "11" and index.described(7) == "11 (11.png)"
    (tars / "list.json").write_text('{"shardlist": [{"url": "0.tar"}, {"url": "https://other/1.tar"}]}')
    assert shard_places(f"{store.url}/list.json") == [f"{store.url}/0.tar", "https://other/1.tar"]
    with pytest.raises(ValueError, match="got the shard ftp://host/a.tar, wanted a path, or a URL of http"):
        shard_places("ftp://host/a.tar")


STALL = pytest.param("stall", marks=pytest.mark.slow)  # waits for nothing to come
FAULTS = [500, "reset", "short", STALL, "wrong", "page", (429, 0.01), (503, 0)]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_a_server_does_once_is_made_good(store, tars, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(storage, "SILENCE", 1 if fault == "stall" else 60)
    index = remote_index(store, tmp_path)
    faulty = range(1 if fault == "stall" else SHARDS)  # each waits its time
    for n in faulty:
        store.faults[f"{n}.tar"] = [fault]
    assert [index.cache.path(shard).exists() for shard in index.shards] == [False] * SHARDS
    for n, shard in enumerate(index.shards):
        os.close(index.open_shard(n))
        assert index.cache.path(shard).read_bytes() == (tars / f"{n}.tar").read_bytes()
        assert store.asked.count(f"{n}.tar") == 1 + (n in faulty)
    assert sorted(path.name for path in index.cache.folder.iterdir()) == sorted(
        ["locks", *(f"{shard.sha256}.tar" for shard in index.shards)]
    )


@pytest.mark.parametrize(
    "fault, said",
    [
        (500, "tried 4 times: ClientResponseError: 500"),
        ("short", "tried 4 times: ClientPayloadError"),
        pytest.param("stall", "tried 4 times: .*Timeout", marks=pytest.mark.slow),
        ("wrong", "damaged or has changed: its sha256 is .*, the index says .* at each of 2 downloads"),
        ("page", "damaged or has changed: it has 23 bytes, the index says"),
        (404, "cannot read http.*0.tar"),
        (403, "cannot read http.*0.tar, tried .*403"),
        ((429, 1e9), "cannot read http.*0.tar, tried 1 times: .*429"),
    ],
    ids=str,
)
def test_what_a_server_does_always_is_an_error_that_names_the_shard(store, tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(storage, "SILENCE", 0.2)
    index = remote_index(store, tmp_path)
    store.faults = {f"{n}.tar": [fault] * 99 for n in range(SHARDS)}
    with pytest.raises(
        ReadError, match=f"cannot read .* of http://127.*.tar after 1 try: .*{said.replace('0.tar', '')}"
    ):
        batches(index)
    assert not list(index.cache.folder.glob("*.tar"))


def test_a_token_goes_to_the_hub_and_not_to_the_host_that_it_sends_to(store, tars, tmp_path, monkeypatch):
    with serving(tars) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        hub.faults = {"datasets/a/b/resolve/main/0.tar": [("to", f"{store.url}/0.tar?signed=1")] * 2}
        storage.download(f"{hub.url}/datasets/a/b/resolve/main/0.tar", tmp_path / "0.tar")
        assert (tmp_path / "0.tar").read_bytes() == (tars / "0.tar").read_bytes()
        assert hub.tokens == ["Bearer hf_secret"] and store.tokens == [None]
        storage.download(f"{store.url}/1.tar", tmp_path / "1.tar")
        assert store.tokens == [None, None]
        # a signed URL that has expired: the index has the hub's, which gives a new one
        store.faults = {"0.tar": [403]}
        hub.faults = {"datasets/a/b/resolve/main/0.tar": [("to", f"{store.url}/0.tar")] * 2}
        storage.download(f"{hub.url}/datasets/a/b/resolve/main/0.tar", tmp_path / "again.tar")
        assert hub.asked.count("datasets/a/b/resolve/main/0.tar") == 3


# ---- the cache


def test_a_cache_smaller_than_an_epoch_holds_its_limit_and_changes_nothing(store, tars, tmp_path):
    wanted = batches(prepare_index(str(tars), tmp_path / "plain", workers=1))
    size = (tars / "0.tar").stat().st_size
    index = remote_index(store, tmp_path, Cache(tmp_path / "cache", 2 * size))
    assert_equal(batches(index), wanted)
    assert sum(count for _, count in remote.sizes(index.cache.folder, "*.tar")) <= 2 * size  # others still come and go
    assert len(store.asked) > SHARDS


def test_the_copy_opened_longest_ago_goes_first_and_stays_readable(store, tars, tmp_path):
    size = (tars / "0.tar").stat().st_size
    index = remote_index(store, tmp_path, Cache(tmp_path / "cache", 2 * size))
    held = [index.open_shard(0), index.open_shard(1)]
    os.utime(index.cache.path(index.shards[1]), (1, 1))
    held.append(index.open_shard(2))
    assert [index.cache.holds(shard) for shard in index.shards] == [True, False, True, False, False]
    assert os.pread(held[1], size, 0) == (tars / "1.tar").read_bytes()
    for descriptor in held:
        os.close(descriptor)
    small = Cache(tmp_path / "small", size - 1)
    with pytest.raises(
        ValueError, match=f"may hold {size - 1:,} bytes, and one shard takes {size:,}: raise data.cache"
    ):
        small.open(index.shards[0], index.source(0))


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_counted(store, tars, tmp_path):
    size = (tars / "0.tar").stat().st_size
    index = remote_index(store, tmp_path, Cache(tmp_path / "cache", 2 * size))
    locks, killed, other = index.cache.folder / "locks", "0" * 64, "1" * 64
    locks.mkdir(parents=True)
    for name in (killed, other):
        (locks / name).write_text(str(size))
        (index.cache.folder / f"{name}.partial").write_bytes(b"begun")
    with remote.locked(locks / other) as lock:
        lock.write(str(size))
        lock.flush()
        os.close(index.open_shard(0))
        os.close(index.open_shard(1))  # beside the other one there is room for one
        assert [index.cache.holds(shard) for shard in index.shards[:2]] == [False, True]
    assert not (index.cache.folder / f"{killed}.partial").exists()
    assert (index.cache.folder / f"{other}.partial").exists()


def test_many_that_want_one_shard_fetch_it_once(store, tmp_path):
    index = remote_index(store, tmp_path)
    ready = threading.Barrier(8)

    def opened(n: int) -> bytes:
        ready.wait()
        descriptor = index.open_shard(n % 2)
        try:
            return os.pread(descriptor, 1 << 20, 0)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(opened, range(8)))) == 2
    assert sorted(store.asked) == ["0.tar", "1.tar"]


@pytest.mark.slow
def test_a_stopped_process_that_holds_a_shard_or_the_room_is_an_error(store, tars, tmp_path, monkeypatch):
    """And one that writes on is waited for."""
    monkeypatch.setattr(remote, "STANDSTILL", 0.3)
    size = (tars / "0.tar").stat().st_size
    index = remote_index(store, tmp_path, Cache(tmp_path / "cache", 2 * size))
    locks, partial = index.cache.folder / "locks", index.cache.folder / "another.partial"
    with remote.locked(locks / index.shards[0].sha256):
        with pytest.raises(OSError, match=r"another process holds .*locks/\w+, and has fetched nothing for 0 s"):
            index.open_shard(0)

        def write() -> None:
            for _ in range(12):
                with partial.open("ab") as file:
                    file.write(b"more")
                time.sleep(0.08)

        writing = threading.Thread(target=write)
        began = time.monotonic()
        writing.start()
        with pytest.raises(OSError, match="another process holds"):
            index.open_shard(0)
        assert time.monotonic() - began > 0.8
        writing.join()
    with remote.locked(locks / "another") as lock:
        lock.write(str(2 * size))
        lock.flush()
        with pytest.raises(OSError, match="another process holds .*cache, and has fetched nothing"):
            index.open_shard(0)
    os.close(index.open_shard(0))


def test_a_copy_that_has_gone_bad_is_fetched_again(store, tars, tmp_path):
    wanted = batches(prepare_index(str(tars), tmp_path / "plain", workers=1))
    index = remote_index(store, tmp_path)
    batches(index)
    for shard in index.shards:
        path = index.cache.path(shard)
        path.chmod(0o600)
        path.write_bytes(bytes(path.stat().st_size))
    assert_equal(batches(index), wanted)


def test_a_disk_that_is_full_is_named(store, tmp_path, monkeypatch):
    index = remote_index(store, tmp_path)

    def full(url: str, path: Path) -> None:
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    monkeypatch.setattr(storage, "download", full)
    with pytest.raises(ReadError, match=r"cannot keep a shard in the cache .*/cache: .*No space left.*data.cache_dir"):
        batches(index)


def test_shards_come_into_view_before_they_are_needed_and_not_too_many():
    counts = np.full(40, 50)
    shard = np.repeat(np.arange(40), 50)
    order = Order(counts, 40, 4, 3, 100)
    own, steps = slice(10, 30), range(7, 120)
    asked = {}
    for most, behind in ((4, 0), (9, 0), (1000, 0), (1000, 30)):
        view: dict[int, int] = {}
        asked[most, behind] = 0
        for step, new in zip(steps, upcoming(order, shard, own, steps, most, behind), strict=True):
            asked[most, behind] += len(new)
            needed = set(shard[order.batch(step)[own]].tolist())
            view |= dict.fromkeys(new, step)
            assert needed <= view.keys()
            assert len(new) <= max(most, len(needed))
        horizon = 100 * 4 // 40
        if most == 1000:  # all that the next window needs
            later = set(shard[np.concatenate([order.batch(s)[own] for s in range(7, 7 + horizon)])].tolist())
            assert later <= set(next(upcoming(order, shard, own, steps, most)))
    assert asked[1000, 30] < asked[1000, 0]  # what readers may still need stays in view


def test_the_cache_of_a_user_and_of_one_without_a_home(tmp_path, monkeypatch):
    for name in ("PARTIAL_FC_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert remote.default_folder() == Path(tempfile.gettempdir()) / "partial_fc"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remote.default_folder() == tmp_path / ".cache" / "partial_fc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert remote.default_folder() == tmp_path / "x" / "partial_fc"
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "own"))
    assert remote.default_folder() == tmp_path / "own"


# ---- a data set behind a URL


@pytest.fixture
def prepared(tmp_path) -> Path:
    samples = [Sample(image(i), "png", i % 3, f"{i}.png") for i in range(30)]
    write_shards(tmp_path / "set", samples, list("abc"), prepared={"image_size": [8, 8]}, shard_bytes=20_000)
    return tmp_path / "set"


def test_a_data_set_behind_a_url_is_the_folder_that_was_copied_there(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    here = load_index(prepared)
    with serving(tmp_path) as store:
        there = load_index(f"{store.url}/set")
        assert there.fingerprint == here.fingerprint and there.classes() == here.classes()
        assert there.elsewhere().startswith(f"4 of 4 shards are behind {store.url}: 0 of the copies, 0.0 GiB in all")
        assert_equal(batches(there, steps=5), batches(here, steps=5))
        verify(there)
        assert ": 4 of the copies" in there.elsewhere() and not here.elsewhere()
        asked = len(store.asked)
        load_index(f"{store.url}/set")
        assert set(store.asked[asked:]) == {"set/index.json"}  # the rest is there
        with pytest.raises(FileNotFoundError, match=f"{store.url}/none is no data set: it has no index.json"):
            load_index(f"{store.url}/none")
        shutil.rmtree(tmp_path / "cache")
        store.faults = {"set/index/offset.npy": ["wrong"]}
        with pytest.raises(ValueError, match=f"{store.url}/set/index/offset.npy is damaged: its sha256 is"):
            load_index(f"{store.url}/set")


@pytest.mark.slow
def test_a_bucket_and_the_hub_name_their_shards(prepared, tars, tmp_path, s3, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    for folder in (tars, prepared):
        for file in filter(Path.is_file, folder.rglob("*")):
            storage.upload(file, f"{BUCKET}/{folder.name}/{file.relative_to(folder)}")
    here = load_index(prepared)
    assert_equal(batches(load_index(f"{BUCKET}/set"), steps=5), batches(here, steps=5))
    names = [f"{BUCKET}/tars/{n}.tar" for n in range(SHARDS)]
    ways = ("tars", "tars/", "tars/*.tar", f"t*/{{0..{SHARDS - 1}}}.tar", f"tars/{{0..{SHARDS - 1}}}.tar")
    assert all(shard_places(f"{BUCKET}/{way}") == names for way in ways)
    wanted = batches(prepare_index(str(tars), tmp_path / "plain", workers=1))
    # several processes, forked from one that has spoken to the bucket
    assert_equal(batches(prepare_index(f"{BUCKET}/tars", tmp_path / "in place", workers=2)), wanted)

    commit, names = "c" * 40, [f"{n}.tar" for n in range(SHARDS)]
    with serving(tars) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_file_system.HfFileSystem.cachable", False)
        files = [{"type": "file", "path": n, "size": (tars / n).stat().st_size, "oid": "1" * 40} for n in names]
        about = {"_id": "1", "id": "a/faces", "sha": commit, "private": False, "disabled": False, "gated": False}
        more = {"downloads": 0, "likes": 0, "tags": [], "siblings": []}
        hub.answers = {"api/datasets/a/faces/tree/": files, "api/datasets/a/faces": about | more}
        for n in names:
            hub.faults[f"datasets/a/faces/resolve/{commit}/{n}"] = [("to", f"{hub.url}/{n}")] * 9
        index = prepare_index("hf://datasets/a/faces", tmp_path / "hub", workers=1)
        assert [shard.url for shard in index.shards] == [f"hf://datasets/a/faces@{commit}/{n}" for n in names]
        assert_equal(batches(index), wanted)


def test_a_set_is_shuffled_from_bucket_to_bucket(prepared, tmp_path, s3, monkeypatch):  # noqa: F811
    """Killed in the middle of its upload, it goes on at the file where it was."""
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    for file in filter(Path.is_file, prepared.rglob("*")):
        storage.upload(file, f"{BUCKET}/ordered/{file.relative_to(prepared)}")
    wanted = prepare_shuffled(prepared, tmp_path / "here", seed=5, shard_bytes=4000)
    options = dict(seed=5, shard_bytes=4000, scratch=tmp_path / "scratch")
    sent, upload = [], storage.upload

    def killed_at_the_third(path: Path, url: str) -> None:
        sent.append(url)
        if len(sent) == 3:
            raise KeyboardInterrupt
        upload(path, url)

    monkeypatch.setattr(storage, "upload", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_shuffled(f"{BUCKET}/ordered", f"{BUCKET}/shuffled", **options)
    with pytest.raises((OSError, ValueError), match="shuffled"):
        load_index(f"{BUCKET}/shuffled")
    made = prepare_shuffled(f"{BUCKET}/ordered", f"{BUCKET}/shuffled", **options)
    assert len(sent) == len(set(sent)) + 1 and sent[-1].endswith("index.json")
    assert [shard.sha256 for shard in made.shards] == [shard.sha256 for shard in wanted.shards] and len(made.shards) > 1
    assert made.prepared["source"] == f"{BUCKET}/ordered" and not list((tmp_path / "scratch").iterdir())
    assert_equal(batches(made, steps=3), batches(wanted, steps=3))
    with pytest.raises(FileExistsError, match="shuffled exists: delete it, or choose another URL"):
        prepare_shuffled(f"{BUCKET}/ordered", f"{BUCKET}/shuffled", **options)


# ---- samples alone, by ranges


def test_few_samples_of_large_shards_are_read_alone(store, tars, tmp_path):
    """What the server does is made good or named as for shards; a shard that is used up is fetched whole."""
    for n in range(SHARDS):
        names = [f"{n}-{i:02d}" for i in range(20)]
        write(tars / f"{n}.tar", [(f"{name}.{e}", d) for name in names for e, d in (("png", image(n)), ("cls", b"0"))])
    index = remote_index(store, tmp_path)
    samples = np.arange(SHARDS) * 20
    store.faults = {"0.tar": [500], "1.tar": ["reset"], "2.tar": ["wrong"], "3.tar": ["whole"]}
    (batch,) = images_in_order(index, samples, SHARDS, workers=0)
    wanted = [cv2.imdecode(np.frombuffer(image(n), np.uint8), cv2.IMREAD_COLOR_RGB) for n in range(SHARDS)]
    assert torch.equal(batch.images, torch.from_numpy(np.stack(wanted)).permute(0, 3, 1, 2))
    assert not list(index.cache.folder.glob("*.tar"))
    for fault, said in (
        (404, "cannot read .*0.tar"),
        ("whole", "got .*: does the server send ranges"),
        (500, "tried 4"),
    ):
        store.faults = {"0.tar": [fault] * 99}
        with pytest.raises(ReadError, match=said):
            list(images_in_order(index, samples, SHARDS, workers=0))
    store.faults = {"0.tar": ["wrong"] * 99}
    with pytest.raises(ValueError, match="0-00.png.* has changed in .*0.tar since it was prepared"):
        list(images_in_order(index, samples, SHARDS, workers=0))
    store.faults = {}
    for n in range(SHARDS):
        os.close(index.open_shard(n))
    store.asked.clear()
    list(images_in_order(index, samples, SHARDS, workers=0))
    assert store.asked == []  # the copies are there


def test_samples_of_several_hosts_are_asked_of_each(store, tars, tmp_path):
    with serving(tars) as other:
        index = remote_index(store, tmp_path)
        shards = [
            s.model_copy(update={"url": f"{other.url}/{n}.tar"}) if n % 2 else s for n, s in enumerate(index.shards)
        ]
        mixed = replace(index, shards=shards)
        order = np.arange(0, SHARDS * SAMPLES, 4)
        found = _Samples(mixed, 0, False, None, ranges=True)._read_alone(order)
        assert found == [index.read(sample) for sample in order.tolist()] and sorted(set(other.asked)) == [
            "1.tar",
            "3.tar",
        ]
        other.faults = {"3.tar": [404] * 9}
        with pytest.raises(ReadError, match=f"cannot read {other.url}.*3.tar"):
            _Samples(mixed, 0, False, None, ranges=True)._read_alone(order)


@pytest.mark.slow
def test_groups_read_samples_alone_where_the_cache_does_not_hold_all_shards(store, tars, tmp_path):
    plain = prepare_index(str(tars), tmp_path / "plain", workers=1)
    size = (tars / "0.tar").stat().st_size
    index = remote_index(store, tmp_path, Cache(tmp_path / "cache", 2 * size))

    def read(index: Index) -> list[tuple]:
        order = Groups(Order(index.samples_per_shard, 4, 2, 0, 6), index.label, 2)
        options = dict(rank=0, world_size=1, seed=0, start_step=0, stop_step=6, prefetch=2, flip=True, affine=None)
        return [(b.images, b.labels, b.step, b.bad) for b in loader(index, order, workers=0, **options)]

    assert_equal(read(index), read(plain))
    assert not list(index.cache.folder.glob("*.tar"))
    assert_equal(read(replace(index, cache=Cache(tmp_path / "large"))), read(plain))
    assert len(list((tmp_path / "large").glob("*.tar"))) == SHARDS


# ---- training


@pytest.mark.slow
def test_a_run_is_the_same_from_a_folder_and_from_behind_a_url(glyphs_ci, tmp_path):
    """Killed in the middle of a download, it goes on at another number of ranks; the cache holds a part of an epoch."""
    made = load_index(glyphs_ci / "train")
    samples = (Sample(made.read(i), "png", int(made.label[i])) for i in range(2000))
    write_shards(tmp_path / "set", samples, made.classes(), prepared=made.prepared, shard_bytes=600_000)
    here = load_index(tmp_path / "set")
    assert len(here.shards) > 6
    short = ("evaluate.sets={}", "run.steps=24")
    options = ("data.shuffle_window=96", "data.streams=2", "data.global_batch_size=48", *short)
    run_ranks(train_here, 2, tmp_path / "whole", tmp_path / "set", *options)

    late = next(  # a shard that is first needed at steps 13 to 16
        here.shards[one].name
        for one in range(len(here.shards))
        if first_step(here, one, batch=48, window=96) in range(13, 17)
    )
    there = ("data.cache_dir=" + str(tmp_path / "cache"), f"data.cache_bytes={5 * 600_000}")
    with serving(tmp_path) as store:
        store.faults = {f"set/{late}": ["stall"]}
        process = begin(2, tmp_path / "there", f"data.train={store.url}/set", *there, *options)
        wait_for_step(tmp_path / "there", 12, process)
        wait_for(lambda: f"set/{late}" in store.asked and any((tmp_path / "cache").glob("*.partial")), process)
        process.kill()
        finish(process, code=None)
        assert checkpoint.find_latest(tmp_path / "there").step == 10
        shutil.copytree(tmp_path / "there", tmp_path / "here")
        run_ranks(train_here, 1, tmp_path / "there", f"{store.url}/set", *there, *options)
    run_ranks(train_here, 1, tmp_path / "here", tmp_path / "set", *options)
    assert curve(tmp_path / "there") == curve(tmp_path / "here")
    row, *others = rows(tmp_path / "there")[-14:]  # of the resumed run
    assert row["step"] == 11 and row["first_batch"] > 0 and all("first_batch" not in other for other in others)
    fetched = sum(one["data.fetched_shards"] for one in (row, *others))
    assert 0 < fetched * 500_000 < sum(one["data.fetched_bytes"] for one in (row, *others))
    assert {"data.cache_hits", "data.fetched_bytes"} <= row.keys() - rows(tmp_path / "here")[-1].keys()
    assert curve(tmp_path / "there")[:10] == curve(tmp_path / "whole")[:10]


def test_a_copy_that_was_cut_short_is_fetched_again(store, tars, tmp_path):
    """As by a power loss: it would end every run of this machine."""
    wanted = batches(load_index(prepare_index(str(tars), tmp_path / "plain", workers=1).path))
    index = remote_index(store, tmp_path)
    assert_equal(batches(index), wanted)
    for shard in index.shards[1:3]:
        os.truncate(index.cache.path(shard), 100)
    assert_equal(batches(load_index(index.path, cache=index.cache)), wanted)


def test_a_lock_ends_with_its_block_whatever_was_forked_meanwhile(tmp_path):
    with remote.locked(tmp_path / "lock") as lock:
        other = os.dup(lock.fileno())  # as a forked process has it
    with remote.locked(tmp_path / "lock"):
        pass
    os.close(other)


def test_verify_names_a_damaged_shard_and_one_that_is_gone(store, tars, tmp_path):
    index = remote_index(store, tmp_path)
    (tars / "0.tar").write_bytes(b"changed")
    (tars / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"(?s)0.tar is damaged: it has 7 bytes.*cannot read .*1.tar"):
        verify(index)


def test_a_pattern_of_any_depth_is_refused_in_a_store():
    with pytest.raises(ValueError, match="wanted one without \\*\\*: name each folder"):
        shard_places("memory://bucket/**/a.tar")


def test_readers_tell_what_they_asked_the_cache_for(store, tars, tmp_path):
    index = remote_index(store, tmp_path)
    sizes = [(tars / f"{n}.tar").stat().st_size for n in range(SHARDS)]
    for n in (0, 1, 1):
        os.close(index.open_shard(n))
    assert index.cache.asked() == Fetches(found=1, fetched=2, bytes=sizes[0] + sizes[1])
    assert index.cache.asked() == Fetches()
    total = Fetches()
    for batch in read(index):
        total = total.plus(batch.fetches)
    assert total.fetched == SHARDS - 2 and total.found >= 2 and total.bytes == sum(sizes[2:])


def test_the_doctor_measures_the_stores(store, tars, tmp_path):
    index = remote_index(store, tmp_path)
    found = stores(index)
    assert found.level == "ok" and re.fullmatch(
        rf"{store.url}: \d+ ms a request, [\d,.]+ MB/s in {min(SHARDS, 4)} at once; the .* that are not in the cache "
        r"take \d+\.\d minutes",
        found.text,
    )
    for n in range(SHARDS):
        os.close(index.open_shard(n))
    assert stores(index).text.endswith("at once")
    store.faults["0.tar"] = ["whole"] * 50
    found = stores(index)
    assert found.level == "warning" and "does the server send ranges?" in found.text


@pytest.mark.slow
def test_an_epoch_fetches_each_shard_once(capsys):
    """What the benchmark counts; its times are no matter here."""
    found = benchmark_stream(
        samples=900, shard_mb=1, mb_per_second=500, latency=0, use=0.9, batch=30, streams=3, workers=0
    )
    assert 1 <= found["fetched"] < 1.1 and 0 <= found["waiting"] <= 1
    assert f"{found['fetched']:.3f} bytes fetched for each byte used" in capsys.readouterr().out


@pytest.mark.slow
def test_a_large_index_is_opened_and_drawn_from(capsys):
    """What the benchmark prints; its numbers are no matter here."""
    found = benchmark_index(samples=30_000, classes=500, shards=20, batch=64)
    assert set(found) == {"open", "checksum", "batch", "worker"} and min(found.values()) >= 0
    assert "30,000 samples of 500 identities in 20 shards: opened in" in capsys.readouterr().out


def first_step(index: Index, shard: int, *, batch: int, window: int) -> int:
    order = Order(index.samples_per_shard, batch, 2, 0, window)
    return next(step for step in count() if shard in index.shard[order.batch(step)])


def train_there(environment: dict[str, str], *arguments: object) -> bool:
    os.environ.update(environment)  # of the rank's process, which may have begun before
    return train_here(*arguments)


@pytest.mark.soak("storage")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_set_its_copy_on_s3_and_its_tars_indexed_in_place_are_one_run(glyphs_ci, tmp_path, s3, world_size):  # noqa: F811
    """The demo's letters, in shards: losses, batches and checkpoints are equal bit for bit; the S3 run is resumed."""
    made = load_index(glyphs_ci / "train")
    samples = (Sample(made.read(i), "png", int(made.label[i])) for i in range(made.num_samples))
    write_shards(tmp_path / "set", samples, made.classes(), prepared=made.prepared, shard_bytes=1_000_000)
    for file in filter(Path.is_file, (tmp_path / "set").rglob("*")):
        storage.upload(file, f"{BUCKET}/set{world_size}/{file.relative_to(tmp_path / 'set')}")
    prepare_index(f"{BUCKET}/set{world_size}/*.tar", tmp_path / "in place", workers=2)
    to_s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    sources = {"folder": tmp_path / "set", "s3": f"{BUCKET}/set{world_size}", "place": tmp_path / "in place"}
    for name, source in sources.items():
        cache = (f"data.cache_dir={tmp_path}/cache of {name}", "data.cache_bytes=6000000")  # of 17 MB
        for steps in (100, 200) if name == "s3" else (200,):
            options = (*cache, "data.streams=4", "data.shuffle_window=512", "evaluate.sets={}", f"run.steps={steps}")
            run_ranks(train_there, world_size, to_s3, tmp_path / name, source, *options, "optim.schedule=constant")
    wanted = curve(tmp_path / "folder")
    assert len(wanted) == 200 and curve(tmp_path / "s3") == curve(tmp_path / "place") == wanted
    states = {name: checksums(tmp_path / name) for name in sources}
    assert states["s3"] == states["folder"]
    assert states["place"].pop("classes.txt") != states["folder"].pop("classes.txt")  # its names are the labels
    assert states["place"] == states["folder"]
    fetched = [row["data.fetched_shards"] for row in rows(tmp_path / "place")]
    assert sum(fetched[100:]) > 0, "the cache holds all"
