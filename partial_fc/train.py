"""Training: everything is built from a config, then one loop."""

import fcntl
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partial_fc import backbone, checkpoint
from partial_fc.config import Config, save_config
from partial_fc.data.order import Order
from partial_fc.data.reader import Batch, image_size, loader, normalize
from partial_fc.data.shards import Index, load_index
from partial_fc.head.margins import build_margin
from partial_fc.head.partial_fc import PartialFC
from partial_fc.metrics import Metrics
from partial_fc.optim import build_optimizer, learning_rate
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import DDPEngine
from partial_fc.progress import Progress
from partial_fc.seeds import seed_for


def train(config: Config, device: torch.device) -> bool:
    """Trains to the end of the run, from its latest checkpoint if there is one. True if finished, False if preempted.

    A collective over all ranks of the job. Raises RunError on all ranks where the config, the data or a checkpoint is
    at fault.
    """
    run = Path(config.run.dir)
    with the_only_one_in(run):
        return _train(config, device, run)


def _train(config: Config, device: torch.device, run: Path) -> bool:
    parts = build(config, device)
    index, order, head, engine = parts.index, parts.order, parts.head, parts.engine
    rank, world_size = distributed.rank(), distributed.world_size()
    head_rate = _first(config.head.optim.lr, config.optim.lr) / config.optim.lr  # of the backbone's rate
    largest_part = -(-order.global_batch_size // world_size)
    progress = parts.progress
    done = parts.start_step
    preempted = False
    with distributed.together("opening the data"):
        batches = read_batches(config, parts)

    with preemption() as asked_to_stop, metrics_of(config, run, parts) as metrics:
        for step in range(parts.start_step, parts.total_steps):
            # data: this rank's images (b, 3, H, W) uint8 and labels (b,)
            waiting = time.monotonic()
            batch = next_batch(batches)
            waited = time.monotonic() - waiting
            torch.manual_seed(seed_for("step", config.run.seed, step, rank))

            # forward and backward: embeddings (b, D), loss () equal on all ranks
            embeddings = engine(normalize(batch.images.to(device), config.data.mean, config.data.std))
            head.begin_step(step, parts.labels(step))
            loss = head(embeddings, batch.labels.to(device), largest_part)
            engine.backward(loss)

            # the one host read of a step, before either update
            loss_now, preempted, bad = agree(loss, asked_to_stop(), len(batch.bad))

            # update of head and backbone, or of neither
            lr = learning_rate(step, parts.total_steps, config.optim.lr, config.optim)
            if math.isfinite(loss_now):
                head.step(lr * head_rate)
                engine.step(lr)
            else:
                head.skip_step()
                engine.skip()
            progress.step(step, loss_now, order.global_batch_size, bad, batch.bad)
            progress.check(step, config.data.max_undecodable)

            # log and save: `done` steps are finished
            done = step + 1
            last = done == parts.total_steps
            if metrics is not None:
                metrics.step(waited)
            if done % config.track.log_every == 0 or last:
                loss_of_row = progress.mean_loss()
                if metrics is not None:
                    metrics.row(
                        done, loss=loss_of_row, lr=lr, target_cosine=head.target_cosine.item(), progress=progress
                    )
            due = done % config.checkpoint.every == 0 or preempted
            if last or (due and progress.skipped_in_a_row == 0):  # else the state may be what makes the loss NaN
                checkpoint.save(
                    run,
                    done,
                    head=head,
                    engine=engine,
                    classes=index.path / "classes.txt",
                    settings=settings(config, index, progress),
                    keep=config.checkpoint.keep,
                )
            if preempted:
                break

    finished = done >= parts.total_steps
    with distributed.together("ending the run"):
        if rank == 0 and not finished:
            (run / "preempted").write_text(f"step {done}\n")
            print(f"preempted: stopped after step {done}; the same command goes on", flush=True)
    return finished


@dataclass
class Parts:
    """What a run is built of."""

    index: Index
    order: Order
    head: PartialFC
    engine: DDPEngine
    total_steps: int
    start_step: int
    progress: Progress

    def labels(self, step: int) -> Tensor:
        """(B,) labels of the whole global batch of a step, from the index: no collective."""
        return torch.from_numpy(self.index.label[self.order.batch(step)])


def build(config: Config, device: torch.device) -> Parts:
    """Data, head, backbone and engine of a run, at the state of its latest checkpoint. A collective."""
    run = Path(config.run.dir)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with distributed.together("preparing the run"):
        margin = build_margin(config.head.margin.name, config.head.margin.parameters)
        index = load_index(config.data.train)
        size = image_size(index)
        order = Order(
            index.samples_per_shard,
            config.data.global_batch_size,
            config.data.streams,
            config.run.seed,
            config.data.shuffle_window,
        )
        net = backbone.build_seeded(config.backbone.name, config.backbone.embedding_dim, size, config.run.seed)
        found = checkpoint.find_latest(run)
        if found is not None:
            check_unchanged(found, config, index)
        check_evaluation(config, size)
        head = PartialFC(
            index.num_classes,
            config.backbone.embedding_dim,
            margin,
            config.head.sample_rate,
            momentum=_first(config.head.optim.momentum, config.optim.momentum),
            weight_decay=_first(config.head.optim.weight_decay, config.optim.weight_decay),
            seed=config.run.seed,
            init_std=config.head.init_std,
            chunk=config.head.chunk,
            check_labels=False,  # all labels were checked when the index was loaded
            device=device,
        )
        net.to(device).train()
    agree_on_start(config, index, found)
    engine = DDPEngine(net, build_optimizer(net, config.optim), device)
    engine.warm_up(torch.zeros(2, 3, *size, device=device))
    if found is not None:
        checkpoint.load(found, head=head, engine=engine)
    total_steps = config.run.steps or max(round(config.run.epochs * order.steps_per_epoch), 1)
    start_step = 0 if found is None else found.step
    with distributed.together("preparing the run"):
        if distributed.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            (run / "preempted").unlink(missing_ok=True)
            if start_step < total_steps:
                save_config(config, run / "config.yaml")
            print_summary(config, index, order, head, total_steps, found)
    progress = Progress() if found is None else Progress(**found.manifest["settings"]["progress"])
    return Parts(index, order, head, engine, total_steps, start_step, progress)


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def agree_on_start(config: Config, index: Index, found: checkpoint.Checkpoint | None) -> None:
    """Raises RunError, on all ranks, where they do not see the same config, data and checkpoint."""
    seen = {
        "config": config.model_dump(mode="json"),
        "data set": index.fingerprint,
        "latest checkpoint": None if found is None else found.manifest,
    }
    everyone = distributed.gather_objects(seen)
    for name in seen:
        for other, theirs in enumerate(everyone):
            if theirs[name] != everyone[0][name]:
                raise distributed.RunError(
                    f"ranks 0 and {other} see different things: {name}. All ranks must be given the same config and "
                    "see the same data.train and run.dir: put both on a shared file system"
                )


def settings(config: Config, index: Index, progress: Progress) -> dict:
    """What a checkpoint keeps beside tensors."""
    return {
        "order": order_settings(config, index),
        "config": config.model_dump(mode="json"),
        "image_size": image_size(index),
        "progress": progress.state(),
    }


def order_settings(config: Config, index: Index) -> dict:
    """What decides which sample comes when: a resumed run must not change it unnoticed."""
    return {
        "run.seed": config.run.seed,
        "data.global_batch_size": config.data.global_batch_size,
        "data.streams": config.data.streams,
        "data.shuffle_window": config.data.shuffle_window,
        "data set": index.fingerprint,
    }


def check_unchanged(found: checkpoint.Checkpoint, config: Config, index: Index) -> None:
    """Raises ValueError if the checkpoint's classes are not the data's, or its data order is another one."""
    if found.classes() != index.classes():
        raise ValueError(
            f"{found.path} was written with other classes than {index.path}/classes.txt has: its class centers would "
            "stand for the wrong identities. Use the data it was written with, or start anew in another run.dir"
        )
    net = Config.model_validate(found.manifest["settings"]["config"]).backbone
    if net != config.backbone or found.manifest["settings"]["image_size"] != list(image_size(index)):
        raise ValueError(
            f"{found.path} was written with {net.name}, embedding_dim {net.embedding_dim}, images of "
            f"{found.manifest['settings']['image_size']} pixels; this run has {config.backbone.name}, embedding_dim "
            f"{config.backbone.embedding_dim}, {list(image_size(index))}: put it back or give another run.dir"
        )
    theirs, ours = found.manifest["settings"]["order"], order_settings(config, index)
    changed = [
        f"{name} was {theirs.get(name)!r}, now {value!r}" for name, value in ours.items() if theirs.get(name) != value
    ]
    if changed and not config.data.restart:
        raise ValueError(
            f"{found.path} was made with another data order: {'; '.join(changed)}. Put it back, or accept the new "
            "order from here on with data.restart=true, or start anew in another run.dir"
        )


def check_evaluation(config: Config, size: tuple[int, int]) -> None:
    """Raises, before anything is trained, where a set that will be evaluated on is missing or of another image size."""
    for chosen in config.evaluate.sets.values():
        for folder in filter(None, (chosen.data, chosen.distractors)):
            if image_size(load_index(folder)) != size:
                raise ValueError(
                    f"{folder} has images of {image_size(load_index(folder))} pixels, {config.data.train} of {size}: "
                    "prepare them at one size"
                )


def changes(before: dict, now: dict, prefix: str = "") -> list[str]:
    """What differs between two configs, as section.key: before -> now."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found


def print_summary(
    config: Config, index: Index, order: Order, head: PartialFC, total_steps: int, found: checkpoint.Checkpoint | None
) -> None:
    world_size = distributed.world_size()
    start = "from the start" if found is None else f"from {found.path}"
    print(
        f"{config.run.dir}: {index.num_samples:,} samples of {index.num_classes:,} identities; {world_size} ranks on "
        f"{head.device.type}, {len(head.classes):,} class centers on the first; {config.backbone.name}, "
        f"{config.head.margin.name}; {total_steps:,} steps of {order.global_batch_size} samples "
        f"({total_steps / order.steps_per_epoch:.2f} epochs), {start}",
        flush=True,
    )
    if found is not None:
        for change in changes(found.manifest["settings"]["config"], config.model_dump(mode="json")):
            print(f"changed since the checkpoint: {change}", flush=True)
    if config.optim.warmup_steps >= total_steps:
        print(f"warning: optim.warmup_steps {config.optim.warmup_steps} is the whole run: it never gets to optim.lr")


def next_batch(batches: Iterator[Batch]) -> Batch:
    """The next batch. Raises RunError, on this rank alone, where it cannot be read: torchrun then stops the others."""
    try:
        return next(batches)
    except RuntimeError as error:  # a read that failed for good, a reader process that died
        raise distributed.RunError(f"rank {distributed.rank()}: {error}", on_all_ranks=False) from error


def read_batches(config: Config, parts: Parts) -> Iterator[Batch]:
    return iter(
        loader(
            parts.index,
            parts.order,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=config.run.seed,
            start_step=parts.start_step,
            stop_step=parts.total_steps,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            flip=config.data.flip,
            affine=config.data.affine,
            pin_memory=parts.head.device.type == "cuda",
        )
    )


@contextmanager
def the_only_one_in(run: Path) -> Iterator[None]:
    """Holds the run folder: a second job in it would overwrite the first one's metrics and checkpoints."""
    lock = None
    with distributed.together(f"starting {run}"):
        if distributed.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            lock = open(run / "lock", "w")  # noqa: SIM115 - held until the run ends
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    "another process trains in this folder: wait for it, or give another run.dir"
                ) from None
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


@contextmanager
def metrics_of(config: Config, run: Path, parts: Parts) -> Iterator[Metrics | None]:
    """Rank 0's metrics; None on the other ranks."""
    metrics = None
    with distributed.together("opening the metrics"):
        if distributed.rank() == 0:
            metrics = Metrics(
                config,
                run,
                start_step=parts.start_step,
                total_steps=parts.total_steps,
                steps_per_epoch=parts.order.steps_per_epoch,
            )
    try:
        yield metrics
    finally:
        if metrics is not None:
            metrics.close()


@contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGUSR1 only set a flag, which the steps share: all ranks then save the same step and stop."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    signals = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, ask) for number in signals]
    try:
        yield lambda: asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def agree(loss: Tensor, stop: bool, bad: int) -> tuple[float, bool, int]:
    """The loss, whether any rank was asked to stop, and all ranks' undecodable samples: equal on all ranks.

    In: a loss that is equal on all ranks, this rank's flag and count. One all-reduce and one host read.
    """
    shared = distributed.all_reduce_sum(torch.tensor([float(stop), float(bad)], device=loss.device))
    loss_now, stops, total = torch.cat([loss.detach().reshape(1), shared]).tolist()
    return loss_now, stops > 0, int(total)
