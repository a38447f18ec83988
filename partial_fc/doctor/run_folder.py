"""What a config names: its data, the checkpoint it would go on from, the room for more."""

import math
import os

import numpy as np
import torch

from partial_fc import checkpoint, storage
from partial_fc.build import (
    build_losses,
    bytes_of_a_class,
    checkpoints_of,
    data_cautions,
    latest_of,
    length_of,
    order_of,
    schedule_cautions,
    sound_before,
    training_data,
)
from partial_fc.config import Config
from partial_fc.data.groups import Groups
from partial_fc.data.mixing import LEAST, mixing, remedies
from partial_fc.data.order import Order
from partial_fc.data.reader import image_size, images_in_order
from partial_fc.data.shards import Index
from partial_fc.doctor.sheet import Found
from partial_fc.evaluate.runs import open_sets
from partial_fc.head.margin import WarmUp, least_scale
from partial_fc.manifest import Damaged
from partial_fc.memory import size_text
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine

DECODED = 32  # samples, over all shards


def data_set(config: Config) -> Found:
    """Every shard is there in its full length, every label is a class."""
    index = training_data(config)
    size = sum(shard.bytes for shard in index.shards)
    shards = f"{len(index.shard_names)} shard{'s' * (len(index.shard_names) > 1)}"
    text = f"{index.num_samples:,} samples of {index.num_classes:,} identities in {shards} of {size_text(size)}"
    here = index.elsewhere() or "all there"
    several = isinstance(config.data.train, list)
    where = index.prepared.get("source", index.path) if several else config.data.train
    return Found(f"{where}: {text}, {here}, every label in range", value=index)


def images(index: Index) -> Found:
    """A few samples, from the first shard to the last, are images of the size that the index says."""
    samples = np.unique(np.linspace(0, index.num_samples - 1, DECODED).astype(np.int64))
    for _ in images_in_order(index, samples, len(samples), workers=0):
        pass
    return Found(f"{len(samples)} samples decoded, {' x '.join(map(str, image_size(index)))} pixels")


def batches(config: Config, index: Index, trust_code: bool) -> Found:
    """The global batch fits data, streams and ranks."""
    order = order_of(config, index, trust_code=trust_code)
    return Found(f"{order.steps_per_epoch:,} steps of {order.global_batch_size} samples an epoch", value=order)


def mixed(order: Order | Groups, index: Index) -> Found:
    """Successive batches hold about as many identities as they would in random order."""
    found = mixing(order, index.label)
    if found.share >= LEAST:
        return Found(found.said())
    size = sum(shard.plain_bytes for shard in index.shards) // len(index.shards)
    return Found(
        f"{found.said()}: the shards are in order of identity, and the loss sees few new ones. "
        f"{remedies(order, index.label, size)}; or write the set again in random order: partial-fc prepare shuffle",
        "problem",
    )


def schedule(config: Config, order: Order | Groups) -> Found:
    """The run is long enough for what its config plans."""
    steps, warm = length_of(config, order), config.optim.warmup_steps
    epochs = steps / order.steps_per_epoch
    text = f"{steps:,} steps, {epochs:.2f} epochs; {config.optim.schedule} after a warm-up of {warm:,}"
    cautions = schedule_cautions(config, steps)
    return Found("; ".join([text, *cautions]), "warning" if cautions else "ok", steps)


def latest_checkpoint(config: Config, index: Index) -> Found:
    """It has the data's classes, the config's backbone and the data order."""
    try:
        found = latest_of(config, index)
    except Damaged as error:
        before = None if error.folder is None else sound_before(error.folder)
        if before is None:
            raise
        return Found(f"{error.what}: a run would rename it and go back to {before}", "warning")
    if found is None:
        return Found(f"none in {checkpoints_of(config)}: a run would begin at step 0")
    return Found(f"{found.path} fits: a run would go on from step {found.step:,}", value=found)


def evaluation_sets(config: Config, index: Index) -> Found:
    sets = open_sets(config.evaluate.sets, image_size(index), index.cache)
    text = ", ".join(f"{name} {one.num_samples:,} samples" for name, (one, _) in sets.items()) or "none"
    cautions = data_cautions(config, index, sets)
    return Found("; ".join([text, *cautions]), "warning" if cautions else "ok")


def margin(config: Config, num_classes: int, trust_code: bool) -> Found:
    """Whether it can be met with so many classes, and the scale that the papers want."""
    chosen, _ = build_losses(config, trust_code)
    chosen = chosen.margin if isinstance(chosen, WarmUp) else chosen
    most = chosen.largest_probability(num_classes)
    if most is None:
        text = f"{config.head.margin.name}: no bound is known for its probabilities"
    else:
        text = (
            f"{config.head.margin.name}, scale {chosen.scale:g}: the target's probability is at most {most:.3g} with "
            f"{num_classes:,} classes; CosFace's paper, eq. 6, wants a scale of {least_scale(num_classes):.3g} for 0.9 "
            "without a margin, and smaller ones were better in configs/study"
        )
    cautions = chosen.cautions(num_classes, config.backbone.embedding_dim)
    return Found("; ".join([text, *cautions]), "warning" if cautions else "ok")


def head_bytes(
    config: Config,
    num_classes: int,
    device: torch.device,
    trust_code: bool,
    latest: checkpoint.Checkpoint | None = None,
) -> Found:
    """What a checkpoint keeps of the head; the latest one must have the same."""
    of_a_class = bytes_of_a_class(config, device, latest, trust_code=trust_code)
    share = math.ceil(num_classes / distributed.world_size())
    return Found(
        f"{config.head.margin.name}, sample rate {config.head.sample_rate:g}, {of_a_class:,.0f} bytes a class with its "
        f"optimizer's state: {size_text(of_a_class * share)} on a rank",
        value=of_a_class * num_classes,
    )


def disk(config: Config, of_head: float, engine: BaseEngine) -> Found:
    """Room for the checkpoints that stay, and the one that is being written beside them; of a URL it is not known.

    of_head: bytes of the head in a checkpoint. engine: one that has made a step, so that its optimizer has its state.
    """
    where = checkpoints_of(config)
    one = of_head + sum(tensor.nbytes for tensors in engine.state().values() for tensor in tensors.values())
    if storage.remote(where):
        return Found(f"a checkpoint takes about {size_text(one)} in {where}; here a file of it at a time")
    folder = next(path for path in (where.absolute(), *where.absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        return Found(f"{folder} cannot be written to: give another run.dir, or the right to write there", "problem")
    there = sum(path.stat().st_size for path in where.glob("step_*/*"))
    count = config.checkpoint.keep + 1
    needed = max(count * one - there, 0)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    text = (
        f"a checkpoint takes about {size_text(one)}; {count} of them, checkpoint.keep and one being written, need "
        f"{size_text(needed)}{' more' * bool(there)}, {size_text(free)} are free in {folder}"
    )
    if needed > free:
        return Found(f"{text}: make room, lower checkpoint.keep, or give another run.dir", "problem")
    return Found(text)
