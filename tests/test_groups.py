"""Batches of K samples of each identity: a pure function of (seed, step), for losses that compare samples."""

import numpy as np
import pytest

from partial_fc.config import Data
from partial_fc.data.groups import Groups, build_order
from partial_fc.data.order import Order
from partial_fc.data.shards import load_index
from tests.conftest import run_ranks
from tests.test_train import assert_follows, checksums, interrupted, rows, train_here

SAMPLES = np.repeat(np.arange(6), [1, 2, 3, 7, 0, 12])  # class 4 has none
K = 4


def make(seed: int = 0) -> Groups:
    label = np.random.default_rng(1).permutation(SAMPLES)
    return Groups(Order(np.array([10, 15]), 5, 5, seed, 8), label, K)


def groups(order: Groups, steps: int) -> np.ndarray:
    """(steps P, K)"""
    return np.concatenate([order.batch(step).reshape(-1, K) for step in range(steps)])


def test_a_group_is_of_one_class_and_repeats_nothing_before_all_have_come():
    order = make()
    for group in groups(order, 20):
        (label,) = np.unique(order.label[group])
        own = np.count_nonzero(order.label == label)
        assert len(np.unique(group)) == min(own, K)
        assert len(np.unique(group[:own])) == min(own, K), "repeated too early"


def test_the_first_ones_are_the_order_s_and_the_others_all_alike():
    order = make()
    np.testing.assert_array_equal(order.batch(7)[::K], order.anchors.batch(7))
    found = groups(order, 2000)
    largest = found[order.label[found[:, 0]] == 5]
    counts = np.bincount(largest[:, 1:].ravel(), minlength=25)[order.label == 5]
    expected = counts.sum() / 12
    assert np.sum((counts - expected) ** 2 / expected) < 31.3  # p = 0.001 at 11 degrees of freedom


def test_a_step_is_a_function_of_seed_and_step():
    order = make()
    batches = [order.batch(step) for step in range(30)]
    for step in np.random.default_rng(0).permutation(30):
        np.testing.assert_array_equal(make().batch(int(step)), batches[step])
    assert any((make(seed=1).batch(step) != batches[step]).any() for step in range(3))
    assert order.global_batch_size == len(batches[0]) == 20 and order.steps_per_epoch == 1


def test_what_a_config_asks_for(glyphs_ci):
    index = load_index(glyphs_ci / "train")
    settings = Data(train="", global_batch_size=48, streams=4, samples_per_identity=1)
    plain = build_order(settings, index, seed=3)
    assert isinstance(plain, Order)
    grouped = build_order(settings.model_copy(update={"samples_per_identity": 3}), index, seed=3)
    assert grouped.anchors.global_batch_size == 16 and grouped.steps_per_epoch == plain.steps_per_epoch
    with pytest.raises(ValueError, match="48 samples, 5 of an identity, and 4 streams"):
        build_order(settings.model_copy(update={"samples_per_identity": 5}), index, seed=3)


TRIPLETS = (
    "data.samples_per_identity=4",
    "data.streams=4",
    "data.global_batch_size=48",
    "run.steps=8",
    "checkpoint.every=4",
    "head.embedding_losses={triplet: {weight: 0.1}, contrastive: {weight: 0.1}}",
)


@pytest.mark.slow
def test_a_run_with_triplets_is_the_same_at_any_number_of_ranks_and_resumed(glyphs_ci, tmp_path):
    two, three, resumed = (tmp_path / name for name in ("two", "three", "resumed"))
    run_ranks(train_here, 2, two, glyphs_ci / "train", *TRIPLETS)
    run_ranks(train_here, 3, three, glyphs_ci / "train", *TRIPLETS)
    assert_follows(three, two)
    assert all(row["head.embedding_loss"] > 0 for row in rows(two)), "no positives in the batches"
    interrupted(two, resumed, 4)
    run_ranks(train_here, 2, resumed, glyphs_ci / "train", *TRIPLETS)
    assert checksums(resumed) == checksums(two)


def test_another_number_of_samples_is_another_data_order(glyphs_ci, tmp_path):
    run_ranks(train_here, 1, tmp_path / "run", glyphs_ci / "train", "run.steps=2", "checkpoint.every=2")
    with pytest.raises(AssertionError, match="data.samples_per_identity was None, now 4"):
        run_ranks(train_here, 1, tmp_path / "run", glyphs_ci / "train", *TRIPLETS)


def test_micro_batches_would_tear_pairs_apart(glyphs_ci, tmp_path):
    with pytest.raises(AssertionError, match="head.embedding_losses contrastive, triplet with data.accumulate 2"):
        run_ranks(train_here, 1, tmp_path / "run", glyphs_ci / "train", *TRIPLETS, "data.accumulate=2")
