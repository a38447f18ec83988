"""Verification (1:1): are two samples of the same identity?

The accepted pairs are those with score >= threshold. TAR is the accepted share of the genuine pairs (same
identity), FAR that of the impostor pairs.
"""

from collections.abc import Sequence

import numpy as np

from partial_fc.seeds import seed_for


def tar_at_far(score: np.ndarray, same: np.ndarray, far: float | Sequence[float]) -> tuple:
    """The true accept rate where the false accept rate does not exceed `far`.

    score (n,) float; same (n,) bool. Returns (tar, threshold, far_reached): three floats, or three (k,)
    arrays if `far` is a sequence of k. The threshold is the smallest one whose FAR does not exceed `far`; so
    pairs tied with the first impostor too many are all rejected, and where no false accept is allowed the
    threshold lies just above the highest impostor score. InsightFace's code for IJB takes the point nearest to
    the target instead, its code for lists of pairs a threshold interpolated on nine folds for the tenth: both may
    exceed the target.

    Raises ValueError unless there is a genuine and an impostor pair, all scores are finite and 0 <= far < 1.
    """
    score, same = _checked(score, same)
    genuine, impostor = np.sort(score[same]), np.sort(score[~same])
    if not isinstance(far, Sequence | np.ndarray):
        return tar_at_far_sorted(genuine, impostor, len(impostor), float(far))
    results = [tar_at_far_sorted(genuine, impostor, len(impostor), float(f)) for f in far]
    return tuple(np.array(column) for column in zip(*results, strict=True))


def tar_at_far_sorted(
    genuine: np.ndarray, impostor: np.ndarray, num_impostor: int, far: float
) -> tuple[float, float, float]:
    """`tar_at_far` from ascending (G,) genuine and the ascending highest (K,) of num_impostor impostor scores."""
    allowed = false_accepts_allowed(far, num_impostor)
    if allowed >= len(impostor):
        raise ValueError(
            f"FAR {far:g} of {num_impostor} impostor pairs needs the {allowed + 1} highest impostor scores, "
            f"got {len(impostor)}: raise max_far"
        )
    highest_rejected = impostor[-1 - allowed]
    tar = np.count_nonzero(genuine > highest_rejected) / len(genuine)
    far_reached = np.count_nonzero(impostor > highest_rejected) / num_impostor
    # In the scores' own precision, or a comparison in float32 would round the threshold back onto the score.
    threshold = np.nextafter(highest_rejected, highest_rejected.dtype.type(np.inf))
    return tar, float(threshold), far_reached


def false_accepts_allowed(far: float, num_impostor: int) -> int:
    """The largest whole number of false accepts whose share of num_impostor is at most `far`."""
    if not 0 <= far < 1:
        raise ValueError(f"got far = {far}, wanted 0 <= far < 1")
    allowed = int(far * num_impostor)
    # The product may fall on the wrong side of a whole number: 0.29 * 100 is 28.999999999999996.
    return allowed + 1 if (allowed + 1) / num_impostor <= far else allowed


def fold_accuracy(score: np.ndarray, same: np.ndarray, folds: int | np.ndarray = 10) -> tuple[float, float, np.ndarray]:
    """The accuracy of the LFW protocol: a fold is judged by the threshold that is best on all other folds.

    score (n,) float; same (n,) bool; folds (n,) int, the fold of each pair, or a number of folds: the pairs
    are then cut into so many runs of equal length, as LFW's list is. Returns (mean, std, thresholds): mean
    and population standard deviation of the folds' accuracies, and the (folds,) thresholds in ascending order
    of fold.

    Every distinct score, and one just above the highest, is tried. Of thresholds that are equally good on the
    other folds the highest is taken, the one that accepts least. (LFW, Huang et al. 2007, section 4; its code
    tried a grid.)

    Raises ValueError on fewer than two folds, an empty fold, or scores that are not finite.
    """
    score, same = _checked(score, same)
    n = len(score)
    if isinstance(folds, int | np.integer):
        if not 2 <= folds <= n:
            raise ValueError(f"got {folds} folds for {n} pairs, wanted 2 to {n}")
        folds = _cut(n, int(folds))
    folds = np.asarray(folds)
    if folds.shape != score.shape:
        raise ValueError(f"got folds of shape {folds.shape}, wanted {score.shape}: the fold of each pair")
    names = np.unique(folds)
    if len(names) < 2:
        raise ValueError("got a single fold, wanted two or more: a threshold is chosen on the other folds")

    order = np.argsort(-score, kind="stable")
    score, same, folds = score[order], same[order], folds[order]
    accuracies, thresholds = [], []
    for name in names:
        held_out = folds == name
        threshold = _best_threshold(score[~held_out], same[~held_out])
        accuracies.append(np.mean((score[held_out] >= threshold) == same[held_out]))
        thresholds.append(threshold)
    return float(np.mean(accuracies)), float(np.std(accuracies)), np.array(thresholds)


def folds_of_list(same: np.ndarray, folds: int = 10) -> np.ndarray:
    """(P,) bool, of a list, to the fold (P,) int of each pair: pairs of either kind are cut, in the list's order, into
    parts that differ by one at most.

    So a list like LFW's, fold after fold with as many of either kind, has its own folds, and one that is sorted by kind
    has folds of both kinds all the same.
    """
    fold = np.empty(len(same), dtype=np.int64)
    for kind in (same, ~same):
        fold[kind] = _cut(int(np.count_nonzero(kind)), folds)
    return fold


def _cut(n: int, folds: int) -> np.ndarray:
    return np.repeat(np.arange(folds), np.diff(np.arange(folds + 1) * n // folds))


def _best_threshold(score: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the most right answers; of several the highest. `score` descends."""
    just_above = np.nextafter(score[0], score.dtype.type(np.inf))
    # Accepting the first k pairs is a threshold only where the score changes after them.
    ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    right = np.cumsum(np.where(same, 1, -1))[ends]  # beyond the answers that rejecting every pair gets right
    best = int(np.argmax(right))  # the first: the highest threshold
    return score[ends[best]] if right[best] > 0 else just_above


def verification_pairs(
    labels: np.ndarray, seed: int, pairs_per_fold: int = 300, folds: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair list in the manner of LFW: folds of disjoint identities, half genuine and half impostor pairs.

    labels (n,) int. Returns (pairs (m, 2) sample positions, same (m,) bool, fold (m,) int), in the order of
    the folds, drawn without replacement. A fold holds `pairs_per_fold` pairs of either kind, or as many as
    the poorest fold has to give.

    Raises ValueError if some fold would get no identity with two samples, or only one identity.
    """
    identities, identity, count = np.unique(labels, return_inverse=True, return_counts=True)
    pairable = np.count_nonzero(count > 1)
    if pairable < folds or len(identities) < 2 * folds:
        raise ValueError(
            f"got {len(identities)} identities, {pairable} of them with two samples or more, for {folds} folds; "
            f"wanted at least {2 * folds}, {folds} of them with two samples: use fewer folds or more identities"
        )
    rng = np.random.Generator(np.random.Philox(seed_for("verification pairs", seed)))
    shuffled = rng.permutation(len(identities))
    dealt = shuffled[np.argsort(count[shuffled] == 1, kind="stable")]  # single samples last: every fold gets pairs
    fold_of_identity = np.empty(len(identities), dtype=np.int64)
    fold_of_identity[dealt] = np.arange(len(identities)) % folds

    fold_of_sample = fold_of_identity[identity]
    genuine, impostor = [], []
    for fold in range(folds):
        members = np.flatnonzero(fold_of_sample == fold)
        members = members[np.argsort(identity[members], kind="stable")]
        genuine.append(_draw_genuine(rng, members, identity[members], pairs_per_fold))
        impostor.append(_draw_impostor(rng, members, identity[members], pairs_per_fold))
    each = min(len(drawn) for drawn in genuine + impostor)
    pairs = [drawn[:each] for both in zip(genuine, impostor, strict=True) for drawn in both]
    same = np.tile(np.repeat([True, False], each), folds)
    return np.concatenate(pairs), same, np.repeat(np.arange(folds), 2 * each)


def _draw_genuine(rng: np.random.Generator, members: np.ndarray, identity: np.ndarray, wanted: int) -> np.ndarray:
    """Up to `wanted` of the genuine pairs of `members`, which are sorted by identity; (k, 2)."""
    first, size = np.unique(identity, return_index=True, return_counts=True)[1:]
    ends = np.cumsum(size * (size - 1) // 2)
    drawn = rng.choice(ends[-1], min(wanted, int(ends[-1])), replace=False)
    which = np.searchsorted(ends, drawn, side="right")
    within = drawn - (ends[which] - size[which] * (size[which] - 1) // 2)
    low, high = _unordered_pair(within)
    return members[first[which][:, None] + np.stack([low, high], axis=1)]


def _draw_impostor(rng: np.random.Generator, members: np.ndarray, identity: np.ndarray, wanted: int) -> np.ndarray:
    """Up to `wanted` of the impostor pairs of `members`; (k, 2)."""
    total = len(members) * (len(members) - 1) // 2
    size = min(2 * wanted, total)
    while True:
        low, high = _unordered_pair(rng.choice(total, size, replace=False))
        different = identity[low] != identity[high]
        if np.count_nonzero(different) >= wanted or size == total:
            chosen = np.stack([low, high], axis=1)[different][:wanted]
            return members[chosen]
        size = min(2 * size, total)


def _unordered_pair(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair low < high of which number = high (high - 1) / 2 + low."""
    high = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
    high -= high * (high - 1) // 2 > number  # the square root may be off by one
    high += high * (high + 1) // 2 <= number
    return number - high * (high - 1) // 2, high


def _checked(score: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    score, same = np.asarray(score), np.asarray(same).astype(bool)
    if score.ndim != 1 or score.shape != same.shape:
        raise ValueError(f"got scores {score.shape} and same {same.shape}, wanted two vectors of one length")
    if not np.issubdtype(score.dtype, np.floating):
        score = score.astype(np.float64)
    if not np.isfinite(score).all():
        raise ValueError(f"score {int(np.argmin(np.isfinite(score)))} is not finite: training has diverged")
    if same.all() or not same.any():
        raise ValueError(
            f"got {np.count_nonzero(same)} genuine and {np.count_nonzero(~same)} impostor pairs, wanted some of both"
        )
    return score, same
