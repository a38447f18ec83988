from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from partial_fc.data.mixing import mixing, too_small
from partial_fc.data.order import Order
from partial_fc.data.remote import Cache
from partial_fc.doctor.run_folder import mixed
from partial_fc.parallel.distributed import part

# samples per shard, batch, streams, window
CASES = {
    "even shards": ([40] * 6, 24, 4, 16),
    "uneven shards": ([1, 97, 13, 50, 2, 85], 20, 5, 16),
    "empty shards": ([0, 31, 0, 0, 44, 12, 0], 12, 3, 8),
    "one shard": ([103], 8, 4, 10),
    "more streams than shards": ([60, 59], 30, 15, 4),
    "window of 1": ([33, 44, 55], 12, 2, 1),
    "window larger than a stream": ([33, 44, 55], 12, 2, 10**6),
    "window smaller than a batch's part": ([33, 44, 55], 24, 2, 5),
    "one batch an epoch": ([3, 4], 6, 3, 2),
    "batch of everything": ([3, 4, 5], 12, 4, 3),
    "batch of 1": ([3, 4], 1, 1, 3),
}


def make(case: str, seed: int = 0) -> Order:
    samples_per_shard, batch, streams, window = CASES[case]
    return Order(np.array(samples_per_shard), batch, streams, seed, window)


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """(steps per epoch, B)"""
    start = epoch * order.steps_per_epoch
    return np.stack([order.batch(step) for step in range(start, start + order.steps_per_epoch)])


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_holds_each_sample_at_most_once(case):
    order = make(case)
    for epoch in range(3):
        samples = epoch_of(order, epoch)
        assert samples.dtype == np.int64
        assert samples.shape == (order.num_samples // order.global_batch_size, order.global_batch_size)
        assert len(np.unique(samples)) == samples.size
        assert samples.min() >= 0 and samples.max() < order.num_samples


@pytest.mark.parametrize("case", CASES)
def test_any_step_alone_equals_the_steps_in_turn(case):
    order = make(case)
    in_turn = np.concatenate([epoch_of(order, epoch) for epoch in range(3)])
    steps = np.random.default_rng(0).permutation(len(in_turn))
    for step in steps:
        np.testing.assert_array_equal(order.batch(int(step)), in_turn[step])
        np.testing.assert_array_equal(make(case).batch(int(step)), in_turn[step])


def test_the_order_is_pinned():
    """A change here changes every run that is resumed: it needs a new version of the checkpoint."""
    order = Order(np.array([5, 0, 7, 4]), 6, 3, 1, 3)
    assert [order.batch(step).tolist() for step in (0, 1, 2, 1000)] == [
        [3, 2, 14, 15, 6, 8],
        [4, 12, 13, 5, 7, 9],
        [4, 3, 14, 13, 6, 8],
        [3, 1, 13, 14, 7, 5],
    ]


@pytest.mark.parametrize("case", ["even shards", "uneven shards", "one shard", "more streams than shards"])
def test_epochs_and_seeds_differ(case):
    order = make(case)
    assert not np.array_equal(epoch_of(order, 0), epoch_of(order, 1))
    assert not np.array_equal(epoch_of(order, 0), epoch_of(make(case, seed=1), 0))


@pytest.mark.parametrize("case", ["uneven shards", "one shard", "one batch an epoch"])
def test_every_sample_is_left_out_in_some_epochs_only(case):
    order = make(case)
    assert order.num_samples % order.global_batch_size > 0
    everything = np.arange(order.num_samples)
    epochs = 40
    left_out = [np.setdiff1d(everything, epoch_of(order, epoch)) for epoch in range(epochs)]
    assert len({tuple(samples) for samples in left_out}) > 5
    assert np.bincount(np.concatenate(left_out), minlength=order.num_samples).max() < epochs / 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_stream_is_a_run_of_shards(world_size):
    """Whole streams go to a rank when the streams are a multiple of the ranks, so few shards are shared."""
    streams, num_shards = 24, 96
    samples_per_shard = np.random.default_rng(0).integers(50, 150, num_shards)
    order = Order(samples_per_shard, 240, streams, 0, 64)
    shard_of = np.repeat(np.arange(num_shards), samples_per_shard)
    for epoch in range(3):
        samples = epoch_of(order, epoch)
        readers: dict[int, set[int]] = {}
        for rank in range(world_size):
            columns = part(240, rank, world_size)
            for shard in np.unique(shard_of[samples[:, columns.start : columns.stop]]):
                readers.setdefault(int(shard), set()).add(rank)
        shared = sum(len(ranks) > 1 for ranks in readers.values())
        # Only a shard across a border between two ranks, or at the two ends of the row, has two readers.
        assert shared <= world_size
        if world_size == 1:
            assert shared == 0


@pytest.mark.parametrize("stream", [0, 1])
def test_a_stream_is_shuffled_inside_its_windows(stream):
    order = Order(np.array([1000]), 20, 2, 0, 10)
    samples = epoch_of(order, 0).reshape(-1, 2, 10)[:, stream].ravel()
    first_window = set(samples[:10].tolist())
    (start,) = (sample for sample in first_window if (sample - 1) % 1000 not in first_window)
    places = (samples - start) % 1000  # in the row, which is one rotated shard
    assert not np.array_equal(places, np.arange(500))
    np.testing.assert_array_equal(np.sort(places.reshape(-1, 10), axis=1).ravel(), np.arange(500))


def test_a_window_of_1_does_not_shuffle():
    samples = epoch_of(Order(np.array([100]), 10, 1, 0, 1), 0).ravel()
    np.testing.assert_array_equal(np.diff(samples) % 100, 1)


def test_a_window_over_a_whole_stream_is_a_uniform_shuffle():
    """1,000 epochs of 4 samples in one stream: each of the 24 orders about equally often."""
    order = Order(np.array([4]), 1, 1, 0, 4)
    orders = [tuple(epoch_of(order, epoch).ravel()) for epoch in range(1000)]
    counts = np.array([orders.count(one) for one in set(orders)])
    assert len(counts) == 24
    chi_squared = np.sum((counts - 1000 / 24) ** 2 / (1000 / 24))
    assert chi_squared < 49.7  # p = 0.001 at 23 degrees of freedom


def test_a_far_step_costs_no_more_than_the_first():
    order = Order(np.full(500, 84_000), 4096, 64, 0, 8192)
    far = order.batch(10**15)
    assert len(np.unique(far)) == 4096
    assert len(order._rows) == 1 and len(order._windows) == 64


@pytest.mark.parametrize(
    ("batch", "streams", "window", "message"),
    [
        (10, 3, 4, "got a global batch of 10 samples and 3 streams, wanted a positive multiple"),
        (12, 3, 4, "got a global batch of 12 samples, wanted at most 10"),
        (0, 1, 4, "got a global batch of 0"),
        (4, 0, 4, "got 0 streams"),
        (4, 2, 0, "a shuffle window of 0"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(batch, streams, window, message):
    with pytest.raises(ValueError, match=message):
        Order(np.array([4, 6]), batch, streams, 0, window)


def test_a_negative_step_is_an_error():
    with pytest.raises(ValueError, match="got step -1"):
        make("one shard").batch(-1)


def test_shards_in_order_of_identity_are_told_from_shuffled_ones():
    """By what a run and the doctor say; the remedies are measured on the same order."""
    order = Order(np.full(50, 2000), 64, 4, 0, 256)
    label = np.repeat(np.arange(10_000), 10)
    found = mixing(order, label)
    samples = np.concatenate([order.batch(step) for step in range(717, 845)])  # the middle of 1,562
    assert found.steps == 128 and found.identities == len(np.unique(label[samples])) and found.share < 0.25
    shuffled = np.random.default_rng(0).permutation(label)
    assert mixing(order, shuffled).share == pytest.approx(1, abs=0.01)
    index = SimpleNamespace(label=label, shards=[SimpleNamespace(plain_bytes=1 << 30)] * 50)
    sheet_line = mixed(order, index)
    assert sheet_line.level == "problem" and found.said() in sheet_line.text
    for streams, window in ((64, 256), (4, 8192)):
        share = mixing(replace(order, streams=streams, shuffle_window=window), label).share
        assert f"gives {share:.0%}, and reads " in sheet_line.text and share > 3 * found.share
    assert "data.streams=64" in sheet_line.text and "reads 50 shards of 50.0 GiB at once" in sheet_line.text
    assert mixed(order, SimpleNamespace(label=shuffled)).level == "ok"


def test_a_cache_that_does_not_hold_two_windows_is_told(tmp_path):
    order = Order(np.full(50, 2000), 64, 4, 0, 3000)  # two windows of a stream lie in 4 shards
    shards = [SimpleNamespace(plain_bytes=1 << 20, copied=True)] * 50
    assert too_small(order, shards, Cache(tmp_path, 16 << 20)) == ""
    said = too_small(order, shards, Cache(tmp_path, (16 << 20) - 1))
    assert "two shuffle windows lie in shards of 16.0 MiB" in said and "raise data.cache_bytes" in said
    here = [SimpleNamespace(plain_bytes=1 << 20, copied=False)] * 50
    assert too_small(order, here, Cache(tmp_path / "none")) == "" and not (tmp_path / "none").exists()


WEIGHTS = [("2", "1"), ("1/2", "1"), ("1/3", "5/2"), ("7/10", "1/7"), ("0.3", "2")]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_weight_says_how_often_a_sample_comes(weights):
    """2: twice an epoch; 1/2: every second sample, the others in the next epoch. Up to what a batch cuts off."""
    first, second = np.array([40, 0, 33]), np.array([51, 29])
    fractions = [Fraction(weight) for weight in weights]
    chosen = tuple(zip((3, 2), fractions, strict=True))
    order = Order(np.concatenate([first, second]), 10, 5, 0, 8, chosen)
    sizes = (first.sum(), second.sum())
    assert order.num_samples == sum(int(w * int(n)) for w, n in zip(fractions, sizes, strict=True))
    whole = replace(order, global_batch_size=1, streams=1)
    total, epochs = np.zeros(sum(sizes), np.int64), fractions[0].denominator * fractions[1].denominator
    for epoch in range(epochs):
        row = whole._row(epoch)
        counts = np.bincount(whole._samples(epoch, np.arange(row.length)), minlength=sum(sizes))
        for w, own in zip(fractions, (counts[: sizes[0]], counts[sizes[0] :]), strict=True):
            assert set(own.tolist()) <= {int(w), int(w) + (w.denominator > 1)}
            assert 0 <= own.sum() - int(w * len(own)) <= 1
        total += counts
    wanted = np.repeat([int(w * epochs) for w in fractions], sizes)
    np.testing.assert_array_equal(total, wanted)
    in_turn = [order.batch(step) for step in range(3 * order.steps_per_epoch)]
    assert all(batch.min() >= 0 and batch.max() < sum(sizes) for batch in in_turn)
    for step in (0, order.steps_per_epoch, 2 * order.steps_per_epoch + 1):
        again = Order(np.concatenate([first, second]), 10, 5, 0, 8, chosen)
        np.testing.assert_array_equal(again.batch(step), in_turn[step])


def test_weights_of_one_are_the_order_without_weights():
    counts = np.array([5, 0, 7, 4])
    plain, weighted = (Order(counts, 6, 3, 1, 3, w) for w in (None, ((2, Fraction(1)), (2, Fraction(1)))))
    assert all(np.array_equal(plain.batch(step), weighted.batch(step)) for step in range(9))


def test_sets_of_other_weights_are_compared_with_shuffled_samples_of_these_weights():
    """10 identities ten times, 10,000 a tenth of a time: few of the second are there, in random order too."""
    rng = np.random.default_rng(0)
    label = np.concatenate([rng.permutation(np.arange(1000) % 10), 10 + rng.permutation(np.arange(20_000) % 10_000)])
    order = Order(np.array([1000, 20_000]), 64, 8, 0, 512, weights=((1, Fraction(10)), (1, Fraction(1, 10))))
    assert mixing(order, label).share == pytest.approx(1, abs=0.1)
