"""What is measured of a backbone on a set, and the small table of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from partial_fc.data.shards import Index
from partial_fc.evaluate.embed import embed
from partial_fc.evaluate.identification import choose_gallery, detect_and_identify, identify
from partial_fc.evaluate.pairs import BINS, Pair, PairScores, all_pairs, listed_pairs, listed_scores
from partial_fc.evaluate.verification import fold_accuracy, folds_of_list, verification_pairs
from partial_fc.seeds import seed_for

FARS = ("0.001", "0.0001", "1e-05")  # the keys in evaluation.json
DIR_FARS = ("0.01",)
FOLDS = 10
PAIRS_PER_FOLD = 300  # of either kind, as in LFW
HISTOGRAM_BINS = 128
EXAMPLES = 6  # pairs of either kind in each group
COLUMNS = ("10-fold", "TAR@1e-3", "TAR@1e-4", "TAR@1e-5", "rank-1", "DIR@1%")


def evaluate_sets(
    backbone: nn.Module, sets: Mapping[str, tuple[Index, Index | None]], *, seed: int = 0, **embedding
) -> dict[str, dict]:
    """The result of every set, under its name: what evaluation.json holds for one model.

    A set is its data and its distractors, or None. One sample of each distractor identity enlarges the gallery of
    rank-1; verification and DIR know no distractors. A list of pairs has verification alone. `seed` chooses these
    samples, the gallery's, the known identities of DIR, and the pairs of the 10-fold accuracy; `embedding` holds the
    options of `embed`. In and out equal on all ranks. Sets that share data share its embeddings, verification and DIR.
    """
    embeddings: dict[Path, Tensor] = {}
    others: dict[Path, Tensor] = {}
    without_distractors: dict[Path, dict] = {}
    results = {}
    for name, (index, distractors) in sets.items():
        if index.path not in embeddings:
            found = embeddings[index.path] = embed(backbone, index, **embedding)
            dirs = open_set(found, index.label, seed) if index.pairs is None else dict.fromkeys(DIR_FARS)
            without_distractors[index.path] = verify(found, index.label, seed, index.pairs) | {"dir_at_far": dirs}
        if distractors is not None and distractors.path not in others:
            others[distractors.path] = _embed_distractors(backbone, distractors, seed, embedding)
        distracting = None if distractors is None else others[distractors.path]
        results[name] = {
            "data": str(index.path),
            "fingerprint": index.fingerprint,
            "distractors": None if distractors is None else str(distractors.path),
            **_closed_set(embeddings[index.path], index, distracting, seed),
            **without_distractors[index.path],
        }
    return results


def evaluate_set(backbone: nn.Module, index: Index, distractors: Index | None = None, **options) -> dict:
    """The result of one set; `options` are those of `evaluate_sets`."""
    return evaluate_sets(backbone, {"": (index, distractors)}, **options)[""]


def _embed_distractors(backbone: nn.Module, distractors: Index, seed: int, embedding: Mapping) -> Tensor:
    """One sample of every identity, as in the gallery that they join."""
    return embed(backbone, distractors, np.sort(choose_gallery(distractors.label, seed)[0]), **embedding)


def _closed_set(embeddings: Tensor, index: Index, distractors: Tensor | None, seed: int) -> dict:
    if index.pairs is not None:
        return {"num_distractors": 0, "num_gallery": 0, "num_probes": 0, "rank1": None, "cmc": []}
    found = identify(embeddings, index.label, distractors=distractors, seed=seed)
    return {
        "num_distractors": found.num_distractors,
        "num_gallery": found.num_gallery,
        "num_probes": found.num_probes,
        "rank1": found.rank1,
        "cmc": found.cmc.tolist(),
    }


def verify(embeddings: Tensor, labels: np.ndarray, seed: int, listed: np.ndarray | None = None) -> dict:
    """Verification of normalized embeddings (n, D), as plain numbers ready for JSON.

    TAR at FAR, ROC and histograms are over all pairs of the set. A FAR of which the set's impostor pairs do not
    allow one false accept is null. The 10-fold accuracy is over a seeded list of 10 x (300 + 300) pairs, or fewer
    where the set has no more (num_fold_pairs); null if the set has fewer than 20 identities, or fewer than 10 of two
    samples. With `listed` pairs, as an index has them, everything is over these, num_identities is null, and so is the
    10-fold accuracy of fewer than ten pairs of either kind.
    """
    labels = np.asarray(labels)
    counts = np.unique(labels, return_counts=True)[1]
    chosen = None
    if listed is not None:
        pairs, score = listed_pairs(embeddings, listed, hardest=EXAMPLES)
        if min(len(pairs.genuine), pairs.num_impostor) >= FOLDS:
            chosen, same = listed[:, :2], listed[:, 2] == 1
            fold = folds_of_list(same, FOLDS)
    else:
        pairs = all_pairs(embeddings, labels, max_far=max(map(float, FARS)), hardest=EXAMPLES)
        if np.count_nonzero(counts > 1) >= FOLDS and len(counts) >= 2 * FOLDS:
            chosen, same, fold = verification_pairs(labels, seed, PAIRS_PER_FOLD, FOLDS)
            score = listed_scores(embeddings, chosen)
    result: dict[str, Any] = {
        "num_samples": len(labels),
        "num_identities": len(counts) if listed is None else None,
        "num_genuine": len(pairs.genuine),
        "num_impostor": pairs.num_impostor,
        "fold_accuracy": None,
        "fold_accuracy_std": None,
        "fold_threshold": None,
        "num_fold_pairs": 0,
        "tar_at_far": {far: _at(pairs, far) for far in FARS},
        "roc": [list(point) for point in pairs.roc()],
        "histogram": {
            "edges": np.linspace(-1, 1, HISTOGRAM_BINS + 1).tolist(),
            "genuine": _coarse(pairs.genuine_counts),
            "impostor": _coarse(pairs.impostor_counts),
        },
        "examples": {
            "right": [],
            "wrong": [],
            "hardest": _examples(pairs.highest_impostor, False) + _examples(pairs.lowest_genuine, True),
        },
    }
    if chosen is not None:
        mean, std, thresholds = fold_accuracy(score, same, fold)
        result.update(
            fold_accuracy=mean,
            fold_accuracy_std=std,
            fold_threshold=float(thresholds.mean()),
            num_fold_pairs=len(chosen),
        )
        # By how much a pair is on the right side of the threshold that its fold was judged by.
        margin = np.where(same, score - thresholds[fold], thresholds[fold] - score)
        right = (score >= thresholds[fold]) == same
        result["examples"]["right"] = _typical(chosen, score, same, right, seed)
        result["examples"]["wrong"] = _worst(chosen, score, same, ~right, margin)
    return result


def open_set(embeddings: Tensor, labels: np.ndarray, seed: int) -> dict[str, dict | None]:
    """DIR at FAR of normalized embeddings (n, D), ready for JSON; see `detect_and_identify`.

    Null at a FAR of which the unknown probes do not allow one false accept, or where fewer than two identities have two
    samples.
    """
    if np.count_nonzero(np.unique(labels, return_counts=True)[1] > 1) < 2:
        return dict.fromkeys(DIR_FARS)
    found = detect_and_identify(embeddings, labels, [float(far) for far in DIR_FARS], seed=seed)
    return {
        far: None
        if found.num_unknown * float(far) < 1
        else {
            "dir": float(found.dir[i]),
            "far": float(found.far[i]),
            "threshold": float(found.threshold[i]),
            "num_gallery": found.num_gallery,
            "num_known": found.num_known,
            "num_unknown": found.num_unknown,
        }
        for i, far in enumerate(DIR_FARS)
    }


def _at(pairs: PairScores, far: str) -> dict[str, float] | None:
    if pairs.num_impostor * float(far) < 1:
        return None
    tar, threshold, far_reached = pairs.tar_at_far(float(far))
    return {"tar": tar, "far": far_reached, "threshold": threshold}


def _coarse(counts: np.ndarray) -> list[int]:
    return counts.reshape(HISTOGRAM_BINS, BINS // HISTOGRAM_BINS).sum(axis=1).tolist()


def _examples(pairs: Sequence[Pair], same: bool) -> list[dict]:
    return [{"a": int(a), "b": int(b), "score": float(score), "same": same} for a, b, score in pairs]


def _typical(pairs: np.ndarray, score: np.ndarray, same: np.ndarray, right: np.ndarray, seed: int) -> list[dict]:
    """Seeded random pairs that were decided rightly."""
    shuffled = np.random.Generator(np.random.Philox(seed_for("examples", seed))).permutation(len(pairs))
    return _pick(pairs, score, same, shuffled[right[shuffled]])


def _worst(pairs: np.ndarray, score: np.ndarray, same: np.ndarray, wrong: np.ndarray, margin: np.ndarray) -> list[dict]:
    """The wrongly decided pairs that are furthest on the wrong side."""
    order = np.argsort(margin, kind="stable")
    return _pick(pairs, score, same, order[wrong[order]])


def _pick(pairs: np.ndarray, score: np.ndarray, same: np.ndarray, order: np.ndarray) -> list[dict]:
    """The first EXAMPLES genuine and EXAMPLES impostor pairs in `order`."""
    picked = []
    for kind in (True, False):
        chosen = order[same[order] == kind][:EXAMPLES]
        picked += _examples([(*pairs[i], score[i]) for i in chosen], kind)
    return picked


def format_table(models: Mapping[str, Mapping[str, Mapping]]) -> str:
    """The results as text: for each set a row untrained, trained and averaged. `models` as in evaluation.json."""
    widths = [max(len(column), 6) + 2 for column in COLUMNS]
    lines = [" " * 27 + "".join(f"{column:>{width}}" for column, width in zip(COLUMNS, widths, strict=True))]
    names = sorted(models, key=["untrained", "trained", "averaged"].index)
    sets = list(dict.fromkeys(name for model in names for name in models[model]))
    notes = []
    for name in sets:
        rows = [(model, models[model][name]) for model in names if name in models[model]]
        for model, result in rows:
            text = "".join(
                f"{'–' if value is None else f'{value:.4f}':>{width}}"
                for value, width in zip(measures(result), widths, strict=True)
            )
            lines.append(f"{name if model == rows[0][0] else '':<16}{model:<11}{text}")
        notes += [f"{name}: {note}" for note in missing(rows[0][1])]
    return "\n".join(lines + notes)


def measures(result: Mapping) -> list[float | None]:
    """The values of a result under COLUMNS; None where the set does not give one."""
    tars = [result["tar_at_far"][far] for far in FARS]
    detected = result.get("dir_at_far", {}).get(DIR_FARS[0])  # early evaluations have none
    return [result["fold_accuracy"], *(at and at["tar"] for at in tars), result["rank1"], detected and detected["dir"]]


def of_a_list(result: Mapping) -> bool:
    """Whether a result is that of a list of pairs, which knows no identities."""
    return result["num_identities"] is None


def missing(result: Mapping) -> list[str]:
    """Why values of a result are null, a sentence each; shown under a table."""
    notes = []
    listed = of_a_list(result)
    absent = [float(far) for far in FARS if result["tar_at_far"][far] is None]
    if absent:
        wanted = " and ".join(f"{round(1 / far):,} for FAR {far:.0e}".replace("e-0", "e-") for far in absent)
        notes.append(
            f"– where the {result['num_impostor']:,} impostor pairs are too few to show that FAR (wanted {wanted})."
        )
    if listed:
        notes.append("– for rank-1 and DIR: a list of pairs does not say who is who.")
    elif "dir_at_far" in result and result["dir_at_far"][DIR_FARS[0]] is None:
        notes.append(f"– for the DIR: it needs {1 / float(DIR_FARS[0]):.0f} probes of identities that it leaves out.")
    if not listed and 0 < result.get("num_fold_pairs", 0) < 2 * FOLDS * PAIRS_PER_FOLD:
        notes.append(f"the 10-fold accuracy is over {result['num_fold_pairs']:,} pairs: the set has no more.")
    if listed and result["fold_accuracy"] is None:
        notes.append(f"– for the 10-fold accuracy: it needs {FOLDS} pairs of one identity, and of two.")
    elif result["fold_accuracy"] is None:
        notes.append(
            f"– for the 10-fold accuracy: it needs {2 * FOLDS} identities, {FOLDS} of them with two samples; "
            f"the set has {result['num_identities']:,} identities."
        )
    return notes
