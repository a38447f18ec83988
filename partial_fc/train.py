"""Training: one loop."""

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from partial_fc import checkpoint, storage
from partial_fc.build import Parts, build, checkpoints_of, has_batch_norm, micro_batch_size, settings
from partial_fc.config import Config
from partial_fc.data.reader import Batch, loader, normalize
from partial_fc.data.remote import Fetches
from partial_fc.folder_lock import FolderLock
from partial_fc.folders import make_folder
from partial_fc.head.side_stream import upload
from partial_fc.metrics import KEPT, Metrics, RankTimes
from partial_fc.optim import learning_rate
from partial_fc.parallel import distributed
from partial_fc.parallel.precision import make_deterministic
from partial_fc.parallel.process import handled
from partial_fc.parallel.watch import here, leave_time_to_compile, unlimited
from partial_fc.phases import Phases
from partial_fc.profiler import Profiler
from partial_fc.seeds import seed_for


def train(config: Config, device: torch.device) -> bool:
    """Trains to the end of the run, from its latest checkpoint if there is one. True if finished, False if preempted.

    A collective over all ranks of the job. Raises RunError on all ranks where the config, the data or a checkpoint is
    at fault.
    """
    run, where = Path(config.run.dir), checkpoints_of(config)
    elsewhere = [] if storage.remote(where) or not config.checkpoint.dir or where == run else [where]
    with the_only_one_in(run, *elsewhere) as hold:
        return _train(config, device, run, hold)


def _train(config: Config, device: torch.device, run: Path, hold: Callable[[], None]) -> bool:
    if config.engine.deterministic:
        make_deterministic()
    parts = build(config, device)
    index, order, head, engine = parts.index, parts.order, parts.head, parts.engine
    rank = distributed.rank()
    largest_piece = micro_batch_size(config)
    mean, std = (torch.tensor(value, device=device) for value in (config.data.mean, config.data.std))
    beside = [run / name for name in ("config.yaml", *KEPT)] if config.checkpoint.dir else []
    accumulate, progress = config.data.accumulate, parts.progress
    at_least = 2 if has_batch_norm(engine.backbone) else 1
    done = saved = parts.start_step
    preempted, owed, fetches = False, False, Fetches()
    with distributed.together("opening the data"):
        batches = read_batches(config, parts)

    phases = Phases(device)

    def phase(name: str) -> None:
        here.begin(name, waits=name != "data")  # the others hold collectives, of few numbers or of an engine
        phases.begin(name)

    head.begin_phase = phase
    if config.engine.compile or head.compiled:
        leave_time_to_compile()
    profiler = Profiler(config.track.profile, run / "profile", device, phases)
    profiler.check(parts.start_step, parts.total_steps)

    with preemption() as asked_to_stop, metrics_of(config, run, parts) as metrics, closing(profiler):
        for step in range(parts.start_step, parts.total_steps):
            # data: this rank's images (b, 3, H, W) uint8 and labels (b,)
            here.step = step
            profiler.begin_step(step)
            phase("data")
            batch = next_batch(batches)
            fetches = fetches.plus(batch.fetches)
            phase("forward")
            torch.manual_seed(seed_for("step", config.run.seed, step, rank))

            # forward and backward of each micro-batch: embeddings (b, D), loss () equal on all ranks
            loss, pieces = 0.0, micro_batches(batch, accumulate, device, at_least)
            for piece, (images, labels, weight) in enumerate(pieces):
                embeddings = engine(normalize(images, mean, std))
                phase("head")
                if piece == 0:  # beside the device's forward
                    head.begin_step(step, parts.labels(step))
                part = weight * head(embeddings, labels, largest_piece)
                loss = loss + part.detach()
                if piece == len(pieces) - 1:
                    shared = share(loss, asked_to_stop(), len(batch.bad))
                phase("backward")
                engine.backward(part)
                phase("forward")

            # the one host read of a step, before either update; with fp16 or DeepSpeed engine.finite() is the second
            phase("wait")
            loss_now, preempted, bad = shared()

            # update of head and backbone, or of neither
            lr = learning_rate(step, parts.total_steps, parts.peak_rate, config.optim)
            applied = math.isfinite(loss_now) and engine.finite()
            phase("update")
            if applied:
                of_the_head = head.gradient_norm(engine.grad_scale) if config.optim.clip_jointly else None
                head.step(lr * parts.head_rate, engine.clip(of_the_head))
                phase("optimizer")
                engine.step(lr)
            else:
                head.skip_step()
                engine.skip()
            progress.step(step, loss_now, order.global_batch_size, bad, batch.bad, applied)
            progress.check(step, config.data.max_undecodable)

            # log and save: `done` steps are finished
            phase("log")
            done = step + 1
            last = done == parts.total_steps
            if done % config.track.log_every == 0 or last:
                loss_of_row, ranks = progress.mean_loss(), RankTimes.gather(phases, fetches)
                fetches = Fetches()
                if metrics is not None:
                    metrics.row(
                        done,
                        loss=loss_of_row,
                        lr=lr,
                        batch=head.observed.numbers(),
                        head=head.changing(),
                        engine=engine.changing(),
                        ranks=ranks,
                        progress=progress,
                    )
            owed = owed or preempted or done % config.checkpoint.every == 0
            if last or (owed and progress.skipped_in_a_row == 0):  # else the state may be what makes the loss NaN
                phase("save")
                with unlimited("save"):
                    checkpoint.save(
                        run,
                        done,
                        head=head,
                        engine=engine,
                        classes=index.path / "classes.txt",
                        settings=settings(config, index, progress),
                        keep=config.checkpoint.keep,
                        where=checkpoints_of(config),
                        beside=beside,
                        owner=parts.owner,
                        first=hold,
                    )
                saved, owed = done, False
            if preempted and not owed:
                break

    here.step = None
    finished = done >= parts.total_steps
    with distributed.together("ending the run"):
        if rank == 0 and not finished:
            (run / "preempted").write_text(f"step {saved}\n")
            print(f"preempted: stopped after step {done}; the same command goes on from step {saved}", flush=True)
    return finished


def micro_batches(
    batch: Batch, count: int, device: torch.device, at_least: int = 1
) -> list[tuple[Tensor, Tensor, float | Tensor]]:
    """Images, labels and weight of each of `count` pieces of this rank's batch, on `device`.

    A piece's weight () is the share of the global batch that the ranks hold in it, so that the weighted mean losses add
    up to the mean over the batch, undecodable samples left out. So are those of a piece that has fewer than `at_least`
    left: batch norm takes none or two. A collective where there are several pieces.
    """
    images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
    cuts = [distributed.part(len(labels), piece, count) for piece in range(count)]
    cuts = [cut if len(cut) >= at_least else range(0) for cut in cuts]
    weights: Iterable[float | Tensor] = [1.0]
    if count > 1:
        sizes = distributed.all_reduce_sum(upload(torch.tensor([float(len(cut)) for cut in cuts]), device))
        weights = sizes / sizes.sum().clamp_min(1)
    return [(images[c.start : c.stop], labels[c.start : c.stop], w) for c, w in zip(cuts, weights, strict=True)]


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
def the_only_one_in(run: Path, *elsewhere: Path) -> Iterator[Callable[[], None]]:
    """Holds the run folder, and its checkpoints' where that is elsewhere: a second job would overwrite what is there.

    Gives what rank 0 calls before it writes there: a deleted folder is taken again, if it is free. Raises RunError.
    """
    with ExitStack() as held:
        locks: list[FolderLock] = []
        with distributed.together(f"starting {run}"):
            for folder in (run, *elsewhere) if distributed.rank() == 0 else ():
                setting = "run.dir" if folder == run else "checkpoint.dir"
                busy = "another process trains in this folder" if folder == run else f"another run saves in {folder}"
                busy += f": wait for it, or give another {setting}"
                make_folder(folder, setting)
                try:
                    locks.append(held.enter_context(closing(FolderLock(folder, busy))))
                except PermissionError:
                    raise
                except OSError as error:
                    if folder != run:  # a mounted bucket, say; a save looks for later checkpoints, too
                        continue
                    raise ValueError(
                        f"{run} cannot be locked ({error}): give a run.dir on a file system with locks, and the "
                        "checkpoints another place with checkpoint.dir"
                    ) from None

        def hold() -> None:
            for lock in locks:
                lock.renew()

        yield hold


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
                streamed=any(shard.copied for shard in parts.index.shards),
            )
    try:
        yield metrics
    finally:
        with unlimited("closing the trackers"):  # on all ranks, which begin the same phases; trackers have their limit
            if metrics is not None:
                metrics.close()


@contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Signals that ask to stop only set a flag, which the steps share: all ranks then save the same step and stop.

    They are SIGTERM, SIGUSR1, SIGINT and SIGHUP. The last two stay ignored where they are, by nohup or in a shell's
    background. After a SIGINT another one ends the process at once; so does SIGTERM, into which torchrun turns it.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        if number == signal.SIGINT:
            for other in (signal.SIGINT, signal.SIGTERM):
                signal.signal(other, signal.SIG_DFL)
            if distributed.rank() == 0:  # no print: it may be what was interrupted
                with suppress(OSError):
                    os.write(2, b"stopping: the run saves after this step; interrupt again to end it at once\n")

    signals = [signal.SIGTERM, signal.SIGUSR1]
    signals += [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    with handled(signals, ask):
        yield lambda: asked


def share(loss: Tensor, stop: bool, bad: int) -> Callable[[], tuple[float, bool, int]]:
    """One all-reduce, and its reading: the loss, whether any rank was asked to stop, all ranks' undecodable samples.

    In: a loss that is equal on all ranks, this rank's flag and count. Reading waits for what was queued before this
    call and not for the backward that comes after it, so that the head's update can run beside that.
    """
    # filled on the device: a copy from the host would wait
    counts = torch.stack([torch.full((), float(number), device=loss.device) for number in (stop, bad)])
    values = torch.cat([loss.detach().reshape(1), distributed.all_reduce_sum(counts)])
    ready = None
    if values.is_cuda:
        values = torch.empty(3, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        ready = torch.cuda.current_stream(loss.device).record_event()

    def read() -> tuple[float, bool, int]:
        if ready is not None:
            ready.synchronize()
        loss_now, stops, total = values.tolist()
        return loss_now, stops > 0, int(total)

    return read
