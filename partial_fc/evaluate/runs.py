"""Evaluation of a run folder or a checkpoint: evaluation.json and the table."""

import json
from pathlib import Path

import torch
from torch import nn

from partial_fc import backbone
from partial_fc.checkpoint import Checkpoint, find_latest, open_checkpoint, read_backbone
from partial_fc.config import Config, EvaluationSet
from partial_fc.data.shards import Index, load_index
from partial_fc.evaluate.protocol import evaluate_sets, format_table
from partial_fc.parallel import distributed

FORMAT, VERSION = "partial_fc-evaluation", 1


def evaluate_run(
    path: Path | str, device: torch.device, *, sets: dict[str, EvaluationSet] | None = None, untrained: bool = False
) -> dict:
    """Evaluates the latest checkpoint of a run folder, or the checkpoint folder `path`, on all ranks. A collective.

    sets: what to evaluate on; None: the sets of the run's config. untrained: the backbone as initialized, too.
    Writes evaluation.json into `path` and prints the table. Raises ValueError, on all ranks, where there is no
    checkpoint or no set.
    """
    path = Path(path)
    with distributed.together(f"evaluating {path}"):
        found = open_checkpoint(path) if (path / "manifest.json").exists() else find_latest(path)
        if found is None:
            raise ValueError(f"{path} holds no complete checkpoint: give a run folder or a folder of its checkpoints")
        config = Config.model_validate(found.manifest["settings"]["config"])
        sets = dict(config.evaluate.sets) if sets is None else sets
        if not sets:
            raise ValueError(f"{path}: nothing to evaluate on; give --data or evaluate.sets in the config")
        indexes = {name: _indexes(chosen) for name, chosen in sets.items()}
        sizes = {
            tuple(index.prepared["image_size"]) for pair in indexes.values() for index in pair if index is not None
        }
        if len(sizes) != 1:
            raise ValueError(f"the evaluation sets have images of several sizes {sorted(sizes)}; prepare them at one")
        size = sizes.pop()
    models = {"trained": _trained(found, config, size)}
    if untrained or config.evaluate.untrained:
        models["untrained"] = _initial(config, size)
    results = {}
    for name, net in models.items():
        if distributed.rank() == 0:
            print(f"evaluating the {name} backbone on {', '.join(sets)}", flush=True)
        results[name] = evaluate_sets(
            net.to(device).eval(),
            indexes,
            seed=config.run.seed,
            batch_size=config.evaluate.batch_size,
            device=device,
            mean=config.data.mean,
            std=config.data.std,
            flip=config.evaluate.flip,
            workers=config.data.workers,
        )
    evaluation = {"format": FORMAT, "version": VERSION, "step": found.step, "models": results}
    with distributed.together(f"writing {path}/evaluation.json"):
        if distributed.rank() == 0:
            temporary = path / "evaluation.json.partial"
            temporary.write_text(json.dumps(evaluation, indent=1))
            temporary.rename(path / "evaluation.json")
            print(format_table(results), flush=True)
    return evaluation


def _indexes(chosen: EvaluationSet) -> tuple[Index, Index | None]:
    return load_index(chosen.data), None if chosen.distractors is None else load_index(chosen.distractors)


def _initial(config: Config, size: tuple[int, int]) -> nn.Module:
    return backbone.build_seeded(config.backbone.name, config.backbone.embedding_dim, size, config.run.seed)


def _trained(found: Checkpoint, config: Config, size: tuple[int, int]) -> nn.Module:
    net = _initial(config, size)
    with distributed.together(f"loading {found.path}"):
        net.load_state_dict(read_backbone(found))
    return net
