import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from partial_fc.config import Affine
from partial_fc.data import reader
from partial_fc.data.order import Order
from partial_fc.data.pixels import decode
from partial_fc.data.reader import Batch, ReadError, images_in_order, loader
from partial_fc.data.shards import Index, load_index, write_shards
from tests.processes import is_running, run_program

H, W = 12, 10
NUM_SAMPLES, NUM_CLASSES = 60, 7
AFFINE = Affine(degrees=10, translate=0.1, scale=0.1)


def pixels(i: int) -> np.ndarray:
    """(H, W, 3) RGB"""
    return np.random.default_rng(i).integers(0, 256, (H, W, 3), dtype=np.uint8)


def encoded(image: np.ndarray, extension: str = "png") -> bytes:
    return cv2.imencode(f".{extension}", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def make_index(folder: Path, replaced: dict[int, bytes] | None = None) -> Index:
    """60 PNG images in several shards; `replaced` gives other bytes to some."""
    replaced = replaced or {}
    samples = [(replaced.get(i, encoded(pixels(i))), "png", i % NUM_CLASSES, f"photo {i}") for i in range(NUM_SAMPLES)]
    classes = [str(c) for c in range(NUM_CLASSES)]
    prepared = {"image_size": [H, W]}
    return write_shards(folder / "set", samples, classes, shard_bytes=30_000, prepared=prepared)


def make_loader(index: Index, **changes):
    order = Order(index.samples_per_shard, 12, 4, seed=3, shuffle_window=8)
    options = {"rank": 0, "world_size": 1, "seed": 5, "start_step": 0, "stop_step": 8}
    options |= {"workers": 0, "prefetch": 2, "flip": True, "affine": AFFINE}
    return loader(index, order, **options | changes)


def assert_equal(got: list[Batch], wanted: list[Batch]) -> None:
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert (a.step, a.planned, a.bad) == (b.step, b.planned, b.bad)


def test_a_batch_holds_the_images_of_the_order(tmp_path):
    index = make_index(tmp_path)
    order = Order(index.samples_per_shard, 12, 4, seed=3, shuffle_window=8)
    batches = list(make_loader(index, flip=False, affine=None))
    assert [batch.step for batch in batches] == list(range(8))
    for batch in batches:
        samples = order.batch(batch.step)
        wanted = np.stack([pixels(i).transpose(2, 0, 1) for i in samples])
        np.testing.assert_array_equal(batch.images.numpy(), wanted)
        assert batch.labels.tolist() == [i % NUM_CLASSES for i in samples]
        assert batch.images.is_contiguous() and batch.images.dtype == torch.uint8
        assert batch.labels.dtype == torch.int64
        assert (batch.planned, batch.bad) == (12, [])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, workers):
    index = make_index(tmp_path, dict.fromkeys((3, 30), b"no image"))
    assert_equal(list(make_loader(index, workers=workers)), list(make_loader(index, workers=0)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_tail_of_the_run(tmp_path, workers):
    index = make_index(tmp_path)
    run = list(make_loader(index, stop_step=13))  # an epoch has 5 steps
    assert_equal(list(make_loader(index, start_step=6, stop_step=13, workers=workers)), run[6:])


@pytest.mark.parametrize("world_size", [2, 3, 5, 12])
def test_the_ranks_together_read_the_batch_of_one(tmp_path, world_size):
    """Augmented images included: they depend on the position in the global batch."""
    index = make_index(tmp_path)
    ranks = [list(make_loader(index, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for whole, *parts in zip(make_loader(index), *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert sum(part.planned for part in parts) == 12


def test_augmentation_differs_by_seed_step_and_position(tmp_path):
    index = make_index(tmp_path, {i: encoded(pixels(0)) for i in range(NUM_SAMPLES)})
    images = [batch.images for seed in (5, 6) for batch in make_loader(index, seed=seed, stop_step=3)]
    distinct = {image.numpy().tobytes() for image in torch.cat(images)}
    assert len(distinct) == 2 * 3 * 12


@pytest.mark.slow
def test_the_loader_leaves_the_random_state_alone(tmp_path):
    index = make_index(tmp_path)
    before = torch.get_rng_state()
    list(make_loader(index, workers=1, stop_step=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_can_be_iterated_twice_and_has_a_length(tmp_path):
    batches = make_loader(make_index(tmp_path), start_step=2)
    assert len(batches) == 6
    assert_equal(list(batches), list(batches))


BAD = {
    "empty": b"",
    "no image": b"no image",
    "cut short": encoded(pixels(0))[:-40],
    "cut short JPEG": encoded(pixels(0), "jpg")[:-40],
    "other size": encoded(np.zeros((W, H, 3), np.uint8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_shortens_its_batch_and_is_named(tmp_path, kind, workers):
    index = make_index(tmp_path, {17: BAD[kind]})
    order = Order(index.samples_per_shard, 12, 4, seed=3, shuffle_window=8)
    found = 0
    for batch in make_loader(index, workers=workers, flip=False, affine=None, stop_step=5):
        samples = [i for i in order.batch(batch.step) if i != 17]
        found += len(samples) == 11
        wanted = f"000000017 (photo 17) is no image of (height, width) ({H}, {W})"
        assert batch.bad == [wanted] * (12 - len(samples))
        assert batch.planned == 12
        assert batch.labels.tolist() == [i % NUM_CLASSES for i in samples]
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0].numpy(), [pixels(i)[0, 0, 0] for i in samples])
        assert batch.images.is_contiguous()
    assert found == 1


def test_a_sample_that_has_changed_is_left_out_and_named(tmp_path):
    """Another whole image in its place, which decodes: the label would be of somebody else."""
    index = make_index(tmp_path)
    other, size = encoded(pixels(99)), int(index.size[17])
    with Path(index.shard_of(17)).open("r+b") as file:
        file.seek(int(index.offset[17]))
        file.write((other + bytes(size))[:size])
    bad = [one for batch in make_loader(index, stop_step=5) for one in batch.bad]
    shard = Path(index.shard_of(17))
    assert bad == [f"000000017 (photo 17) has changed in {shard} since it was prepared: its CRC32 is another"]


def test_a_bad_sample_leaves_the_augmentation_of_the_others(tmp_path):
    good, bad = make_index(tmp_path / "a"), make_index(tmp_path / "b", {17: b"no image"})
    for a, b in zip(make_loader(good), make_loader(bad), strict=True):
        kept = [row for row in range(12) if not b.bad or a.images[row].tolist() in b.images.tolist()]
        assert len(kept) == 12 - len(b.bad)
        assert torch.equal(a.images[kept], b.images)


@pytest.mark.slow
def test_a_batch_of_bad_samples_has_no_rows(tmp_path):
    index = make_index(tmp_path, dict.fromkeys(range(NUM_SAMPLES), b"no image"))
    for workers in (0, 1):
        for batch in make_loader(index, workers=workers, rank=1, world_size=3, stop_step=2):
            assert batch.images.shape == (0, 3, H, W) and batch.images.dtype == torch.uint8
            assert batch.labels.shape == (0,) and batch.labels.dtype == torch.int64
            assert batch.planned == len(batch.bad) == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_after_loading_is_named_with_the_offset(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(reader, "RETRY_SECONDS", (0.01, 0.02, 0.03))
    index = make_index(tmp_path)
    last = np.flatnonzero(index.shard == 1)[-1]
    os.truncate(Path(index.shard_of(last)), index.offset[last] + 1)
    message = rf"at offset {index.offset[last]} of .*shard-000001.tar after 4 tries: got 1 of {index.size[last]}"
    with pytest.raises(ReadError, match=message):
        list(make_loader(index, workers=workers, stop_step=5))


def test_a_shard_removed_after_loading_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "RETRY_SECONDS", (0.01,))
    index = make_index(tmp_path)
    (index.path / index.shard_names[1]).unlink()
    with pytest.raises(ReadError, match="shard-000001.tar after 2 tries: .*No such file"):
        list(make_loader(index, stop_step=5))


def test_a_read_that_succeeds_at_a_later_try_is_no_error(tmp_path, monkeypatch):
    index = make_index(tmp_path)
    shard = index.path / index.shard_names[1]
    wanted = list(make_loader(index))
    shard.rename(tmp_path / "away")
    pauses = []

    def outage_ends(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            (tmp_path / "away").rename(shard)

    monkeypatch.setattr(reader.time, "sleep", outage_ends)
    assert_equal(list(make_loader(index)), wanted)
    assert tuple(pauses) == reader.RETRY_SECONDS[:2]


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_with_advice_and_not_a_hang(tmp_path):
    index = make_index(tmp_path)
    others = multiprocessing.active_children()  # the ranks of other tests
    batches = iter(make_loader(index, workers=2, stop_step=10_000))
    next(batches)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    os.kill(workers[0].pid, signal.SIGKILL)
    time.sleep(0.2)  # not here: an error in the midst of a step would be a traceback
    with pytest.raises(ReadError, match=r"killed \(SIGKILL\), .* lower data.workers or data.prefetch"):
        for _ in batches:
            pass


ENDING = """
import os, signal, sys
from pathlib import Path
from partial_fc.data.order import Order
from partial_fc.data.reader import loader
from partial_fc.data.shards import load_index
folder, how = Path(sys.argv[1]), sys.argv[2]
index = load_index(folder / "set")
order = Order(index.samples_per_shard, 12, 4, seed=3, shuffle_window=8)
options = {"seed": 5, "start_step": 0, "stop_step": 10_000, "flip": True, "affine": None}
batches = iter(loader(index, order, rank=0, world_size=1, workers=2, prefetch=2, **options))
next(batches)
readers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
(folder / "readers").write_text(" ".join(readers))
if how == "signals to readers":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        for reader in readers:
            os.kill(int(reader), number)
    for _ in range(20):
        next(batches)
elif how == "exception":
    raise RuntimeError("a bug in somebody's margin")
elif how == "exit":
    sys.exit("error: a save that failed")
elif how == "os._exit":
    os._exit(1)
else:
    os.kill(os.getpid(), signal.Signals[how])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, code",
    [("signals to readers", 0), ("exception", 1), ("exit", 1), ("os._exit", 1), ("SIGINT", 1), ("SIGKILL", -9)],
)
def test_readers_end_with_their_process_and_leave_signals_to_it(tmp_path, how, code):
    """However it ends, and with the loader in the midst of its batches."""
    make_index(tmp_path)
    (tmp_path / "ending.py").write_text(ENDING)
    ended = run_program(tmp_path / "ending.py", tmp_path, how, timeout=30)
    assert ended.returncode == code, ended.stderr
    readers = (tmp_path / "readers").read_text().split()
    assert len(readers) == 2
    until = time.monotonic() + 3  # torch's own look at the parent, every 5 s, would be too late
    while any(is_running(int(reader)) for reader in readers):
        assert time.monotonic() < until, "readers outlive their process"
        time.sleep(0.01)


def test_open_files_are_bounded_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    index = make_index(tmp_path)
    assert len(index.shard_names) > 3

    def open_shards() -> int:
        links = Path("/proc/self/fd").iterdir()
        files = [os.path.realpath(link) for link in links]
        return sum(file.startswith(str(tmp_path)) and file.endswith(".tar") for file in files)

    batches = make_loader(index)
    seen = [open_shards() for _ in batches]
    assert max(seen) == 2
    del batches
    assert open_shards() == 0


def test_fewer_samples_than_ranks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="12 samples on 13 ranks"):
        make_loader(make_index(tmp_path), world_size=13)


def test_an_index_without_an_image_size_is_an_error(tmp_path):
    write_shards(tmp_path / "set", [(b"x", "png", 0)] * 12, ["one"], prepared={})
    with pytest.raises(ValueError, match="no prepared.image_size"):
        make_loader(load_index(tmp_path / "set"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_order_are_as_stored(tmp_path, workers):
    index = make_index(tmp_path)
    samples = np.array([5, 3, 3, 59, 0, 20, 31])
    batches = list(images_in_order(index, samples, 3, workers))
    assert [len(batch.images) for batch in batches] == [3, 3, 1]
    images = torch.cat([batch.images for batch in batches]).numpy()
    np.testing.assert_array_equal(images, np.stack([pixels(i).transpose(2, 0, 1) for i in samples]))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [i % NUM_CLASSES for i in samples]


def test_images_in_order_of_no_samples_is_empty(tmp_path):
    assert list(images_in_order(make_index(tmp_path), np.array([], np.int64), 3, 2)) == []


def test_a_bad_image_in_order_is_an_error(tmp_path):
    index = make_index(tmp_path, {17: b"no image"})
    with pytest.raises(ValueError, match="sample 000000017 .photo 17. is no image of"):
        list(images_in_order(index, np.arange(NUM_SAMPLES), 8, 0))


def test_decode_gives_rgb():
    image = pixels(0)
    gray = image[..., 0]
    np.testing.assert_array_equal(decode(encoded(image)), image)
    np.testing.assert_array_equal(decode(encoded(gray)), np.repeat(gray[..., None], 3, axis=2))


def test_transparency_is_white_but_in_data_sets_that_were_prepared_before(tmp_path):
    hidden = np.dstack([pixels(0), np.zeros(pixels(0).shape[:2], np.uint8)])
    index = make_index(tmp_path, {3: cv2.imencode(".png", hidden[..., [2, 1, 0, 3]])[1].tobytes()})
    for version, wanted in ((3, np.full_like(pixels(0), 255)), (2, pixels(0))):
        (batch,) = images_in_order(replace(index, version=version), np.array([3]), 1, 0)
        np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0).numpy(), wanted)
