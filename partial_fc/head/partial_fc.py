"""PartialFC: the head as a training loop uses it. Joins the local mathematics with three collectives a step.

Shapes: b this rank's batch, B = W * (the largest b) gathered rows with padding, D embedding size, C classes,
C_r classes of this rank, U rows in use.
"""

import math
import warnings
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from partial_fc.head import elementwise, exchange, softmax
from partial_fc.head.attach import Forward, attach
from partial_fc.head.centers import Centers, InUse
from partial_fc.head.margin import Margin, Sample
from partial_fc.head.margins import CosFace
from partial_fc.head.matmul import Precision, check_precision, precision_of
from partial_fc.head.optimizers import build_optimizer
from partial_fc.head.partition import class_range
from partial_fc.head.sampling import Sampler, negatives, random_negatives
from partial_fc.head.side_stream import SideStream, upload
from partial_fc.head.softmax import LOG2_E, Buffers
from partial_fc.head.targets import Target, find_targets, regularized, target_part, unit
from partial_fc.parallel import distributed
from partial_fc.seeds import keyed_bytes


class PartialFC:
    """A classifier over `num_classes` whose class centers are partitioned over all ranks (arXiv 2010.05222,
    2203.15565).

        head = PartialFC(num_classes, embedding_dim, margin=CosFace(scale=64, margin=0.35), sample_rate=0.1)
        loss = head(embeddings, labels)     # (b, D), (b,): this rank's; the same loss () on every rank
        loss.backward()                     # the embeddings receive their gradient; centers are untouched
        head.step(lr)                       # centers updated chunk by chunk

    The centers are plain tensors: DDP, optimizers and `parameters()` never see them.

    num_classes, embedding_dim: C and D. margin: see `margins`. sample_rate: the probability of each negative in a
    step; positives come on top, and the softmax runs over what was drawn, without a correction (as published).
    optimizer: "sgd" is torch.optim.SGD on all C rows: those that a step leaves out are caught up exactly when they are
    next used. "adamw" is torch.optim.AdamW on the rows in use, with `betas` and `eps`; the others stay as they are.
    seed: of initial centers and negatives. init_std: standard deviation of initial centers; None: 1 / sqrt(D), which
    is length 1 (at a tenth of that the first updates, which grow with 1 / |w|, throw the centers together).
    sampler: which negatives a step uses; None: each with probability sample_rate (see `sampling`).

    chunk: rows of logits that exist at once; None: see `softmax.default_chunk`. cache_bytes: room on this rank for
    numbers (B, U) that spare the update a product, in cache_dtype, float32 or bfloat16, reserved whole; what does not
    fit is computed again. matmul_precision: see `matmul`. compile: the elementwise parts by torch.compile;
    None: where a compiler works and a rank has 2^24 numbers in use or more, since compiling takes 20 seconds.
    check_labels: one host read a forward; without it a label that is out of range, or that begin_step was not given,
    gives a wrong loss.
    dtype: of centers, logits and gradients, float32 or float64; embeddings of any float type are converted.

    Raises ValueError for sizes, rates and options out of range.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: Margin | None = None,
        sample_rate: float = 1.0,
        *,
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
        if num_classes < 1 or embedding_dim < 1:
            raise ValueError(
                f"num_classes and embedding_dim are {num_classes} and {embedding_dim}; both must be positive"
            )
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate is {sample_rate}; give a probability in (0, 1]")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; give torch.float32 or torch.float64")
        if not (margin is None or isinstance(margin, Margin)):
            raise ValueError(f"margin is {margin!r}; give an object such as CosFace(scale=64, margin=0.35)")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; give a positive number of rows")
        if init_std is not None and not 0 < init_std < math.inf:
            raise ValueError(f"init_std is {init_std}; give a positive number")
        if cache_bytes < 0 or cache_dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"cache_bytes and cache_dtype are {cache_bytes} and {cache_dtype}; give 0 or more, and torch.float32, "
                "torch.bfloat16, or for a float64 head torch.float64"
            )
        device = torch.device(device)
        if not (sampler is None or callable(sampler)) or isinstance(sampler, type):
            raise ValueError(f"sampler is {sampler!r}; give f(head, step, labels), or an object as HardNegatives(16)")
        if compile not in (None, True, False):
            raise ValueError(f"compile is {compile!r}; give True, False, or None for True where it pays")
        if compile and not elementwise.compiler_works(device.type):
            raise ValueError(
                f"compile is True, but torch.compile finds no compiler for {device.type} here: install one (g++), or "
                "give False"
            )
        check_precision(matmul_precision, dtype, device)
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.margin = CosFace() if margin is None else margin
        for caution in self.margin.cautions(num_classes, embedding_dim) if distributed.rank() == 0 else ():
            warnings.warn(caution, stacklevel=2)
        self.sample_rate, self.seed = sample_rate, seed
        self.sampler = random_negatives if sampler is None else sampler
        self.sampled = sample_rate < 1 or sampler is not None
        self.check_labels = check_labels
        self.dtype, self.device = dtype, device
        self.world_size = distributed.world_size()
        self.classes = class_range(num_classes, distributed.rank(), self.world_size)
        # |logit| <= s: 2^logit and its sum stay inside the dtype without a maximum as long as s + ln C does, and so
        # does 2^logit / |w| as long as s + ln(1e8) does
        largest = 87.0 if dtype == torch.float32 else 700.0
        room = max(math.log(num_classes), -math.log(elementwise.SHORTEST))
        normalized = self.margin.scale is not None and self.margin.normalize_centers and not self.margin.has_bias
        in_use = sample_rate * -(-num_classes // self.world_size) * embedding_dim
        self.compiled = (
            elementwise.compiler_works(device.type) if compile is None and in_use >= 2**24 else bool(compile)
        )
        self._way = softmax.Way(
            chunk=chunk or softmax.default_chunk(embedding_dim, device),
            bounded=normalized and self.margin.scale + room <= largest,
            precision=matmul_precision,
            elementwise=elementwise.compiled() if self.compiled else elementwise.PLAIN,
        )
        self._centers = Centers(
            self.classes,
            embedding_dim,
            optimizer=build_optimizer(optimizer, momentum, weight_decay, betas, eps),
            sampled=self.sampled,
            normalized=self.margin.normalize_centers,
            has_bias=self.margin.has_bias,
            seed=seed,
            init_std=embedding_dim**-0.5 if init_std is None else init_std,
            chunk=self._way.chunk,
            dtype=dtype,
            device=device,
        )
        self.step_count = 0  # the next step's number; keys its negatives
        self.target_cosine: Tensor | None = None  # () mean over the last forward's batch
        self.set_statistics(self.margin.first_statistics())
        self._buffers = Buffers(dtype, device)
        self._cache = softmax.Cache(cache_bytes, cache_dtype, device)
        self._side_stream = SideStream(device)
        self._used: InUse | None = None
        self._step_labels: Tensor | None = None  # what begin_step was given: several forwards may follow
        self._forwards: list[Forward] = []
        self._read = False  # the centers, by someone whom an update beside the backward would not wait for

    @property
    def centers(self) -> Centers:
        """This rank's rows, once the last update of them is done; the next update waits for who reads them."""
        self._side_stream.join()
        self._read = True
        return self._centers

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
            padded_size = exchange.agree_on_size(
                self._wrong_input(embeddings, labels), len(labels), padded_size, self.device
            )
            x, gathered = exchange.gather_batch(embeddings.detach(), labels, padded_size, self.dtype, self.device)
            planned = self._step_labels if training else None
            if self.check_labels:
                exchange.check_labels(gathered, self.num_classes, planned if self.sampled else None, padded_size)
            used = self._rows_in_use(gathered, training) if planned is None else self._used
            loss, gradient, kept = self._forward(x, gathered, used, training)
            if not training:
                return loss
            self._used, self._read = used, False  # what was read until here comes before this forward's backward
            self._forwards.append(kept)
        return attach(embeddings, loss, gradient[: len(labels)], kept)

    def step(self, lr: float, grad_scale: float | Tensor = 1.0) -> None:
        """Updates the rows in use by all forwards since the last step, in place, chunk by chunk.

        grad_scale: the loss scale alone; the centers' gradient is what reached the losses, divided by it. On a CUDA
        device the update runs on a stream of its own, beside what was queued since the losses' gradients were there.
        Raises RuntimeError where a forward had no backward.
        """
        if not self._forwards:
            raise RuntimeError("step without a training forward: call head(embeddings, labels) and backward first")
        waiting = sum(kept.grad is None for kept in self._forwards)
        if waiting:
            raise RuntimeError(
                f"step, but {waiting} of {len(self._forwards)} forwards had no backward: call loss.backward() first, "
                "or skip_step() to drop them"
            )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), precision_of(self._way.precision):
            # a scale on the device may come of the whole backward
            wait = self._read or isinstance(grad_scale, Tensor)
            after = None if wait else [kept.ready for kept in self._forwards]
            with self._side_stream.run(after, keep=(self._forwards, self._used, grad_scale)):
                self._update(lr, grad_scale)
        self._close()

    def skip_step(self) -> None:
        """Drops the forwards since the last step without an update; for rows and statistics it did not happen."""
        self.statistics = self._statistics_before
        self._close()

    def _close(self) -> None:
        self._forwards, self._used, self._step_labels = [], None, None
        self._statistics_before = self.statistics
        self._cache.clear()
        self.step_count += 1

    def set_statistics(self, values: dict[str, float | Tensor]) -> None:
        """The margin's running statistics (), float64: where a run starts, or what a checkpoint has."""
        self.statistics = {
            name: torch.as_tensor(value, dtype=torch.float64).to(self.device) for name, value in values.items()
        }
        self._statistics_before = self.statistics  # what skip_step puts back

    # ---- for tests, exports, small C

    def full_weight(self) -> Tensor:
        """All class centers (C, D), caught up, on every rank. A collective; memory for C rows."""
        ids = torch.arange(len(self.classes), device=self.device)
        weight, _ = self.centers.rows_at(self.centers.select(ids), ids)
        per_rank = -(-self.num_classes // distributed.world_size())
        padded = weight.new_zeros(per_rank, self.embedding_dim)
        padded[: len(weight)] = weight
        return distributed.all_gather(padded).flatten(0, 1)[: self.num_classes]

    # ---- parts

    def _wrong_input(self, embeddings: Tensor, labels: Tensor) -> str | None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            return f"embeddings are {tuple(embeddings.shape)}; wanted (b, {self.embedding_dim})"
        if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
            found = f"{labels.dtype} {tuple(labels.shape)}"
            return f"labels are {found}; wanted int64 ({len(embeddings)},), one per embedding"
        return None

    def _rows_in_use(self, labels: Tensor, training: bool) -> InUse:
        """This rank's positives among `labels` (B,) and the sampler's negatives."""
        if not self.sampled:
            return self.centers.select(None)
        if training and hasattr(self.sampler, "refresh"):  # an evaluation leaves no trace
            self.sampler.refresh(self, self.step_count)
        labels = labels.cpu()  # the number of rows in use is needed on the host
        drawn = negatives(self, self.step_count, labels)
        here = labels[(labels >= self.classes.start) & (labels < self.classes.stop)]
        ids = torch.cat([drawn, here]).unique() - self.classes.start
        return self.centers.select(upload(ids, self.device))

    def _columns(self, labels: Tensor, used: InUse) -> Tensor:
        """The row of each label (B,) among the rows in use; -1 where it is not: another rank's, or padding."""
        local = labels - self.classes.start
        owned = (labels >= self.classes.start) & (labels < self.classes.stop)
        if used.ids is not None:
            if used.count == 0:
                return torch.full_like(labels, -1)
            row = torch.searchsorted(used.ids, local).clamp_max(used.count - 1)
            owned &= used.ids[row] == local  # begin_step may not have been given this label
            local = row
        return torch.where(owned, local, -1)

    def _forward(
        self, x: Tensor, labels: Tensor, used: InUse, training: bool
    ) -> tuple[Tensor, Tensor | None, Forward | None]:
        """Loss (), this rank's embedding gradient (padded_size, D) and what `step` needs."""
        real = labels != exchange.PADDING
        count = real.sum().clamp_min(1)
        column = self._columns(labels, used)
        target = self._targets(x, used, column)
        places = softmax.Places.of(column, self._way.chunk)
        maximum, total, mean, cached = softmax.sum_negatives(
            self._scaled(x) * LOG2_E,
            lambda rows: self._centers.take(used, rows, self._buffers, moments=False),
            used.count,
            places,
            way=self._way,
            weighted=training,
            cache=self._cache.reserve(len(x), used.count, self._way.chunk) if training else None,
        )
        maximum = maximum / LOG2_E
        log_negatives, cosine, w_length, bias = exchange.sum_over_ranks(maximum, total, target, self._way.bounded)
        length = target.x_length.squeeze(1)
        sample = self._sample(cosine, length, real, training)
        psi = self.margin.target_of(sample)
        factor = length if self.margin.scale is None else self.margin.scale
        if not self.margin.normalize_centers:
            factor = factor * w_length
        logit = factor * psi + bias - self.margin.shift()
        # log(1 + Z_neg / e^t) in this form keeps small losses: log Z - t has lost 8 % of a loss of 1e-5
        losses = torch.logaddexp(torch.zeros_like(logit), log_negatives - logit)
        log_z = torch.logaddexp(log_negatives, logit)
        p_minus_one = -torch.exp(log_negatives - log_z)
        zero = torch.zeros_like(losses)
        regularizer, by_length = regularized(self.margin, length)
        loss = (torch.where(real, losses + regularizer, zero).sum() / count).to(self.dtype)
        self.target_cosine = torch.where(real, cosine, zero).sum() / count
        if not training:
            return loss, None, None
        psi_prime, psi_by_length = self.margin.derivatives(sample)
        kept = Forward(x, column, places, real, log_z, psi, psi_prime, p_minus_one, cached)
        gradient = mean * torch.exp(maximum - log_z).to(self.dtype).unsqueeze(1)
        if self.margin.scale is not None:  # the backward of s x / |x|
            x_hat, x_length = unit(x)
            gradient -= (gradient * x_hat).sum(dim=1, keepdim=True) * x_hat
            gradient *= self.margin.scale / x_length
        gradient += target_part(self.margin, target, psi, psi_prime, p_minus_one, by_embedding=True).to(self.dtype)
        along = torch.where(target.owned, p_minus_one * factor * psi_by_length + by_length, zero)
        gradient += (along.unsqueeze(1) * target.x_hat).to(self.dtype)
        gradient = torch.where(real.unsqueeze(1), gradient / count * distributed.world_size(), 0)
        return loss, distributed.reduce_scatter_sum(gradient), kept

    def _sample(self, cosine: Tensor, length: Tensor, real: Tensor, training: bool) -> Sample:
        """What the margin sees of the batch; a training batch goes into the running statistics first."""

        def normal() -> Tensor:
            key = int.from_bytes(keyed_bytes(16, "margin", self.seed, self.step_count, len(self._forwards)), "little")
            drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(len(real))
            # by place among the real samples, so that padding and the number of ranks do not matter
            return upload(torch.from_numpy(drawn), self.device)[(real.cumsum(0) - 1).clamp_min(0)]

        sample = Sample(cosine, length, real, self.step_count, self.statistics, normal)
        if not training:
            return sample
        self.statistics = self.margin.observe(sample)
        return sample._replace(statistics=self.statistics)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.margin.scale is None else unit(x)[0] * self.margin.scale

    def _targets(self, x: Tensor, used: InUse, column: Tensor) -> Target:
        owned = column >= 0
        if used.count == 0:
            return find_targets(x, torch.zeros_like(x), None, owned)
        return find_targets(x, *self._centers.rows_at(used, column.clamp_min(0)), owned)

    def _update(self, lr: float, grad_scale: float | Tensor) -> None:
        used, centers = self._used, self._centers
        optimizer = centers.optimizer
        rates = optimizer.rates(lr, centers.updates + 1)
        passes = [self._pass(kept, used, grad_scale) for kept in self._forwards]  # before any row changes
        for number, selected in enumerate(self._way.chunks(used.count)):
            rows = centers.take(used, selected, self._buffers, moments=True)
            gradient, bias_gradient = softmax.row_gradients(rows, number, passes, self._way, self._buffers)
            softmax.update_rows(optimizer, rows, gradient, bias_gradient, rates, self._way)
            centers.put(used, selected, rows)
        centers.end_update(used, lr)

    def _pass(self, kept: Forward, used: InUse, grad_scale: float | Tensor) -> softmax.Pass:
        """What one forward contributes to the update: the mean over its real samples, times what reached its loss."""
        each = kept.grad / grad_scale / kept.real.sum().clamp_min(1)
        coefficient = torch.where(kept.real, each, 0).to(self.dtype)
        target = self._targets(kept.x, used, kept.column)
        by_center = target_part(self.margin, target, kept.psi, kept.psi_prime, kept.p_minus_one, by_embedding=False)
        by_center = by_center.to(self.dtype) * coefficient.unsqueeze(1)
        by_bias = torch.where(target.owned, kept.p_minus_one, 0).to(self.dtype) * coefficient
        return softmax.Pass(
            self._scaled(kept.x), coefficient, kept.log_z * LOG2_E, kept.places, by_center, by_bias, kept.cached
        )
