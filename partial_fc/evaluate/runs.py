"""Evaluation of a run folder or a checkpoint: evaluation.json and the table."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from partial_fc import backbone, storage
from partial_fc.checkpoint import Checkpoint, find_for_all, load_backbone
from partial_fc.config import Config, Evaluate, EvaluationSet
from partial_fc.data.reader import image_size
from partial_fc.data.remote import Cache, cache_of
from partial_fc.data.shards import Index, load_index
from partial_fc.evaluate.evaluation_file import FORMAT, VERSION
from partial_fc.evaluate.protocol import evaluate_sets, format_table
from partial_fc.files import one_line, printable, write_atomically
from partial_fc.parallel import distributed
from partial_fc.storage import Place


def evaluate_run(
    path: Path | str,
    device: torch.device,
    settings: Evaluate | None = None,
    *,
    sets: dict[str, EvaluationSet] | None = None,
    untrained: bool = False,
    checkpoints: Path | str | None = None,
) -> dict:
    """Evaluates the latest checkpoint of a run, or the checkpoint `path`, folders or URLs, on all ranks. A collective.

    settings: what to evaluate on and how; None: as the checkpoint's config says. sets: instead of its sets. untrained:
    the backbone as it was initialized, too. checkpoints: where the run's are, for ranks that do not see its config.
    Prints the table, and writes evaluation.json into `path`, and beside checkpoints at a URL; a folder that cannot be
    written to is said at the start, and is no error. Raises RunError, on all ranks, where there is no checkpoint or
    nothing to evaluate on.
    """
    path = storage.place(path)
    found = find_for_all(storage.place(checkpoints or path), f"evaluating {path}")
    with distributed.together(f"evaluating {path}"):
        config = found.config()
        settings = config.evaluate if settings is None else settings
        sets = settings.sets if sets is None else sets
        if not sets:
            raise ValueError("there is nothing to evaluate on; give --data, or evaluate.sets in the config")
        size = found.image_size()
        indexes = open_sets(sets, size, cache_of(config.data))
    kept = can_be_kept(path)
    if not kept and distributed.rank() == 0:
        text = f"warning: {path} cannot be written to: the table is printed, and no evaluation.json written"
        print(printable(text), flush=True)
    models: dict[str, Any] = {"trained": _trained(found, config, size)}
    if (averaged := _trained(found, config, size, averaged=True)) is not None:
        models["averaged"] = averaged
    if untrained or settings.untrained:
        models["untrained"] = _initial(config, size)
    results = {}
    for name, net in models.items():
        if distributed.rank() == 0:
            print(printable(f"evaluating the {name} backbone on {', '.join(sets)}"), flush=True)
        results[name] = evaluate_sets(
            net.to(device).eval(),
            indexes,
            seed=config.run.seed,
            batch_size=settings.batch_size,
            device=device,
            mean=config.data.mean,
            std=config.data.std,
            flip=settings.flip,
            workers=config.data.workers,
        )
        for chosen, result in results[name].items():
            result["note"] = sets[chosen].note
    evaluation = {
        "format": FORMAT,
        "version": VERSION,
        "step": found.step,
        "config": _what_was_trained(found.setting("config")),
        "models": results,
    }
    if distributed.rank() == 0:
        print(printable(format_table(results)), flush=True)
    with distributed.together(f"writing {path}/evaluation.json"):
        if distributed.rank() == 0 and kept:
            text = json.dumps(evaluation, indent=1)
            if not storage.remote(path):
                write_atomically(path / "evaluation.json", text)
            if storage.remote(found.path):  # a run folder may vanish with its machine
                beside = path if storage.remote(path) else storage.parent(found.path)
                storage.write(f"{beside}/evaluation.json", text.encode())
    return evaluation


def can_be_kept(path: Place) -> bool:
    """Whether an evaluation of `path` is written there: not into a folder that cannot be written to."""
    return storage.remote(path) or os.access(path, os.W_OK | os.X_OK)


def _what_was_trained(config: dict) -> dict:
    """What a report says of the checkpoint, since the run may go on with other settings. The same in any folder."""
    sections = {name: config[name] for name in ("backbone", "head", "optim")}
    batch = config["data"]["global_batch_size"]
    return sections | {"run": {"seed": config["run"]["seed"]}, "data": {"global_batch_size": batch}}


def open_sets(
    sets: dict[str, EvaluationSet], size: tuple[int, int], cache: Cache | None = None
) -> dict[str, tuple[Index, Index | None]]:
    """Every set's data and distractors. Raises ValueError for a set of other images than `size`, or without pairs.

    Says where a distractor has the name of an identity of the set.
    """
    indexes = {}
    for name, chosen in sets.items():
        first = distributed.first_of_node()
        options: dict[str, Any] = {"check_labels": first, "cache": cache}
        index = load_index(chosen.data, **options)
        distractors = None if chosen.distractors is None else load_index(chosen.distractors, **options)
        for one in filter(None, (index, distractors)):
            if image_size(one) != size:
                raise ValueError(
                    f"evaluation set {name}: {one.path} has images of {image_size(one)} pixels, the backbone is "
                    f"trained on {size}: prepare the set at that size"
                )
        lists = [one for one in (index, distractors) if one is not None and one.pairs is not None]
        if lists and distractors is not None:
            raise ValueError(
                f"evaluation set {name}: {lists[0].path} is a list of pairs: it has no gallery that distractors "
                "could join, nor identities to be distractors; give sets of `prepare folder`, or no distractors"
            )
        samples = np.unique(index.label, return_counts=True)[1]
        if index.pairs is not None:
            if len(np.unique(index.pairs[:, 2])) < 2:
                raise ValueError(
                    f"evaluation set {name}: {index.path} has pairs of one kind alone; wanted some of one identity and "
                    "some of two"
                )
        elif len(samples) < 2 or samples.max() < 2:
            raise ValueError(
                f"evaluation set {name}: {index.path} has {len(samples)} identities of at most {samples.max()} "
                "samples; wanted two identities or more, one of them with two samples or more"
            )
        shared = set() if distractors is None else set(index.classes()) & set(distractors.classes())
        if shared and distributed.rank() == 0:
            print(
                f"warning: evaluation set {name}: {len(shared)} distractors are called like its identities, for "
                f"example {one_line(min(shared))}: if they are the same, rank-1 counts them as wrong"
            )
        indexes[name] = index, distractors
    return indexes


def _initial(config: Config, size: tuple[int, int]) -> nn.Module:
    return backbone.build_seeded(config.backbone.name, config.backbone.embedding_dim, size, config.run.seed)


def _trained(found: Checkpoint, config: Config, size: tuple[int, int], averaged: bool = False) -> nn.Module | None:
    """The checkpoint's backbone; or the moving average of it, None where there is none."""
    net = _initial(config, size)
    with distributed.together(f"loading {found.path}"):
        there = load_backbone(net, found, averaged)
    return net if there else None
