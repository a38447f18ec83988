"""Verification over pairs of a set: every unordered one, divided over the ranks, or those of a list.

n samples of dimension D have n (n - 1) / 2 pairs, scored tile by tile: (chunk, D) x (D, chunk), each tile by one rank,
in float64 on the exact grid of `scores`. What is kept of the scores is the genuine ones, the highest impostor ones,
counts in bins, and the extreme pairs; all of it equal on all ranks and independent of the number of ranks, of
`chunk` and of the device.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from partial_fc.evaluate.scores import on_grid
from partial_fc.evaluate.verification import false_accepts_allowed, tar_at_far_sorted
from partial_fc.parallel.distributed import gather_objects, rank, world_size

BINS = 2048  # a power of two: bin edges -1 + i / 1024 are exact
COMPACT_AT = 2**20  # scores: candidates for the highest are sorted out in batches of this size (8 MiB)

Pair = tuple[int, int, float]  # sample positions i < j, score


@dataclass(frozen=True, eq=False)
class PairScores:
    """What all pairs of a set came to. G genuine pairs, K kept impostor scores."""

    genuine: np.ndarray  # (G,) float64, ascending
    impostor: np.ndarray  # (K,) float64, ascending: the highest of num_impostor
    num_impostor: int
    genuine_counts: np.ndarray  # (BINS,) int64; bin i is [-1 + 2 i / BINS, -1 + 2 (i + 1) / BINS)
    impostor_counts: np.ndarray  # (BINS,) int64
    lowest_genuine: list[Pair]  # hardest first; equal scores in the order of (i, j)
    highest_impostor: list[Pair]

    def tar_at_far(self, far: float) -> tuple[float, float, float]:
        """As `verification.tar_at_far`, for every far up to the max_far of `all_pairs`."""
        return tar_at_far_sorted(self.genuine, self.impostor, self.num_impostor, far)

    def roc(self, points: int = 100) -> list[tuple[float, float]]:
        """(far_reached, tar), ascending, at log-spaced FARs from one impostor pair to all of them.

        Each is the conservative point of its FAR; beyond the kept impostor scores thresholds are bin edges.
        """
        genuine_above = np.cumsum(self.genuine_counts[::-1])
        impostor_above = np.cumsum(self.impostor_counts[::-1])
        curve = set()
        for far in np.logspace(-np.log10(self.num_impostor), 0, points):
            if far < 1 and false_accepts_allowed(far, self.num_impostor) < len(self.impostor):
                tar, _, far_reached = self.tar_at_far(far)
            else:
                edge = np.searchsorted(impostor_above, far * self.num_impostor, side="right") - 1
                if edge < 0:  # the first bin alone exceeds this FAR
                    continue
                tar = genuine_above[edge] / len(self.genuine)
                far_reached = impostor_above[edge] / self.num_impostor
            curve.add((float(far_reached), float(tar)))
        return sorted(curve)


def all_pairs(
    embeddings: Tensor, labels: np.ndarray, *, max_far: float, chunk: int = 2048, hardest: int = 8
) -> PairScores:
    """Score every unordered pair of samples.

    In, equal on all ranks: (n, D) normalized embeddings on any device, (n,) int labels. Out, equal on all
    ranks: enough for TAR at every FAR up to `max_far` exactly, and the `hardest` pairs of either kind.
    Memory: n D float64, four tiles of chunk x chunk, G genuine and max_far x num_impostor impostor scores.

    Raises ValueError if the set has no genuine or no impostor pair.
    """
    labels = np.asarray(labels)
    n = len(labels)
    if embeddings.shape[0] != n:
        raise ValueError(f"got {embeddings.shape[0]} embeddings and {n} labels, wanted as many of either")
    sizes = np.unique(labels, return_counts=True)[1]
    num_genuine = int((sizes * (sizes - 1) // 2).sum())
    num_impostor = n * (n - 1) // 2 - num_genuine
    if num_genuine == 0 or num_impostor == 0:
        raise ValueError(
            f"got {num_genuine} genuine and {num_impostor} impostor pairs, wanted some of both: "
            "a set needs two identities or more, and an identity with two samples or more"
        )
    # Sorted by identity, genuine pairs lie in tiles along the diagonal and all other tiles need no mask.
    order = np.argsort(labels, kind="stable")
    exact = on_grid(embeddings)[torch.from_numpy(order).to(embeddings.device)]
    identity = torch.from_numpy(np.ascontiguousarray(labels[order])).to(embeddings.device)
    position = torch.from_numpy(order).to(embeddings.device)

    genuine: list[Tensor] = []
    highest = _Highest(min(false_accepts_allowed(max_far, num_impostor) + 1, num_impostor))
    counts = torch.zeros(2, BINS, dtype=torch.int64, device=embeddings.device)
    lowest_genuine, highest_impostor = _Hardest(hardest, sign=-1), _Hardest(hardest, sign=1)

    starts = range(0, n, chunk)
    tiles = [(row, column) for row in starts for column in starts if row <= column][rank() :: world_size()]
    for row, column in tqdm(tiles, desc="all pairs", unit=" tiles", mininterval=1, delay=2, disable=rank() > 0):
        rows, columns = slice(row, row + chunk), slice(column, column + chunk)
        scores = exact[rows] @ exact[columns].T
        if row == column or identity[rows][-1] == identity[columns][0]:
            same = identity[rows, None] == identity[None, columns]
            once = torch.ones_like(same).triu_(1) if row == column else torch.ones_like(same)
            different, same = once & ~same, once & same
            impostor = scores[different]
            genuine.append(scores[same])
            counts[0] += _binned(genuine[-1])
            lowest_genuine.add(genuine[-1], _pair_finder(position[rows], position[columns], same))
        else:
            different, impostor = None, scores.flatten()
        counts[1] += _binned(impostor)
        highest.add(impostor)
        highest_impostor.add(impostor, _pair_finder(position[rows], position[columns], different))

    return _merge(genuine, highest, counts, lowest_genuine, highest_impostor, num_impostor)


def listed_pairs(embeddings: Tensor, pairs: np.ndarray, *, hardest: int = 8) -> tuple[PairScores, np.ndarray]:
    """Score the pairs of a list, (P, 3) as an index has it; each rank for itself.

    In: (n, D) normalized embeddings. Out: as `all_pairs`, every score kept, and the (P,) float64 scores. Memory: n D
    float64, and P scores. Raises ValueError if there is no genuine or no impostor pair.
    """
    same = pairs[:, 2] == 1
    if same.all() or not same.any():
        raise ValueError(f"got {same.sum()} genuine and {(~same).sum()} impostor pairs, wanted some of both")
    score = listed_scores(embeddings, pairs)
    low, high = np.sort(pairs[:, :2], axis=1).T

    def first(chosen: np.ndarray, sign: int) -> list[Pair]:
        rows = np.flatnonzero(chosen)
        rows = rows[np.lexsort((high[rows], low[rows], -sign * score[rows]))[:hardest]]
        return [(int(low[row]), int(high[row]), float(score[row])) for row in rows]

    found = PairScores(
        genuine=np.sort(score[same]),
        impostor=np.sort(score[~same]),
        num_impostor=int((~same).sum()),
        genuine_counts=_binned(torch.from_numpy(score[same])).numpy(),
        impostor_counts=_binned(torch.from_numpy(score[~same])).numpy(),
        lowest_genuine=first(same, -1),
        highest_impostor=first(~same, 1),
    )
    return found, score


def listed_scores(embeddings: Tensor, pairs: np.ndarray, chunk: int = 2**14) -> np.ndarray:
    """(n, D) normalized embeddings and the positions in the first two columns of (P, ...) to (P,) float64 scores."""
    exact = on_grid(embeddings)
    first, second = torch.tensor(pairs[:, :2]).to(exact.device).T
    parts = [(exact[a] * exact[b]).sum(dim=1) for a, b in zip(first.split(chunk), second.split(chunk), strict=True)]
    return torch.cat(parts).cpu().numpy()


def _merge(
    genuine: list[Tensor],
    highest: "_Highest",
    counts: Tensor,
    lowest_genuine: "_Hardest",
    highest_impostor: "_Hardest",
    num_impostor: int,
) -> PairScores:
    """All ranks' parts, as one result on all ranks."""
    ours = (
        np.concatenate([np.empty(0), *(part.cpu().numpy() for part in genuine)]),
        highest.values(),
        counts.cpu().numpy(),
        lowest_genuine.best,
        highest_impostor.best,
    )
    genuines, tops, all_counts, lowest, hardest = zip(*gather_objects(ours), strict=True)
    summed = np.sum(all_counts, axis=0)
    return PairScores(
        genuine=np.sort(np.concatenate(genuines)),
        impostor=np.sort(np.concatenate(tops))[-highest.keep :],
        num_impostor=num_impostor,
        genuine_counts=summed[0],
        impostor_counts=summed[1],
        lowest_genuine=lowest_genuine.merged(lowest),
        highest_impostor=highest_impostor.merged(hardest),
    )


def _binned(scores: Tensor) -> Tensor:
    bins = ((scores + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS)


class _Highest:
    """The `keep` highest of the scores added so far."""

    def __init__(self, keep: int):
        self.keep = keep
        self.parts: list[Tensor] = []
        self.waiting = 0
        self.floor = -float("inf")

    def add(self, scores: Tensor) -> None:
        candidates = scores[scores >= self.floor]
        self.parts.append(candidates)
        self.waiting += len(candidates)
        if self.waiting >= COMPACT_AT:
            self._compact()

    def _compact(self) -> None:
        scores = torch.cat(self.parts)
        if len(scores) >= self.keep:
            scores = scores.topk(self.keep, sorted=False).values
            self.floor = scores.min().item()
        self.parts, self.waiting = [scores], 0

    def values(self) -> np.ndarray:
        if self.parts:
            self._compact()
        return np.concatenate([np.empty(0), *(part.cpu().numpy() for part in self.parts)])


class _Hardest:
    """The `keep` pairs whose sign * score is highest; equal scores in the order of (i, j)."""

    def __init__(self, keep: int, sign: int):
        self.keep, self.sign = keep, sign
        self.best: list[Pair] = []

    def add(self, scores: Tensor, find: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """`find` turns places in the (m,) scores of a tile into two vectors of sample positions."""
        if not self.keep or not len(scores):
            return
        signed = scores * self.sign
        full = len(self.best) == self.keep
        if full and signed.max().item() < self.best[-1][2] * self.sign:
            return  # nearly every tile ends here
        limit = signed.topk(min(self.keep, len(signed))).values[-1]
        # of a collapsed network millions of pairs may tie: the first are chosen before they leave the tensors
        for places in ((signed > limit).nonzero()[:, 0], (signed == limit).nonzero()[:, 0]):
            one, other = find(places)
            low, high = torch.minimum(one, other), torch.maximum(one, other)
            first = ((low << 32) + high).argsort()[: self.keep]
            found = zip(low[first].tolist(), high[first].tolist(), scores[places[first]].tolist(), strict=True)
            self.best = self.merged([self.best, list(found)])

    def merged(self, lists: Iterable[list[Pair]]) -> list[Pair]:
        pairs = [pair for part in lists for pair in part]
        return sorted(pairs, key=lambda pair: (-self.sign * pair[2], pair[0], pair[1]))[: self.keep]


def _pair_finder(
    row_positions: Tensor, column_positions: Tensor, mask: Tensor | None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Turns places in a tile's scores, taken where `mask` is true, into sample positions."""

    def find(places: Tensor) -> tuple[Tensor, Tensor]:
        if mask is None:
            width = len(column_positions)
            return row_positions[places // width], column_positions[places % width]
        row, column = mask.nonzero()[places].T
        return row_positions[row], column_positions[column]

    return find
