"""Identification against a search written out probe by probe, ties, and any number of ranks."""

import numpy as np
import pytest
import torch

from partial_fc.evaluate.identification import choose_gallery, identify
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
