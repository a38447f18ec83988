"""What the head is measured against: plain PyTorch, the published PartialFC v2, and the least that any head computes.

Every peer has `step(embeddings, labels)`, one training step that leaves the embeddings' gradient and returns the loss,
and `state()`, its tensors of the centers' size that outlive a step. They start from the centers that PartialFC starts
from. Logits are s f(cos): margins with a scale, on centers that are normalized.

Shapes: b this rank's batch, B global batch, D embedding size, C classes, C_r classes of this rank, U rows in use.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from partial_fc.head.centers import initial_centers
from partial_fc.head.margin import Margin
from partial_fc.head.matmul import Precision, matmul_nt, precision_of
from partial_fc.head.partition import class_range
from partial_fc.parallel import distributed


def starting_centers(classes: range, dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The centers (C_r, D) that PartialFC with this seed starts from."""
    weight = torch.empty(len(classes), dim, dtype=dtype, device=device)
    initial_centers(classes, dim, seed, dim**-0.5, weight)
    return weight


def draw_rows(positives: Tensor, num_classes: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of `num_classes`, sorted (U,): the unique `positives` (n,) and random others (arXiv 2203.15565).

    As it was published: one random number a class, two for positives, the largest of them. More positives than
    `count` are all taken.
    """
    if len(positives) >= count:
        return positives
    order = torch.rand(num_classes, generator=generator, device=positives.device)
    order[positives] = 2.0
    return torch.topk(order, count).indices.sort().values


def in_its_precision(step: Callable) -> Callable:
    """A step whose float32 products are TF32 where its head's `precision` says so, backward included."""

    def within(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        with precision_of(self.precision):
            return step(self, embeddings, labels)

    return within


def cosines(x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    """Samples (B, D) and rows (U, D): (B, U). bfloat16 is autocast's, which rounds its result as well."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        cosine = functional.linear(functional.normalize(x), functional.normalize(weight))
    return cosine.float() if precision == "bfloat16" else cosine


class Dense:
    """Plain PyTorch in one process: normalize both sides, linear, margin, cross_entropy, autograd, fused SGD.

    At sample_rate < 1: what a user writes for the same result. The drawn rows of the whole weight are selected by
    index, the loss is over them, autograd scatters their gradient into a dense one (C, D), and the optimizer moves
    all C rows, the idle ones by momentum and weight decay.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        margin: Margin,
        sample_rate: float = 1.0,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
    ):
        device = torch.device(device)
        self.precision = precision
        self.margin, self.rows = margin, int(sample_rate * num_classes)
        self.weight = nn.Parameter(starting_centers(range(num_classes), dim, seed, dtype, device))
        self.optimizer = torch.optim.SGD([self.weight], lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.generator = torch.Generator(device).manual_seed(seed)

    @in_its_precision
    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """In: all embeddings (B, D) and labels (B,). Out: the mean loss ()."""
        weight = self.weight
        if self.rows < len(weight):
            ids = draw_rows(labels.unique(), len(weight), self.rows, self.generator)
            weight, labels = weight.index_select(0, ids), torch.searchsorted(ids, labels)
        cosine = cosines(embeddings, weight, self.precision)
        sample = torch.arange(len(labels), device=labels.device)
        cosine[sample, labels] = self.margin.target(cosine[sample, labels])
        loss = functional.cross_entropy(self.margin.scale * cosine, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> list[Tensor]:
        return [self.weight, *(kept["momentum_buffer"] for kept in self.optimizer.state.values())]


class _GatherEmbeddings(torch.autograd.Function):
    """In: (b, D). Out: all ranks' (B, D). Backward: W times the sum over ranks of this rank's part.

    W times, because data-parallel averaging divides by W. The published backward is one reduce to each rank;
    an all-reduce of the same (b, D) stands for each of them.
    """

    @staticmethod
    def forward(ctx, embeddings):
        return distributed.all_gather(embeddings).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        world_size = distributed.world_size()
        parts = [distributed.all_reduce_sum(part) for part in gradient.contiguous().chunk(world_size)]
        return parts[distributed.rank()] * world_size


class _DistributedCrossEntropy(torch.autograd.Function):
    """Softmax and cross entropy over partitioned logits (arXiv 2010.05222): a maximum, a sum, the targets' probability.

    In: logits (B, U), overwritten by their softmax, and each target's column (B,), -1 where another rank owns it.
    Out: the mean loss (), in which a sample counts at most -log 1e-30 = 69, as published. Backward: softmax minus one
    at the targets, over B.
    """

    @staticmethod
    def forward(ctx, logits, column):
        largest = distributed.all_reduce_max(logits.amax(dim=1, keepdim=True))
        softmax = logits.sub_(largest).exp_()
        softmax.div_(distributed.all_reduce_sum(softmax.sum(dim=1, keepdim=True)))
        own = torch.where(column >= 0)[0]
        target = torch.zeros_like(largest)
        target[own, 0] = softmax[own, column[own]]
        target = distributed.all_reduce_sum(target)
        ctx.save_for_backward(softmax, own, column)
        return -target.clamp_min_(1e-30).log_().mean()

    @staticmethod
    def backward(ctx, gradient):
        softmax, own, column = ctx.saved_tensors
        softmax[own, column[own]] -= 1
        return softmax.mul_(gradient / len(softmax)), None


class Published:
    """PartialFC v2 (An et al., arXiv 2203.15565) on its partition of the classes, with a fused SGD.

    The weight is a Parameter (C_r, D). A step gathers embeddings and labels, normalizes a copy of the rows in use,
    computes dense logits (B, U), clamps the cosines, sets the margin at the targets, multiplies by the scale, and has
    autograd make a dense gradient (U, D). At sample_rate < 1 the drawn rows and their momentum are gathered into a
    parameter, updated by the optimizer and scattered back; the other rows stay as they are. 5 + W collectives. The
    clamp, which the released code has and CosFace does not need, is 8 % of a step at D = 512 and 18 % at D = 128.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        margin: Margin,
        sample_rate: float = 1.0,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
    ):
        device = torch.device(device)
        self.precision = precision
        self.margin = margin
        self.classes = class_range(num_classes, distributed.rank(), distributed.world_size())
        self.rows = int(sample_rate * len(self.classes))
        self.weight = nn.Parameter(starting_centers(self.classes, dim, seed, dtype, device))
        self.momentum = torch.zeros_like(self.weight) if sample_rate < 1 else None
        self.optimizer = torch.optim.SGD([self.weight], lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.generator = torch.Generator(device).manual_seed(seed + distributed.rank())
        self.ids: Tensor | None = None  # (U,) the rows in use of the last step, where they are drawn

    @in_its_precision
    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """In: this rank's embeddings (b, D) and labels (b,), b equal on all ranks. Out: the mean loss (), of all."""
        gathered = _GatherEmbeddings.apply(embeddings)
        labels = distributed.all_gather(labels).flatten()
        owned = (labels >= self.classes.start) & (labels < self.classes.stop)
        column = torch.where(owned, labels - self.classes.start, -1)
        weight = self.weight if self.momentum is None else self._take(column, owned)
        if self.momentum is not None:
            column[owned] = torch.searchsorted(self.ids, column[owned])
        cosine = cosines(gathered, weight, self.precision).clamp(-1, 1)
        sample = torch.where(owned)[0]
        cosine[sample, column[sample]] = self.margin.target(cosine[sample, column[sample]])
        loss = _DistributedCrossEntropy.apply(cosine * self.margin.scale, column)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.momentum is not None:
            self._put(weight)
        return loss.detach()

    def _take(self, column: Tensor, owned: Tensor) -> nn.Parameter:
        """The drawn rows as a parameter (U, D) of the optimizer, with their momentum."""
        self.ids = draw_rows(column[owned].unique(), len(self.weight), self.rows, self.generator)
        active = nn.Parameter(self.weight.detach()[self.ids])
        self.optimizer.state.clear()
        self.optimizer.param_groups[0]["params"] = [active]
        self.optimizer.state[active]["momentum_buffer"] = self.momentum[self.ids]
        return active

    def _put(self, active: nn.Parameter) -> None:
        with torch.no_grad():
            self.weight[self.ids] = active
            self.momentum[self.ids] = self.optimizer.state[active]["momentum_buffer"]

    def state(self) -> list[Tensor]:
        if self.momentum is not None:
            return [self.weight, self.momentum]
        return [self.weight, *(kept["momentum_buffer"] for kept in self.optimizer.state.values())]


Matmul = Callable[[Tensor, Tensor, Tensor], Tensor]  # a (m, k), b (n, k), room for the result: a @ b.T (m, n)


def torch_matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """bfloat16 operands: a float32 or bfloat16 result, as `out` is."""
    if a.dtype == out.dtype:
        return torch.mm(a, b.T, out=out)
    return torch.mm(a, b.T, out_dtype=out.dtype)


def head_matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The head's own product. It cannot write to `out`; a chunk's result comes from memory that was just freed."""
    return matmul_nt(a, b, "bfloat16" if a.dtype == torch.bfloat16 else "float32").to(out.dtype)


class Limit:
    """What any head has to compute: three matmuls (logits, dX, dW) and one pass over the touched rows' state.

    In chunks as the head does it, which is never slower than whole: logits and dW are still in the cache when they are
    read. The pass is the fused SGD kernel: it reads weight, momentum and dW and writes the first two (a sixth of the
    time of SGD's separate operations). There is no softmax, no normalization, no collective, no draw, and the U rows
    lie together. With bfloat16 the rows are rounded, and logits leave their product rounded. Learning rate 0, which is
    the same work, keeps the numbers finite.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        batch: int,
        matmul: Matmul,
        *,
        chunk: int = 2048,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
    ):
        self.matmul, self.precision = matmul, precision
        self.operand = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.weight = torch.empty(rows, dim, device=device).normal_()
        self.parts = [nn.Parameter(self.weight[start : start + chunk]) for start in range(0, rows, chunk)]
        self.optimizers = [
            torch.optim.SGD([part], lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)
            for part in self.parts
        ]
        longest = min(chunk, rows)
        self.logits = torch.empty(batch * longest, dtype=self.operand, device=device)
        self.by_weight = torch.empty(longest, dim, device=device)
        self.by_embedding = torch.empty(batch, dim, device=device)

    @in_its_precision
    def step(self, embeddings: Tensor, labels: Tensor) -> None:
        """In: all embeddings (B, D); the labels make no difference. Out: nothing; `by_embedding` (B, D) holds the last
        chunk's dX."""
        x = embeddings.detach().to(self.operand)
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            weight, count = part.detach().to(self.operand), len(part)
            logits = self.matmul(x, weight, self.logits[: len(x) * count].view(len(x), count))
            self.by_embedding = self.matmul(logits, weight.T, self.by_embedding)
            part.grad = self.matmul(logits.T, x.T, self.by_weight[:count])
            optimizer.step()
            part.grad = None

    def state(self) -> list[Tensor]:
        return [self.weight]
