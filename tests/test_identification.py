"""Identification against a search written out probe by probe, ties, and any number of ranks."""

import numpy as np
import pytest
import torch

from partial_fc.evaluate.identification import choose_gallery, choose_known, detect_and_identify, identify
from partial_fc.evaluate.protocol import open_set
from partial_fc.evaluate.scores import on_grid
from tests.conftest import run_ranks
from tests.test_verification import embeddings_and_labels


def naive_ranks(embeddings, labels, distractors, seed):
    gallery = choose_gallery(labels, seed)[0]
    exact, others = on_grid(embeddings), on_grid(distractors)
    ranks = []
    for probe in sorted(set(range(len(labels))) - set(gallery.tolist())):
        scores = {int(labels[g]): float((exact[probe] * exact[g]).sum()) for g in gallery}
        own = scores.pop(int(labels[probe]))
        rivals = [*scores.values(), *(float((exact[probe] * other).sum()) for other in others)]
        ranks.append(1 + sum(score >= own for score in rivals))
    return np.array(ranks)


def case(n, identities, num_distractors, seed, chunk):
    embeddings, labels = embeddings_and_labels(n, 6, identities, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    distractors = torch.nn.functional.normalize(torch.randn(num_distractors, 6, generator=generator))
    found = identify(embeddings, labels, distractors=distractors, seed=seed, chunk=chunk)
    return found.cmc.tolist(), found.num_probes, found.num_gallery, found.num_distractors


@pytest.mark.parametrize(("n", "identities", "num_distractors"), [(90, 12, 0), (91, 30, 17), (3, 1, 5)])
def test_cmc_is_the_naive_search(n, identities, num_distractors):
    cmc, num_probes, num_gallery, num_others = case(n, identities, num_distractors, seed=3, chunk=8)
    embeddings, labels = embeddings_and_labels(n, 6, identities, 3)
    generator = torch.Generator().manual_seed(103)
    distractors = torch.nn.functional.normalize(torch.randn(num_distractors, 6, generator=generator))
    ranks = naive_ranks(embeddings, labels, distractors, seed=3)
    assert cmc == [np.mean(ranks <= k) for k in range(1, 21)]
    assert num_probes == len(ranks) == n - len(np.unique(labels))
    assert (num_gallery, num_others) == (len(np.unique(labels)), num_distractors)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_and_chunk_gives_the_same(world_size):
    wanted = case(80, 10, 33, 1, 1000)
    for chunk in (3, 32):
        assert run_ranks(case, world_size, 80, 10, 33, 1, chunk) == [wanted] * world_size


@pytest.mark.slow
def test_fewer_probes_than_ranks():
    wanted = case(3, 1, 5, 0, 1000)
    assert wanted[1] == 2
    assert run_ranks(case, 3, 3, 1, 5, 0, 1000) == [wanted] * 3


def test_perfect_embeddings_are_found_and_collapsed_ones_are_not():
    labels = np.arange(20) // 2
    assert identify(torch.eye(10)[labels], labels).rank1 == 1.0
    collapsed = torch.nn.functional.normalize(torch.ones(20, 10))
    assert identify(collapsed, labels).rank1 == 0.0
    assert identify(collapsed, labels).cmc[9] == 1.0  # all ten tie: each is tenth


def test_a_tie_with_a_distractor_counts_against_us():
    labels = np.array([0, 0, 1, 1])
    embeddings = torch.eye(3)[labels]
    assert identify(embeddings, labels, distractors=torch.eye(3)[[2]]).rank1 == 1.0
    assert identify(embeddings, labels, distractors=torch.eye(3)[[0]]).rank1 == 0.5


def test_the_gallery_is_one_sample_of_each_identity_and_follows_the_seed():
    labels = np.random.default_rng(0).permutation(np.arange(300) // 6) + 5
    gallery, own = choose_gallery(labels, seed=0)
    assert sorted(labels[gallery]) == sorted(set(labels))
    assert (labels[gallery[own]] == labels).all()
    assert (choose_gallery(labels, seed=0)[0] == gallery).all()
    assert (choose_gallery(labels, seed=1)[0] != gallery).any()


def test_without_probes_there_is_an_error():
    with pytest.raises(ValueError, match="no probe is left"):
        identify(torch.eye(3), np.arange(3))


# ---- open set


def naive_dir(embeddings, labels, far, seed):
    """Every threshold that a score gives is tried, probe by probe; returns (DIR, FAR reached, threshold)."""
    known = set(choose_known(labels, seed).tolist())
    samples = [i for i, label in enumerate(labels) if label in known]
    gallery = [samples[g] for g in choose_gallery(labels[samples], seed)[0]]
    exact = on_grid(embeddings)

    def score(a, b):
        return float((exact[a] * exact[b]).sum())

    best_of_unknown = [max(score(i, g) for g in gallery) for i in range(len(labels)) if labels[i] not in known]
    probes = [i for i in samples if i not in gallery]
    own = [next(score(i, g) for g in gallery if labels[g] == labels[i]) for i in probes]
    rival = [max([score(i, g) for g in gallery if labels[g] != labels[i]], default=-np.inf) for i in probes]
    candidates = sorted({np.nextafter(s, np.inf) for s in best_of_unknown} | {-2.0})
    rates = [sum(s >= t for s in best_of_unknown) / len(best_of_unknown) for t in candidates]
    threshold, reached = next((t, r) for t, r in zip(candidates, rates, strict=True) if r <= far)
    return sum(o >= threshold and o > r for o, r in zip(own, rival, strict=True)) / len(probes), reached, threshold


def open_case(n, identities, seed, chunk):
    embeddings, labels = embeddings_and_labels(n, 6, identities, seed)
    found = detect_and_identify(embeddings, labels, FARS, seed=seed, chunk=chunk)
    numbers = (found.num_gallery, found.num_known, found.num_unknown)
    return found.dir.tolist(), found.far.tolist(), found.threshold.tolist(), numbers


FARS = (0.0, 0.01, 0.1, 0.3, 0.9)


@pytest.mark.parametrize(("n", "identities"), [(90, 12), (91, 30), (9, 2)])
def test_dir_is_the_naive_search(n, identities):
    embeddings, labels = embeddings_and_labels(n, 6, identities, 3)
    rates, reached, thresholds, (num_gallery, num_known, num_unknown) = open_case(n, identities, 3, chunk=7)
    assert list(zip(rates, reached, thresholds, strict=True)) == [naive_dir(embeddings, labels, far, 3) for far in FARS]
    assert all(got <= wanted for got, wanted in zip(reached, FARS, strict=True))
    assert num_gallery + num_known + num_unknown == n
    assert num_gallery == np.count_nonzero(np.unique(labels, return_counts=True)[1] > 1) // 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_dir_is_the_same_at_any_number_of_ranks_and_chunk(world_size):
    wanted = open_case(80, 10, 1, 1000)
    for chunk in (3, 32):
        assert run_ranks(open_case, world_size, 80, 10, 1, chunk) == [wanted] * world_size


def test_dir_of_perfect_and_of_collapsed_embeddings():
    labels = np.arange(40) // 2
    perfect = detect_and_identify(torch.eye(20)[labels], labels, [0.0, 0.01])
    assert perfect.dir.tolist() == [1.0, 1.0] and perfect.far.tolist() == [0.0, 0.0]
    collapsed = torch.nn.functional.normalize(torch.ones(40, 20))
    assert detect_and_identify(collapsed, labels, [0.0, 0.5]).dir.tolist() == [0.0, 0.0]


def test_a_tie_with_an_unknown_probe_is_rejected():
    """Both samples of the known identity coincide with an unknown one: no threshold parts them."""
    labels = np.array([0, 0, 1, 1])
    same = torch.eye(2)[[0, 0, 0, 0]]
    assert detect_and_identify(same, labels, [0.0, 0.49]).dir.tolist() == [0.0, 0.0]
    assert detect_and_identify(torch.eye(2)[labels], labels, [0.0, 0.49]).dir.tolist() == [1.0, 1.0]


def test_a_tie_for_the_best_place_is_no_identification():
    """The two known identities coincide, the unknown ones are far from them: detected, and not identified."""
    labels = np.arange(8) // 2
    known = choose_known(labels, 0)
    assert len(known) == 2
    vectors = torch.eye(4)
    apart = vectors[labels]
    together = vectors[[int(known[0]) if label in known else label for label in labels]]
    assert detect_and_identify(apart, labels, [0.0]).dir.tolist() == [1.0]
    assert detect_and_identify(together, labels, [0.0]).dir.tolist() == [0.0]


def test_a_far_that_the_unknown_probes_cannot_show_is_null():
    embeddings, labels = embeddings_and_labels(90, 6, 12, 3)
    assert open_set(embeddings, labels, 0) == {"0.01": None}
    assert open_set(torch.eye(3), np.arange(3), 0) == {"0.01": None}
    embeddings, labels = embeddings_and_labels(900, 6, 12, 3)
    found = open_set(embeddings, labels, 0)["0.01"]
    assert found["far"] <= 0.01 and 0 <= found["dir"] <= 1 and found["num_gallery"] == 6
    with pytest.raises(ValueError, match="fewer than two identities have two samples"):
        detect_and_identify(torch.eye(3), np.arange(3), [0.1])
