"""Identification (1:N): whose is this sample? One gallery sample per identity, every other sample is a probe.

The work is divided over the ranks by probes. Scores are exact (see `scores`), so all ranks get the same
result, whatever their number.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from partial_fc.evaluate.scores import on_grid
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
    labels = np.asarray(labels)
    if embeddings.shape[0] != len(labels):
        raise ValueError(f"got {embeddings.shape[0]} embeddings and {len(labels)} labels, wanted as many of either")
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


def choose_gallery(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One sample per identity: (identities,) sample positions, and (n,) every sample's own gallery entry."""
    order = np.argsort(labels, kind="stable")
    _, first, identity, count = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    rng = np.random.Generator(np.random.Philox(seed_for("gallery", seed)))
    gallery = order[first + (rng.random(len(first)) * count).astype(np.int64)]
    own = np.empty(len(labels), dtype=np.int64)
    own[order] = identity
    return gallery, own
