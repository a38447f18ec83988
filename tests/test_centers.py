"""Partition, initialization, sampling and catch-up: pure functions, whatever the number of ranks."""

import numpy as np
import pytest
import torch

from partial_fc import CosFace, PartialFC, Softmax
from partial_fc.head.centers import MissedUpdates, catch_up, initial_centers
from partial_fc.head.partition import class_range
from partial_fc.head.sampling import DRAW_BLOCK, _first_of_permutation, draw_negatives
from partial_fc.head.softmax import Buffers
from partial_fc.seeds import keyed_bytes


@pytest.mark.parametrize("num_classes", [1, 2, 7, 8, 9, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16])
def test_class_ranges_tile_the_classes(num_classes, world_size):
    ranges = [class_range(num_classes, rank, world_size) for rank in range(world_size)]
    assert [c for owned in ranges for c in owned] == list(range(num_classes))
    assert max(map(len, ranges)) == -(-num_classes // world_size)


def test_initial_centers_depend_on_seed_and_class_alone():
    whole = torch.empty(5000, 6)
    initial_centers(range(5000), 6, 7, 0.01, whole)
    part = torch.empty(2000, 6)
    initial_centers(range(900, 2900), 6, 7, 0.01, part)
    assert torch.equal(part, whole[900:2900])
    assert whole.std() == pytest.approx(0.01, rel=0.02) and whole.mean().abs() < 2e-4
    other = torch.empty(5000, 6)
    initial_centers(range(5000), 6, 8, 0.01, other)
    assert not torch.equal(whole, other)
    double = torch.empty(5000, 6, dtype=torch.float64)
    initial_centers(range(5000), 6, 7, 0.01, double)
    assert torch.equal(double.float(), whole)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1024, 40_000, DRAW_BLOCK])
def test_permutation_is_one(size):
    for key in (b"\0" * 16, keyed_bytes(16, "a"), b"\xff" * 16):
        assert np.array_equal(np.sort(_first_of_permutation(size, size, key)), np.arange(size))


def test_draw_is_the_same_at_any_world_size():
    num_classes = 3 * DRAW_BLOCK + 1234
    for step in (0, 5):
        whole = draw_negatives(1, step, range(num_classes), num_classes, 0.01)
        for world_size in (2, 3, 8):
            ranges = [class_range(num_classes, rank, world_size) for rank in range(world_size)]
            parts = [draw_negatives(1, step, owned, num_classes, 0.01) for owned in ranges]
            assert torch.equal(torch.cat(parts).sort().values, whole.sort().values)
    assert not torch.equal(whole, draw_negatives(2, 5, range(num_classes), num_classes, 0.01))
    assert len(whole) == len(whole.unique())
    assert len(draw_negatives(1, 0, range(5, 5), num_classes, 0.5)) == 0


@pytest.mark.parametrize("num_classes", [37, 256, 3000])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.97])
def test_every_class_is_drawn_at_the_rate_and_with_its_neighbours_no_more(num_classes, rate):
    steps = 4000
    drawn = torch.zeros(steps, num_classes, dtype=torch.bool)
    ids = [draw_negatives(3, step, range(num_classes), num_classes, rate) for step in range(steps)]
    drawn[torch.arange(steps).repeat_interleave(torch.tensor([len(some) for some in ids])), torch.cat(ids)] = True
    deviation = (rate * (1 - rate) / steps) ** 0.5
    frequency = drawn.double().mean(dim=0)
    assert (frequency - rate).abs().max() < 5 * deviation
    assert frequency.mean().item() == pytest.approx(rate, abs=4 / steps)
    # Of distinct ids, both: n (n - 1) / (C (C - 1)) for a sample without replacement, whatever their distance.
    count = drawn.sum(dim=1).double()
    both = float((count * (count - 1)).mean() / (num_classes * (num_classes - 1)))
    for distance in (1, 2, 3, 8, 16, num_classes // 2):
        pairs = (drawn[:, distance:] & drawn[:, :-distance]).numpy()  # which counts bools 10 times faster than torch
        deviation = (both / pairs.size) ** 0.5
        assert np.count_nonzero(pairs) / pairs.size == pytest.approx(both, abs=0.02 * both + 4 * deviation), distance
    # and consecutive steps are independent
    again = (drawn[1:] & drawn[:-1]).numpy()
    assert np.count_nonzero(again) / again.size == pytest.approx(rate * rate, abs=max(0.03 * rate * rate, 5e-4))


def test_catch_up_table_equals_single_updates():
    missed = MissedUpdates()
    schedule = [(0.1 / (1 + t), 0.9, 5e-3) for t in range(50)]
    for update in schedule:
        missed.record(*update)
    lag = torch.tensor([0, 1, 7, 50])
    weight, velocity = torch.randn(2, 4, 3, dtype=torch.float64)
    got_w, got_v = weight.clone(), torch.empty_like(velocity)
    catch_up(got_w, velocity, missed.matrices(lag).flatten(1).T, got_v)
    for row, k in enumerate(lag.tolist()):
        w, v = weight[row], velocity[row]
        for lr, mu, wd in schedule[len(schedule) - k :]:
            v = mu * v + wd * w
            w = w - lr * v
        torch.testing.assert_close(got_w[row], w, rtol=1e-13, atol=0)
        torch.testing.assert_close(got_v[row], v, rtol=1e-12, atol=0)


def test_replay_and_trimming_keep_every_bit():
    missed, trimmed = MissedUpdates(), MissedUpdates()
    for t in range(300):
        missed.record(0.1 / (1 + t), 0.9, 5e-4)
        trimmed.record(0.1 / (1 + t), 0.9, 5e-4)
        if t % 50 == 0:
            trimmed.keep(20)
    replayed = MissedUpdates()
    replayed.replay(missed.history, lags=60)
    assert replayed.updates == 300 and torch.equal(replayed.history, missed.history)
    assert np.array_equal(replayed.table, missed.table[:61])
    assert np.array_equal(trimmed.table[:21], missed.table[:21])


def trained_head(margin, rate: float, steps: int = 20, **changes) -> PartialFC:
    head = PartialFC(60, 4, margin, rate, dtype=torch.float64, weight_decay=0.01, **changes)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        head(x, torch.randint(60, (5,), generator=generator)).backward()
        head.step(0.1 / (1 + step))
    return head


def whole_state(centers) -> list[torch.Tensor]:
    """All rows and their moments, caught up."""
    used = centers.select(torch.arange(60))
    rows = centers.take(used, slice(None), Buffers.like(centers.weight.value), moments=True)
    learned = [part for part in (rows.weight, rows.bias) if part is not None]
    return [tensor for part in learned for tensor in (part.value, *part.moments)]


@pytest.mark.parametrize("margin", [CosFace(), Softmax()], ids=["cosface", "softmax"])
@pytest.mark.parametrize("saved, loaded", [(0.1, 0.1), (0.1, 1.0), (1.0, 0.1), (1.0, 1.0)])
def test_state_loads_at_another_sample_rate(margin, saved, loaded):
    head = trained_head(margin, saved)
    state = {name: tensor.clone() for name, tensor in head.centers.state().items()}
    other = PartialFC(60, 4, margin, loaded, dtype=torch.float64, weight_decay=0.01)

    def read(name, out):
        if name in state:
            out.copy_(state[name])
        return name in state

    other.centers.load(read, head.centers.missed.history)
    wanted = head.full_weight()
    assert torch.allclose(other.full_weight(), wanted, rtol=1e-12, atol=1e-15)
    if saved == loaded:
        assert torch.equal(other.full_weight(), wanted)
        ours, theirs = (whole_state(centers) for centers in (head.centers, other.centers))
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_long_runs_trim_the_table(monkeypatch):
    from partial_fc.head.centers import Centers

    monkeypatch.setattr(Centers, "TRIM_EVERY", 8)
    trimmed = trained_head(CosFace(), 0.3, steps=200)
    monkeypatch.setattr(Centers, "TRIM_EVERY", 10_000)
    whole = trained_head(CosFace(), 0.3, steps=200)
    assert len(trimmed.centers.missed.table) < 80 < len(whole.centers.missed.table)
    assert torch.equal(trimmed.full_weight(), whole.full_weight())
