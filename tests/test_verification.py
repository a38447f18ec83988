"""Verification against formulas written out over all pairs in float64, and cases whose answer is known."""

import numpy as np
import pytest
import torch

from partial_fc.evaluate import pairs as pairs_module
from partial_fc.evaluate.pairs import BINS, all_pairs
from partial_fc.evaluate.scores import on_grid
from partial_fc.evaluate.verification import _unordered_pair, fold_accuracy, tar_at_far, verification_pairs
from tests.conftest import run_ranks


def naive_tar_at_far(score, same, far):
    """Tries just above and at every score, from the lowest up: the first whose FAR is low enough."""
    candidates = sorted({t for s in score for t in (s, np.nextafter(s, np.inf))})
    for threshold in candidates:
        reached = np.mean(score[~same] >= threshold)
        if reached <= far:
            return np.mean(score[same] >= threshold), reached
    raise AssertionError("accepting nothing has FAR 0")


@pytest.mark.parametrize("decimals", [1, 2, 9])  # few decimals: many ties
@pytest.mark.parametrize("n", [2, 7, 200])
def test_tar_at_far_is_the_naive_search(n, decimals):
    rng = np.random.default_rng(n + decimals)
    same = np.arange(n) % 3 == 0
    score = np.round(rng.normal(size=n) + same, decimals)
    for far in (0.0, 0.01, 0.1, 0.25, 0.5, 0.9):
        tar, threshold, reached = tar_at_far(score, same, far)
        assert (tar, reached) == naive_tar_at_far(score, same, far)
        assert tar == np.mean(score[same] >= threshold)
        assert reached == np.mean(score[~same] >= threshold) <= far


def test_tar_at_far_without_allowed_false_accepts_is_just_above_the_highest_impostor():
    score = np.array([0.9, 0.8, 0.8, 0.3, 0.1])
    same = np.array([True, True, False, True, False])
    assert tar_at_far(score, same, 0.0) == (1 / 3, np.nextafter(0.8, 1), 0.0)
    assert tar_at_far(score, same, 0.49) == (1 / 3, np.nextafter(0.8, 1), 0.0)
    assert tar_at_far(score, same, 0.5) == (1.0, np.nextafter(0.1, 1), 0.5)


def test_tar_at_far_rejects_all_impostors_of_a_tie_that_does_not_fit():
    score = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.2])
    same = np.array([True, True, False, False, False, False])
    tar, threshold, reached = tar_at_far(score, same, 0.5)
    assert (tar, reached) == (0.5, 0.0)
    assert 0.5 < threshold < 0.9


def test_tar_at_far_threshold_holds_in_float32():
    score = np.array([0.9, 0.7, 0.1], dtype=np.float32)
    same = np.array([True, False, False])
    _, threshold, _ = tar_at_far(score, same, 0.0)
    assert (score >= threshold).tolist() == [True, False, False]


def test_allowed_false_accepts_are_counted_without_rounding():
    score = np.arange(100, dtype=np.float64)
    same = np.zeros(101, dtype=bool)
    same[100] = True
    for percent in range(100):  # 0.29 * 100 is below 29 in floating point
        assert tar_at_far(np.append(score, 1000.0), same, percent / 100)[2] == percent / 100


def test_tar_at_far_of_several_targets_at_once():
    rng = np.random.default_rng(0)
    same = rng.random(500) < 0.3
    score = rng.normal(size=500) + same
    fars = [0.01, 0.1, 0.3]
    together = np.stack(tar_at_far(score, same, fars), axis=1)
    assert together.tolist() == [list(tar_at_far(score, same, far)) for far in fars]


@pytest.mark.parametrize(
    ("score", "same", "message"),
    [
        ([0.1, 0.2], [True, True], "2 genuine and 0 impostor"),
        ([0.1, 0.2], [False, False], "0 genuine and 2 impostor"),
        ([0.1, np.nan], [True, False], "score 1 is not finite"),
        ([0.1, 0.2, 0.3], [True, False], "one length"),
    ],
)
def test_bad_scores_are_errors(score, same, message):
    with pytest.raises(ValueError, match=message):
        tar_at_far(np.array(score), np.array(same), 0.1)


def test_far_outside_its_range_is_an_error():
    with pytest.raises(ValueError, match="0 <= far < 1"):
        tar_at_far(np.array([0.1, 0.2]), np.array([True, False]), 1.0)


def naive_fold_accuracy(score, same, folds):
    accuracies, thresholds = [], []
    for fold in np.unique(folds):
        train, held_out = folds != fold, folds == fold
        best, best_threshold = -1.0, None
        candidates = sorted({*score[train], np.nextafter(score[train].max(), np.inf)}, reverse=True)
        for threshold in candidates:
            accuracy = np.mean((score[train] >= threshold) == same[train])
            if accuracy > best:  # of equal ones the first: the highest
                best, best_threshold = accuracy, threshold
        accuracies.append(np.mean((score[held_out] >= best_threshold) == same[held_out]))
        thresholds.append(best_threshold)
    return np.mean(accuracies), np.std(accuracies), thresholds


@pytest.mark.parametrize("decimals", [1, 9])
@pytest.mark.parametrize(("n", "num_folds"), [(4, 2), (41, 3), (300, 10)])
def test_fold_accuracy_is_the_naive_search(n, num_folds, decimals):
    rng = np.random.default_rng(n)
    same = rng.random(n) < 0.5
    same[:2] = True, False
    score = np.round(rng.normal(size=n) + same, decimals)
    folds = rng.permutation(np.arange(n) % num_folds)
    mean, std, thresholds = fold_accuracy(score, same, folds)
    wanted = naive_fold_accuracy(score, same, folds)
    assert (mean, std) == pytest.approx(wanted[:2], abs=1e-12)
    assert thresholds.tolist() == wanted[2]


def test_fold_accuracy_of_separated_scores_is_one_and_of_inverted_scores_zero():
    same = np.tile([True, False], 50)
    assert fold_accuracy(np.where(same, 0.8, 0.2), same, 10)[:2] == (1.0, 0.0)
    # The best that a threshold can do with inverted scores is to accept all or none: 45 of 90 right either way.
    assert fold_accuracy(np.where(same, 0.2, 0.8), same, 10)[:2] == (0.5, 0.0)


def test_of_equally_good_thresholds_the_highest_is_taken():
    # On the other fold, accepting all and rejecting all both give one right answer of two.
    score, same = np.array([0.9, 0.5, 0.9, 0.5]), np.array([False, True, False, True])
    thresholds = fold_accuracy(score, same, np.array([0, 0, 1, 1]))[2]
    assert thresholds.tolist() == [np.nextafter(0.9, 1)] * 2
    score, same = np.array([0.9, 0.7, 0.5, 0.9, 0.7, 0.5]), np.array([True, False, True] * 2)
    assert fold_accuracy(score, same, np.repeat([0, 1], 3))[2].tolist() == [0.9, 0.9]


def test_folds_may_be_a_number_of_equal_runs():
    rng = np.random.default_rng(1)
    same = rng.random(103) < 0.5
    score = rng.normal(size=103) + same
    folds = np.concatenate([np.full(b - a, f) for f, (a, b) in enumerate([(0, 25), (25, 51), (51, 77), (77, 103)])])
    by_number, by_array = fold_accuracy(score, same, 4), fold_accuracy(score, same, folds)
    assert by_number[:2] == by_array[:2]
    assert by_number[2].tolist() == by_array[2].tolist()


def test_a_single_fold_is_an_error():
    score, same = np.array([0.1, 0.2]), np.array([True, False])
    with pytest.raises(ValueError, match="got 1 folds"):
        fold_accuracy(score, same, 1)
    with pytest.raises(ValueError, match="single fold"):
        fold_accuracy(score, same, np.zeros(2, dtype=int))


def test_verification_pairs_are_balanced_distinct_and_identity_disjoint():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 90, size=700) * 3
    pairs, same, fold = verification_pairs(labels, seed=5, pairs_per_fold=40, folds=6)
    assert len(pairs) == len(same) == len(fold) == 6 * 80
    assert ((labels[pairs[:, 0]] == labels[pairs[:, 1]]) == same).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)
    for f in range(6):
        assert np.count_nonzero(same[fold == f]) == np.count_nonzero(~same[fold == f]) == 40
    members = [set(labels[pairs[fold == f]].ravel()) for f in range(6)]
    assert sum(map(len, members)) == len(set().union(*members))


def test_verification_pairs_follow_the_seed():
    labels = np.arange(400) // 5
    first, again, other = (verification_pairs(labels, seed, 20)[0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_verification_pairs_cover_every_pair_when_all_are_wanted():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 3])  # folds of two identities, a genuine pair in each
    pairs, same, fold = verification_pairs(labels, seed=0, pairs_per_fold=1000, folds=2)
    for kind in (True, False):
        counts = [np.count_nonzero((fold == f) & (same == kind)) for f in (0, 1)]
        assert counts[0] == counts[1] > 0
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)


def test_single_samples_do_not_leave_a_fold_without_genuine_pairs():
    labels = np.concatenate([np.arange(10).repeat(2), np.arange(10, 200)])
    for seed in range(5):
        pairs, same, fold = verification_pairs(labels, seed, pairs_per_fold=5)
        assert np.count_nonzero(same) == 10  # one identity with a pair in each fold
        assert sorted(fold[same]) == list(range(10))


def test_unordered_pairs_are_numbered_without_gaps():
    wanted = [(low, high) for high in range(1, 60) for low in range(high)]
    low, high = _unordered_pair(np.arange(len(wanted)))
    assert list(zip(low, high, strict=True)) == wanted
    for high_wanted in (2**26, 2**28 + 1, 3 * 2**27, 2**31):  # where 8 n + 1 is no exact float any more
        first = high_wanted * (high_wanted - 1) // 2
        low, high = _unordered_pair(np.array([first - 1, first, first + high_wanted - 1]))
        assert low.tolist() == [high_wanted - 2, 0, high_wanted - 1]
        assert high.tolist() == [high_wanted - 1, high_wanted, high_wanted]


@pytest.mark.parametrize("labels", [np.arange(30), np.arange(30) // 5])
def test_too_few_identities_for_the_folds_are_an_error(labels):
    with pytest.raises(ValueError, match="wanted at least 20"):
        verification_pairs(labels, seed=0)


def embeddings_and_labels(n, dimension, identities, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (n,), generator=generator).numpy() * 7
    centers = torch.randn(identities, dimension, generator=generator)
    noise = torch.randn(n, dimension, generator=generator)
    embeddings = centers[torch.from_numpy(labels // 7)] + noise
    embeddings[n // 2] = embeddings[n // 3]  # an exact tie between pairs
    return torch.nn.functional.normalize(embeddings), labels


def naive_pairs(embeddings, labels):
    """(i, j, score, same) of every unordered pair, one exact inner product at a time."""
    exact = on_grid(embeddings)
    return [
        (i, j, float((exact[i] * exact[j]).sum()), bool(labels[i] == labels[j]))
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
    ]


def summary(n, dimension, identities, max_far, chunk):
    embeddings, labels = embeddings_and_labels(n, dimension, identities)
    found = all_pairs(embeddings, labels, max_far=max_far, chunk=chunk, hardest=5)
    return {
        "genuine": found.genuine.tolist(),
        "impostor": found.impostor.tolist(),
        "num_impostor": found.num_impostor,
        "genuine_counts": found.genuine_counts.tolist(),
        "impostor_counts": found.impostor_counts.tolist(),
        "lowest_genuine": found.lowest_genuine,
        "highest_impostor": found.highest_impostor,
        "roc": found.roc(),
        "tar": [found.tar_at_far(far) for far in (0.0, 0.01, max_far)],
    }


@pytest.mark.parametrize("compact_at", [1, 50, 2**20])
@pytest.mark.parametrize(("n", "identities", "max_far"), [(67, 9, 0.05), (40, 3, 0.3), (5, 2, 0.9)])
def test_all_pairs_is_every_pair(monkeypatch, n, identities, max_far, compact_at):
    monkeypatch.setattr(pairs_module, "COMPACT_AT", compact_at)
    found = summary(n, 6, identities, max_far, chunk=16)
    pairs = naive_pairs(*embeddings_and_labels(n, 6, identities))
    genuine = sorted(score for *_, score, same in pairs if same)
    impostor = sorted(score for *_, score, same in pairs if not same)
    assert found["genuine"] == genuine
    assert found["num_impostor"] == len(impostor)
    assert found["impostor"] == impostor[-int(max_far * len(impostor)) - 1 :]
    edges = np.linspace(-1, 1, BINS + 1)
    assert found["genuine_counts"] == np.histogram(np.clip(genuine, -1, 1), edges)[0].tolist()
    assert found["impostor_counts"] == np.histogram(np.clip(impostor, -1, 1), edges)[0].tolist()
    score, same = np.array([p[2] for p in pairs]), np.array([p[3] for p in pairs])
    assert found["tar"] == [tar_at_far(score, same, far) for far in (0.0, 0.01, max_far)]
    lowest = sorted((p for p in pairs if p[3]), key=lambda p: (p[2], p[0], p[1]))[:5]
    highest = sorted((p for p in pairs if not p[3]), key=lambda p: (-p[2], p[0], p[1]))[:5]
    assert found["lowest_genuine"] == [p[:3] for p in lowest]
    assert found["highest_impostor"] == [p[:3] for p in highest]


def test_the_roc_is_conservative_at_each_of_its_fars():
    embeddings, labels = embeddings_and_labels(80, 6, 10)
    found = all_pairs(embeddings, labels, max_far=0.01)
    curve = found.roc()
    pairs = naive_pairs(embeddings, labels)
    score, same = np.array([p[2] for p in pairs]), np.array([p[3] for p in pairs])
    assert curve[-1] == (1.0, 1.0)
    edges = np.linspace(-1, 1, BINS + 1)
    at_edges = [(np.mean(score[~same] >= edge), np.mean(score[same] >= edge)) for edge in edges]
    wanted = set()
    for far in np.logspace(-np.log10(found.num_impostor), 0, 100):
        if far * found.num_impostor < len(found.impostor):  # exact
            tar, _, reached = tar_at_far(score, same, far)
        else:  # the lowest bin edge that does not exceed it
            reached, tar = max(rates for rates in at_edges if rates[0] <= far)
        wanted.add((reached, tar))
    assert curve == sorted(wanted)
    assert [tar for _, tar in curve] == sorted(tar for _, tar in curve)
    assert len(curve) > 20


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_pairs_is_the_same_for_every_number_of_ranks_and_chunk(world_size):
    wanted = summary(131, 16, 12, 0.05, 1000)
    for chunk in (7, 50):
        for result in run_ranks(summary, world_size, 131, 16, 12, 0.05, chunk):
            assert result == wanted


def test_identical_embeddings_accept_nothing():
    embeddings = torch.nn.functional.normalize(torch.ones(30, 7))
    labels = np.arange(30) // 3
    found = all_pairs(embeddings, labels, max_far=0.5, chunk=11)
    tar, threshold, far_reached = found.tar_at_far(0.5)
    assert (tar, far_reached) == (0.0, 0.0)
    assert threshold > found.genuine[-1]
    assert [pair[:2] for pair in found.highest_impostor] == [(0, j) for j in range(3, 11)]
    # Whatever tile a pair is met in: of equal scores the first positions are kept.
    shuffled = np.random.default_rng(0).permutation(labels)
    different = [(i, j) for i in range(30) for j in range(i + 1, 30) if shuffled[i] != shuffled[j]]
    found = all_pairs(embeddings, shuffled, max_far=0.5, chunk=4)
    assert [pair[:2] for pair in found.highest_impostor] == different[:8]


def test_scores_do_not_depend_on_the_order_of_summation():
    embeddings = torch.nn.functional.normalize(torch.randn(50, 512, generator=torch.Generator().manual_seed(0)))
    exact = on_grid(embeddings)
    shuffled = exact[:, torch.randperm(512, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(exact @ exact.T, shuffled @ shuffled.T)
    assert (exact - embeddings).abs().max() <= 2**-25


@pytest.mark.parametrize("value", [0.0, 2.0, float("nan"), float("inf")])
def test_an_embedding_that_is_not_normalized_is_named(value):
    embeddings = torch.nn.functional.normalize(torch.ones(4, 3))
    embeddings[2] = value
    with pytest.raises(ValueError, match="embedding 2 has norm"):
        on_grid(embeddings)


@pytest.mark.parametrize(("labels", "message"), [([0, 1, 2], "got 0 genuine"), ([0, 0, 0], "and 0 impostor")])
def test_all_pairs_wants_pairs_of_both_kinds(labels, message):
    with pytest.raises(ValueError, match=message):
        all_pairs(torch.eye(3), np.array(labels), max_far=0.1)


def test_a_far_beyond_what_was_kept_is_an_error():
    embeddings, labels = embeddings_and_labels(40, 6, 5)
    found = all_pairs(embeddings, labels, max_far=0.01)
    with pytest.raises(ValueError, match="raise max_far"):
        found.tar_at_far(0.2)
