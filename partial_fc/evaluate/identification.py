"""Identification (1:N): whose is this sample? One gallery sample per identity, every other sample is a probe.

Closed set (`identify`): every probe's identity is in the gallery. Open set (`detect_and_identify`): some are unknown
and must be rejected. The work is divided over the ranks by probes. Scores are exact (see `scores`), so all ranks get
the same result, whatever their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from partial_fc.evaluate.scores import on_grid
from partial_fc.evaluate.verification import false_accepts_allowed
from partial_fc.parallel.distributed import gather_objects, part, rank, world_size
from partial_fc.seeds import seed_for


@dataclass(frozen=True, eq=False)
class Identification:
    """`cmc[k - 1]` is the share of the probes whose own identity is among the k best of the gallery."""

    num_probes: int
    num_gallery: int  # identities, without the distractors
    num_distractors: int
    cmc: np.ndarray  # (max_rank,) float64

    @property
    def rank1(self) -> float:
        return float(self.cmc[0])


def identify(
    embeddings: Tensor,
    labels: np.ndarray,
    *,
    distractors: Tensor | None = None,
    seed: int = 0,
    chunk: int = 2048,
    max_rank: int = 20,
) -> Identification:
    """Rank every probe's own gallery sample among the gallery of all identities and the distractors.

    In, equal on all ranks: (n, D) normalized embeddings; (n,) int labels; (d, D) normalized embeddings of
    samples whose identities are not among the labels. Out, equal on all ranks. An identity of one sample is
    in the gallery without probes.

    The rank of a probe is the number of gallery entries that score at least as high as its own: a tie counts
    against us. A network that maps everything to one point so gets 0, not 1.

    Raises ValueError if no identity has two samples.
    """
    labels = _checked(embeddings, labels)
    gallery, own = choose_gallery(labels, seed)
    is_probe = np.ones(len(labels), dtype=bool)
    is_probe[gallery] = False
    probes = np.flatnonzero(is_probe)
    if not len(probes):
        raise ValueError(f"got {len(labels)} identities of one sample each, wanted one with two: no probe is left")

    exact = on_grid(embeddings)
    known = exact[torch.from_numpy(gallery).to(exact.device)]
    others = known[:0] if distractors is None else on_grid(distractors.to(exact.device))
    blocks = [*known.split(chunk), *others.split(chunk)]

    ours = probes[np.asarray(part(len(probes), rank(), world_size()), dtype=np.int64)]
    ranks = [np.empty(0, dtype=np.int64)]
    starts = range(0, len(ours), chunk)
    for start in tqdm(starts, desc="identification", unit=" blocks", mininterval=1, delay=2, disable=rank() > 0):
        chosen = ours[start : start + chunk]
        probe = exact[torch.from_numpy(chosen).to(exact.device)]
        own_score = (probe * known[torch.from_numpy(own[chosen]).to(exact.device)]).sum(dim=1, keepdim=True)
        # The count includes its own entry, since an exact score has the same bits in either product.
        rank_of = sum((probe @ block.T >= own_score).sum(dim=1) for block in blocks)
        ranks.append(rank_of.cpu().numpy())

    rank_of_probe = np.concatenate([r for parts in gather_objects(ranks) for r in parts])
    cmc = (rank_of_probe[:, None] <= np.arange(1, max_rank + 1)).mean(axis=0)
    return Identification(len(probes), len(gallery), len(others), cmc)


@dataclass(frozen=True, eq=False)
class OpenSet:
    """Detection and identification rates at thresholds that unknown probes decide; one of each a wanted FAR."""

    num_gallery: int  # known identities, one sample each
    num_known: int  # probes of them
    num_unknown: int  # probes of all other identities
    dir: np.ndarray  # (F,) float64
    far: np.ndarray  # (F,) float64, reached: at most the wanted one
    threshold: np.ndarray  # (F,) float64; a score is accepted from here on


def detect_and_identify(
    embeddings: Tensor, labels: np.ndarray, far: Sequence[float], *, seed: int = 0, chunk: int = 2048
) -> OpenSet:
    """DIR@FAR, open-set identification at rank 1 as in BLUFR (Liao et al., IJCB 2014), over one seeded split.

    In, equal on all ranks: (n, D) normalized embeddings; (n,) int labels. Out, equal on all ranks. Half of the
    identities with two samples or more (the smaller half) are known. Gallery: one sample of each known identity. Known
    probes: their other samples. Unknown probes: all samples of all other identities.

    FAR is the share of the unknown probes whose best gallery score is accepted; the threshold is the lowest at which it
    does not exceed the wanted one. DIR is the share of the known probes whose own gallery sample scores higher than all
    others and is accepted. A tie counts against us: for the best place, and at the threshold, where scores that are
    equal to the first rejected one of an unknown probe are rejected.

    Raises ValueError unless two identities have two samples, and 0 <= far < 1.
    """
    labels = _checked(embeddings, labels)
    known_identities = choose_known(labels, seed)
    if not len(known_identities):
        raise ValueError(
            "fewer than two identities have two samples, wanted a known one with a probe and an unknown one"
        )
    is_known = np.isin(labels, known_identities)
    samples = np.flatnonzero(is_known)
    gallery, own = choose_gallery(labels[samples], seed)
    own_of = np.full(len(labels), -1)
    own_of[samples] = own
    is_probe = np.ones(len(labels), dtype=bool)
    is_probe[samples[gallery]] = False
    probes = np.flatnonzero(is_probe)

    exact = on_grid(embeddings)
    known = exact[torch.from_numpy(samples[gallery]).to(exact.device)]
    ours = probes[np.asarray(part(len(probes), rank(), world_size()), dtype=np.int64)]
    found = [np.empty((0, 2))]
    starts = range(0, len(ours), chunk)
    for start in tqdm(
        starts, desc="open-set identification", unit=" blocks", mininterval=1, delay=2, disable=rank() > 0
    ):
        chosen = ours[start : start + chunk]
        probe = exact[torch.from_numpy(chosen).to(exact.device)]
        column = torch.from_numpy(own_of[chosen]).to(exact.device)[:, None]  # -1: of an unknown identity
        own_score = (probe * known[column[:, 0].clamp_min(0)]).sum(dim=1, keepdim=True)
        rival = torch.full_like(own_score, -torch.inf)
        for first in range(0, len(known), chunk):
            block = known[first : first + chunk]
            others = torch.arange(first, first + len(block), device=exact.device) != column
            score = torch.where(others, probe @ block.T, -torch.inf)
            rival = torch.maximum(rival, score.max(dim=1, keepdim=True).values)
        found.append(torch.cat([own_score, rival], dim=1).cpu().numpy())

    own_score, rival = np.concatenate([rows for parts in gather_objects(found) for rows in parts]).T
    unknown = ~is_known[probes]
    best_of_unknown = np.sort(rival[unknown])
    identified = np.sort(own_score[~unknown & (own_score > rival)])
    num_known, num_unknown = int(np.count_nonzero(~unknown)), len(best_of_unknown)
    allowed = np.array([false_accepts_allowed(float(one), num_unknown) for one in far], dtype=np.int64)
    rejected = best_of_unknown[num_unknown - 1 - allowed]
    return OpenSet(
        num_gallery=len(gallery),
        num_known=num_known,
        num_unknown=num_unknown,
        dir=(len(identified) - np.searchsorted(identified, rejected, side="right")) / num_known,
        far=(num_unknown - np.searchsorted(best_of_unknown, rejected, side="right")) / num_unknown,
        threshold=np.nextafter(rejected, np.inf),
    )


def choose_known(labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels of the known identities: a seeded half, rounded down, of those with two samples or more."""
    identities, count = np.unique(labels, return_counts=True)
    several = identities[count > 1]
    rng = np.random.Generator(np.random.Philox(seed_for("known identities", seed)))
    return np.sort(rng.permutation(several)[: len(several) // 2])


def choose_gallery(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One sample per identity: (identities,) sample positions, and (n,) every sample's own gallery entry."""
    order = np.argsort(labels, kind="stable")
    _, first, identity, count = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    rng = np.random.Generator(np.random.Philox(seed_for("gallery", seed)))
    gallery = order[first + (rng.random(len(first)) * count).astype(np.int64)]
    own = np.empty(len(labels), dtype=np.int64)
    own[order] = identity
    return gallery, own


def _checked(embeddings: Tensor, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if embeddings.shape[0] != len(labels):
        raise ValueError(f"got {embeddings.shape[0]} embeddings and {len(labels)} labels, wanted as many of either")
    return labels
