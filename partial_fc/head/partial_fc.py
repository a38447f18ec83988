"""PartialFC: the head as a training loop uses it. Joins the local mathematics with three collectives a step.

Shapes: b this rank's batch, B = W * (the largest b) gathered rows with padding, D embedding size, C classes,
C_r classes of this rank, U rows in use.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor

from partial_fc.head import elementwise, exchange, softmax
from partial_fc.head.arguments import check_arguments
from partial_fc.head.attach import Forward, attach
from partial_fc.head.centers import Centers, InUse
from partial_fc.head.embedding_losses import CenterLoss, EmbeddingLoss, FeatureCenters
from partial_fc.head.forward import forward
from partial_fc.head.margin import Margin, WarmUp
from partial_fc.head.margins import CosFace
from partial_fc.head.matmul import Precision, precision_of
from partial_fc.head.observed import Observed
from partial_fc.head.optimizers import build_optimizer
from partial_fc.head.partition import class_range
from partial_fc.head.sampling import Sampler, negatives, random_negatives, with_positives
from partial_fc.head.side_stream import SideStream, upload
from partial_fc.head.softmax import Buffers
from partial_fc.head.update import gradient_norm, update
from partial_fc.parallel import distributed


class PartialFC:
    """A classifier over `num_classes` whose class centers are partitioned over all ranks (arXiv 2010.05222,
    2203.15565).

        head = PartialFC(num_classes, embedding_dim, margin=CosFace(scale=64, margin=0.35), sample_rate=0.1)
        loss = head(embeddings, labels)     # (b, D), (b,): this rank's; the same loss () on every rank
        loss.backward()                     # the embeddings receive their gradient; centers are untouched
        head.step(lr)                       # centers updated chunk by chunk

    The centers are plain tensors: DDP, optimizers and `parameters()` never see them.

    num_classes, embedding_dim: C and D. margin: see `margins`; a WarmUp changes it with the step. sample_rate: the
    probability of each negative in a step; positives come on top, and the softmax runs over what was drawn, without a
    correction (as published). dropout: the probability with which the head sees 0 instead of a number of an embedding,
    in training; what it sees of the others is 1 / (1 - dropout) as large. embedding_losses: center, triplet and
    contrastive loss on the gathered embeddings, without that dropout, added to the loss (see `embedding_losses`).
    optimizer: "sgd" is torch.optim.SGD on all C rows: those that a step leaves out are caught up exactly when they are
    next used. "adamw" is torch.optim.AdamW on the rows in use, with `betas` and `eps`; the others stay as they are.
    seed: of initial centers and negatives. init_std: standard deviation of initial centers; None: 1 / sqrt(D), which
    is length 1 (at a tenth of that the first updates, which grow with 1 / |w|, throw the centers together).
    sampler: which negatives a step uses; None: each with probability sample_rate (see `sampling`).

    chunk: rows of logits that exist at once, rounded up to whole classes; None: see `softmax.default_chunk`.
    cache_bytes: room on this rank for numbers (B, U) that spare the update a product, in cache_dtype, float32 or
    bfloat16, reserved whole; what does not fit is computed again. matmul_precision: see `matmul`. compile: the
    elementwise parts by torch.compile, on NVIDIA's GPUs by `kernels` where there is one; None: where a compiler works
    and a rank has 2^24 numbers in use or more, since compiling takes 20 seconds.
    check_labels: one host read a forward; without it a label that is out of range, or that begin_step was not given,
    gives a wrong loss.
    dtype: of centers, logits and gradients, float32 or float64; embeddings of any float type are converted.

    Raises ValueError for sizes, rates and options out of range.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: Margin | WarmUp | None = None,
        sample_rate: float = 1.0,
        *,
        dropout: float = 0.0,
        embedding_losses: Sequence[EmbeddingLoss] = (),
        optimizer: Literal["sgd", "adamw"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
        init_std: float | None = None,
        sampler: Sampler | None = None,
        chunk: int | None = None,
        cache_bytes: int = 0,
        cache_dtype: torch.dtype = torch.float32,
        matmul_precision: Precision = "float32",
        compile: bool | None = None,
        check_labels: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        device = torch.device(device)
        check_arguments(
            num_classes,
            embedding_dim,
            margin,
            sample_rate,
            sampler=sampler,
            dropout=dropout,
            embedding_losses=embedding_losses,
            init_std=init_std,
            chunk=chunk,
            cache_bytes=cache_bytes,
            cache_dtype=cache_dtype,
            matmul_precision=matmul_precision,
            compile=compile,
            dtype=dtype,
            device=device,
        )
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self._schedule = CosFace() if margin is None else margin
        self.step_count = 0  # the next step's number; keys its negatives
        margin = self._schedule.margin if isinstance(self._schedule, WarmUp) else self._schedule
        for caution in margin.cautions(num_classes, embedding_dim) if distributed.rank() == 0 else ():
            warnings.warn(caution, stacklevel=2)
        self.sub_centers = margin.sub_centers
        self.sample_rate, self.dropout, self.seed = sample_rate, dropout, seed
        self.sampler = random_negatives if sampler is None else sampler
        self.sampled = sample_rate < 1 or sampler is not None
        self.check_labels = check_labels
        self.dtype, self.device = dtype, device
        self.world_size = distributed.world_size()
        self.classes = class_range(num_classes, distributed.rank(), self.world_size)
        in_use = sample_rate * -(-num_classes // self.world_size) * embedding_dim * self.sub_centers
        self.compiled = (
            elementwise.compiler_works(device.type) if compile is None and in_use >= 2**24 else bool(compile)
        )
        kernels = _kernels(device) if self.compiled and dtype == torch.float32 else None
        fused = kernels is not None and matmul_precision != "float32" and not margin.changes_negatives
        chunk = chunk or softmax.default_chunk(embedding_dim, device, fused)
        self._way = softmax.Way(
            chunk=-(-chunk // self.sub_centers) * self.sub_centers,
            precision=matmul_precision,
            elementwise=elementwise.compiled() if self.compiled else elementwise.PLAIN,
            kernels=kernels,
            fused=fused,
        )
        self._centers = Centers(
            self.classes,
            embedding_dim,
            per_class=self.sub_centers,
            optimizer=build_optimizer(optimizer, momentum, weight_decay, betas, eps),
            sampled=self.sampled,
            normalized=margin.normalize_centers,
            has_bias=margin.has_bias,
            seed=seed,
            init_std=embedding_dim**-0.5 if init_std is None else init_std,
            chunk=self._way.chunk,
            kernels=self._way.kernels,
            dtype=dtype,
            device=device,
        )
        self.feature_centers: FeatureCenters | None = None  # of a center loss; read `centers` first, which waits
        self._terms: list[EmbeddingLoss | FeatureCenters] = list(embedding_losses)
        for place, loss in enumerate(embedding_losses):
            if isinstance(loss, CenterLoss):
                self.feature_centers = self._terms[place] = FeatureCenters(
                    loss, self.classes, embedding_dim, seed=seed, dtype=dtype, device=device
                )
        self.embedding_loss: Tensor | None = None  # () of the last forward's batch, as it is in the loss
        self._scale_optimizer = build_optimizer(optimizer, momentum, 0.0, betas, eps)
        self.observed: Observed | None = None  # cosines and lengths of the last forward's batch
        self.begin_phase: Callable[[str], None] = lambda name: None  # told when the gather begins, and when it ends
        self.statistics: dict[str, Tensor] = {}
        self._statistics_before = self.statistics
        self.set_statistics(self.first_statistics())
        self._buffers = Buffers(dtype, device)
        self._cache = softmax.Cache(cache_bytes, cache_dtype, device)
        self._side_stream = SideStream(device)
        self._used: InUse | None = None
        self._step_labels: Tensor | None = None  # what begin_step was given: several forwards may follow
        self._forwards: list[Forward] = []
        self._looks = margin.looks_at_length  # whether the margin still has to see lengths that it cautions against
        self._looked = False
        self._read = False  # the centers, by someone whom an update beside the backward would not wait for

    @property
    def centers(self) -> Centers:
        """This rank's rows, once the last update of them is done; the next update waits for who reads them."""
        self._side_stream.join()
        self._read = True
        return self._centers

    @property
    def target_cosine(self) -> Tensor | None:
        """() the mean over the last forward's batch."""
        return None if self.observed is None else self.observed.mean_cosine()

    @property
    def margin(self) -> Margin:
        """Of the next step, or of the one that was begun."""
        return self._schedule.at(self.step_count)

    @property
    def scale(self) -> float | Tensor | None:
        """s: the margin's, the learned one (), or None for r = |x|."""
        if not self.margin.learn_scale:
            return self.margin.scale
        self._side_stream.join()
        return self.statistics["scale"]

    # ---- a step: begin_step (optional), forwards, backwards, step

    def begin_step(self, step: int, labels: Tensor) -> None:
        """Fixes the rows in use of step number `step` from the labels of the whole global batch, equal on all ranks.

        After it forward may run once per micro-batch; `step` then updates for all of them. No collective, but where the
        sampler refreshes a table or is the caller's own: all ranks begin the same steps.
        Raises RuntimeError where a forward still waits for its `step` or `skip_step`.
        """
        if self._forwards:
            raise RuntimeError("begin_step while a forward waits for its update: call step(lr) or skip_step() first")
        self.step_count = step
        self._used = self._rows_in_use(labels, training=True)
        self._step_labels = labels.to(self.device) if self.check_labels and self.sampled else labels

    def __call__(self, embeddings: Tensor, labels: Tensor, padded_size: int | None = None) -> Tensor:
        """The mean loss () over the global batch, equal on all ranks.

        embeddings (b, D) and labels (b,), global class ids, are this rank's; b may differ between ranks and be 0.
        padded_size: a number of rows, equal on all ranks, that no rank's b exceeds; None costs one exchange of sizes.
        Backward sends the embeddings W times the gradient of the loss: data-parallel averaging divides by W.
        In grad mode the forward is kept until `step`. Raises ValueError for a label out of range, on all ranks.
        """
        if self.world_size != distributed.world_size():
            raise RuntimeError(
                f"this head was built for {self.world_size} ranks, now there are {distributed.world_size()}: build it "
                "after torch.distributed.init_process_group"
            )
        training = torch.is_grad_enabled()
        if training and self._forwards and self._step_labels is None:
            raise RuntimeError(
                "second training forward before step(lr): update first, or call begin_step(step, labels of the "
                "whole global batch) before the forwards of a step, or evaluate under torch.no_grad()"
            )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), precision_of(self._way.precision):
            self.begin_phase("gather")
            padded_size = exchange.agree_on_size(
                self._wrong_input(embeddings, labels), len(labels), padded_size, self.device
            )
            x, gathered = exchange.gather_batch(embeddings.detach(), labels, padded_size, self.dtype, self.device)
            self.begin_phase("head")
            planned = self._step_labels if training else None
            if self.check_labels:
                exchange.check_labels(gathered, self.num_classes, planned if self.sampled else None, padded_size)
            used = self._rows_in_use(gathered, training) if planned is None else self._used
            assert used is not None  # begin_step has set it where it has set the labels
            loss, gradient, kept = forward(self, x, gathered, used, training)
            if not training:
                return loss
            assert gradient is not None and kept is not None
            self._used, self._read = used, False  # what was read until here comes before this forward's backward
            self._forwards.append(kept)
            self._look_at_lengths()
        return attach(embeddings, loss, gradient[: len(labels)], kept)

    def step(self, lr: float, grad_scale: float | Tensor = 1.0) -> None:
        """Updates the rows in use by all forwards since the last step, in place, chunk by chunk.

        grad_scale: the loss scale alone; the centers' gradient is what reached the losses, divided by it. On a CUDA
        device the update runs on a stream of its own, beside what was queued since the losses' gradients were there.
        Raises RuntimeError where a forward had no backward.
        """
        self._check_backwards("step")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), precision_of(self._way.precision):
            # a scale on the device may come of the whole backward
            wait = self._read or isinstance(grad_scale, Tensor)
            after = None if wait else [kept.ready for kept in self._forwards]
            with self._side_stream.run(after, keep=(self._forwards, self._used, grad_scale, self.statistics)):
                update(self, lr, grad_scale)
        self._close()

    def gradient_norm(self, grad_scale: float | Tensor = 1.0) -> Tensor:
        """The norm () of the gradient that `step` will use, by all class centers and a learned scale, on all ranks.

        That gradient never exists as a whole, so this is another pass over the rows in use: two of the four matrix
        products of a step once more, one of the three with a cache. One collective of one number. Without weight decay.
        On a CUDA device the update then waits for the whole backward.
        """
        self._check_backwards("gradient_norm")
        self._read = True  # the buffers of the chunks are the update's too
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), precision_of(self._way.precision):
            return gradient_norm(self, grad_scale)

    def skip_step(self) -> None:
        """Drops the forwards since the last step without an update; for rows and statistics it did not happen."""
        self.statistics = self._statistics_before
        self._close()

    def _close(self) -> None:
        self._forwards, self._used, self._step_labels = [], None, None
        self._statistics_before = self.statistics
        self._cache.clear()
        self.step_count += 1

    def changing(self) -> dict[str, float]:
        """Numbers that change in training, by name, as the last step had or left them; waits for them.

        The margin's running statistics, a learned scale, what warms up, the embedding losses.
        """
        self._look_at_lengths(first=False)
        warm = self._schedule.start if isinstance(self._schedule, WarmUp) else {}
        self._side_stream.join()
        numbers = {name: v.item() for name, v in self.statistics.items() if not name.startswith("scale_")}
        numbers |= {name: getattr(self._schedule.at(max(self.step_count - 1, 0)), name) for name in warm}
        return numbers if self.embedding_loss is None else numbers | {"embedding_loss": self.embedding_loss.item()}

    def first_statistics(self) -> dict[str, float]:
        """What `statistics` is before the first step, by name: the margin's, and the learned scale with its moments."""
        first = self.margin.first_statistics()
        if self.margin.learn_scale:
            first |= {"scale": cast(float, self.margin.scale)}  # its check wants one
            first |= {f"scale_{moment}": 0.0 for moment in self._scale_optimizer.moments}
        return first

    def set_statistics(self, values: Mapping[str, float | Tensor]) -> None:
        """Running statistics () float64, equal on all ranks: where a run starts, or what a checkpoint has."""
        self.statistics = {
            name: torch.as_tensor(value, dtype=torch.float64).to(self.device) for name, value in values.items()
        }
        self._statistics_before = self.statistics  # what skip_step puts back

    # ---- for tests, exports, small C

    def full_weight(self) -> Tensor:
        """All class centers (C, D), or with k sub-centers (k C, D), caught up, on every rank. A collective."""
        ids = torch.arange(len(self.classes) * self.sub_centers, device=self.device)
        weight, _ = self.centers.rows_at(self.centers.select(ids), ids)
        per_rank = -(-self.num_classes // distributed.world_size()) * self.sub_centers
        return distributed.gather_rows(weight, per_rank, self.num_classes * self.sub_centers)

    # ---- parts

    def _check_backwards(self, caller: str) -> None:
        if not self._forwards:
            raise RuntimeError(f"{caller} without a training forward: call head(embeddings, labels) and backward first")
        waiting = sum(kept.grad is None for kept in self._forwards)
        if waiting:
            raise RuntimeError(
                f"{caller}, but {waiting} of {len(self._forwards)} forwards had no backward: call loss.backward() "
                "first, or skip_step() to drop them"
            )

    def _wrong_input(self, embeddings: Tensor, labels: Tensor) -> str | None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            return f"embeddings are {tuple(embeddings.shape)}; wanted (b, {self.embedding_dim})"
        if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
            found = f"{labels.dtype} {tuple(labels.shape)}"
            return f"labels are {found}; wanted int64 ({len(embeddings)},), one per embedding"
        return None

    def _look_at_lengths(self, first: bool = True) -> None:
        """Warns once, on rank 0, of |x| that the margin is not made for. Waits for the last batch's lengths.

        Called for the first training batch, and wherever numbers are read.
        """
        if not self._looks or self.observed is None or (first and self._looked):
            return
        self._looked = True
        caution = self.margin.caution_of_lengths(self.observed.embedding_length[self.observed.real])
        if caution is not None:
            self._looks = False
            if distributed.rank() == 0:
                warnings.warn(caution, stacklevel=3)

    def _rows_in_use(self, labels: Tensor, training: bool) -> InUse:
        """This rank's positives among `labels` (B,) and the sampler's negatives."""
        if not self.sampled:
            return self.centers.select(None)
        if training and hasattr(self.sampler, "refresh"):  # an evaluation leaves no trace
            self.sampler.refresh(self, self.step_count)
        labels = labels.cpu()  # the number of rows in use is needed on the host
        drawn = negatives(self, self.step_count, labels)
        here = labels[(labels >= self.classes.start) & (labels < self.classes.stop)]
        ids = with_positives(drawn, here) - self.classes.start
        if self.sub_centers > 1:
            ids = (ids.unsqueeze(1) * self.sub_centers + torch.arange(self.sub_centers)).flatten()
        return self.centers.select(upload(ids, self.device))


def _kernels(device: torch.device) -> ModuleType | None:
    """Those for this device, if there are."""
    if device.type != "cuda":
        return None
    from partial_fc.head import kernels  # needs Triton, which torch brings where there may be CUDA

    return kernels if kernels.run_on(device) else None
