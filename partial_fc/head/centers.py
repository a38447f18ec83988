"""Class centers of one rank: storage, initialization, catch-up of rows that sat out.

Nothing here depends on the number of ranks: a center's initial value is a function of (seed, class).

Shapes: C_r classes of this rank, D embedding size, U rows in use, K lags of the catch-up table.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from partial_fc.head.elementwise import inverse_norms
from partial_fc.head.optimizers import SGD, Learned, Optimizer
from partial_fc.head.side_stream import upload
from partial_fc.head.softmax import Buffers, Rows
from partial_fc.seeds import seed_for

INIT_BLOCK = 1024  # classes that share one random generator: 1 ms of drawing at D = 512


def initial_centers(classes: range, dim: int, seed: int, std: float, out: Tensor) -> None:
    """Fills `out` (C_r, D) with N(0, std^2), a function of (seed, class) alone; float32 draws whatever the dtype."""
    for block in range(classes.start // INIT_BLOCK, -(-classes.stop // INIT_BLOCK)):
        first = block * INIT_BLOCK
        generator = torch.Generator().manual_seed(seed_for("centers", seed, block))
        values = torch.randn(INIT_BLOCK, dim, generator=generator).mul_(std)
        start, stop = max(classes.start, first), min(classes.stop, first + INIT_BLOCK)
        if start < stop:
            out[start - classes.start : stop - classes.start] = values[start - first : stop - first].to(out)


class MissedUpdates:
    """What SGD with momentum and weight decay does to a row without gradients, for every number of missed updates.

    One update moves (w, v) by M = [[1 - lr wd, -lr mu], [wd, mu]]; a row that missed k of them has to be multiplied by
    M_t ... M_(t-k+1). The table holds that product for every k, in float64, and is multiplied by M_t as a whole at each
    update: so a changing learning rate is right, and replaying the history gives the same table bit for bit.
    """

    def __init__(self) -> None:
        self._history = array("d")  # lr, momentum, weight decay of every update: 24 bytes each
        self.table = np.eye(2)[None]  # (K, 2, 2)

    @property
    def updates(self) -> int:
        return len(self._history) // 3

    @property
    def history(self) -> Tensor:
        """(updates, 3) float64: learning rate, momentum, weight decay."""
        return torch.tensor(self._history, dtype=torch.float64).view(-1, 3)

    def record(self, lr: float, momentum: float, weight_decay: float) -> None:
        self._history.extend((lr, momentum, weight_decay))
        self._multiply(lr, momentum, weight_decay)

    def _multiply(self, lr: float, momentum: float, weight_decay: float) -> None:
        matrix = np.array([[1 - lr * weight_decay, -lr * momentum], [weight_decay, momentum]])
        self.table = np.concatenate([np.eye(2)[None], matrix @ self.table])

    def keep(self, lags: int) -> None:
        """Forgets products of more than `lags` updates: no row lags further, and lags grow by one an update."""
        self.table = self.table[: lags + 1]

    def replay(self, history: Tensor, lags: int) -> None:
        """Restores the state after `history`, for rows that lag at most `lags` updates."""
        self._history = array("d", history.flatten().tolist())
        self.table = np.eye(2)[None]
        for update in history[len(history) - lags :].tolist():
            self._multiply(*update)

    def matrices(self, lag: Tensor) -> Tensor:
        """The products for rows that missed `lag` (n,) updates: (n, 2, 2) float64 on lag's device."""
        return upload(torch.from_numpy(self.table), lag.device)[lag]


@dataclass(frozen=True)
class InUse:
    """The rows in use of a step."""

    count: int  # U
    ids: Tensor | None  # (U,) local, sorted; None: all rows, in place
    missed: Tensor | None  # (4, U) entries of the catch-up matrices; None: nothing to catch up

    def __getitem__(self, rows: slice | Tensor) -> "InUse":
        ids = self.ids[rows]
        return InUse(len(ids), ids, None if self.missed is None else self.missed[:, rows])


class Centers:
    """The rows of one rank and their optimizer state.

    State, where C_r counts `per_class` rows for every class: weight (C_r, D) and the optimizer's moments (C_r, D);
    1/|w| (C_r,) kept true by every update where centers are normalized and nothing is sampled; `last_update` (C_r,),
    the updates that a row has seen, where rows that sit out are caught up: sampled, with SGD; bias and its moments.
    """

    TRIM_EVERY = 1024  # updates; finding the largest lag reads last_update once

    def __init__(
        self,
        classes: range,
        dim: int,
        *,
        per_class: int = 1,
        optimizer: Optimizer,
        sampled: bool,
        normalized: bool,
        has_bias: bool,
        seed: int,
        init_std: float,
        chunk: int,
        kernels: ModuleType | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.normalized, self.chunk, self.optimizer, self.sampled = normalized, chunk, optimizer, sampled
        # partial_fc.head.kernels, where they run: one then updates rows and norms
        self.kernels = kernels if normalized and not has_bias and isinstance(optimizer, SGD) else None
        self.per_class = per_class
        rows = range(classes.start * per_class, classes.stop * per_class)
        count = len(rows)
        weight = torch.empty(count, dim, dtype=dtype, device=device)
        initial_centers(rows, dim, seed, init_std, weight)
        self.weight = _at_rest(weight, optimizer)
        self.bias = _at_rest(weight.new_zeros(count), optimizer) if has_bias else None
        catches_up = sampled and isinstance(optimizer, SGD)
        self.last_update = torch.zeros(count, dtype=torch.int32, device=device) if catches_up else None
        self.missed = MissedUpdates()
        self.updates = 0
        self.inverse_norm = weight.new_empty(count) if normalized and not sampled else None
        self._renew_inverse_norms()

    def _renew_inverse_norms(self) -> None:
        if self.inverse_norm is not None:
            norms = inverse_norms if self.kernels is None else self.kernels.inverse_norms
            for rows in self._chunks():  # those of the update, so that it rounds alike
                norms(self.weight.value[rows], self.inverse_norm[rows])

    def _chunks(self) -> Iterator[slice]:
        count = len(self.weight.value)
        return (slice(start, min(start + self.chunk, count)) for start in range(0, count, self.chunk))

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps by class: live tensors (C_r, ...), or (C_r, k, ...) with k rows a class."""
        state = {"weight": self.weight.value, **dict(zip(self.optimizer.moments, self.weight.moments, strict=True))}
        if self.bias is not None:
            names = (f"bias_{name}" for name in self.optimizer.moments)
            state |= {"bias": self.bias.value, **dict(zip(names, self.bias.moments, strict=True))}
        if self.last_update is not None:
            state["last_update"] = self.last_update
        return {name: self._by_class(tensor) for name, tensor in state.items()}

    def _by_class(self, tensor: Tensor) -> Tensor:
        return tensor if self.per_class == 1 else tensor.unflatten(0, (len(tensor) // self.per_class, self.per_class))

    def load(self, read: Callable[[str, Tensor], bool], history: Tensor, updates: Tensor | None = None) -> None:
        """Overwrites the state. `read(name, out)` fills `out` with this rank's rows, or says False without last_update.

        A checkpoint that was written at another sample rate is fine: what it lacks means that every row is current, and
        rows that lag in it are caught up where nothing is sampled.
        """
        last_update = self.last_update
        if last_update is None:
            last_update = torch.empty(len(self.weight.value), dtype=torch.int32, device=self.weight.value.device)
        for name, tensor in self.state().items():
            if name != "last_update":
                read(name, tensor)
        if not read("last_update", self._by_class(last_update)):
            last_update.fill_(len(history))
        lags = len(history) - int(last_update.min()) if len(last_update) else 0
        self.missed.replay(history, lags)
        self.updates = len(history) if updates is None else int(updates)  # early checkpoints have SGD alone
        if self.last_update is None:
            if lags > 0:
                self._catch_up_all(last_update)
            self.missed = MissedUpdates()  # all rows are current: this run's checkpoints need no history
        self._renew_inverse_norms()

    def _catch_up_all(self, last_update: Tensor) -> None:
        buffers = Buffers.like(self.weight.value)
        for rows in self._chunks():
            missed = self._missed(last_update[rows])
            for learned in (self.weight, self.bias):
                if learned is not None:
                    part = learned[rows]
                    out = buffers.get("caught_up", *part.value.shape)
                    catch_up(part.value, part.moments[0], missed, out)
                    part.moments[0].copy_(out)

    def _missed(self, last_update: Tensor) -> Tensor:
        """(4, n): what takes rows from `last_update` (n,) to now."""
        lag = self.missed.updates - last_update.long()
        return self.missed.matrices(lag).to(self.weight.value.dtype).flatten(1).T.contiguous()

    def select(self, ids: Tensor | None) -> InUse:
        """The local rows `ids` (U,), sorted, as the rows in use; where nothing is sampled all are, whatever `ids`."""
        if not self.sampled:
            return InUse(len(self.weight.value), None, None)
        return InUse(len(ids), ids, None if self.last_update is None else self._missed(self.last_update[ids]))

    def take(self, used: InUse, rows: slice, buffers: Buffers, moments: bool) -> Rows:
        """A chunk of the rows in use, caught up: in `buffers`, or where nothing is sampled the state itself.

        `moments`: the optimizer's too, for an update.
        """
        bias = None
        if used.ids is None:
            if self.bias is not None:
                bias = self.bias[rows]
            return Rows(self.weight[rows], bias, None if self.inverse_norm is None else self.inverse_norm[rows])
        if self.kernels is not None:
            return self._take_at_once(used[rows], buffers, moments)
        weight = self._gather("weight", self.weight, used[rows], buffers, moments)
        if self.bias is not None:
            bias = self._gather("bias", self.bias, used[rows], buffers, moments)
        if not self.normalized:
            return Rows(weight, bias, None)
        return Rows(weight, bias, inverse_norms(weight.value, buffers.get("inverse_norm", len(weight.value))))

    def _take_at_once(self, used: InUse, buffers: Buffers, moments: bool) -> Rows:
        shape = (used.count, *self.weight.value.shape[1:])
        value, inverse_norm = buffers.get("weight", *shape), buffers.get("inverse_norm", used.count)
        velocity = buffers.get("weight_caught_up", *shape) if moments else None
        self.kernels.take(self.weight, used.ids, used.missed, value, velocity, inverse_norm)
        return Rows(Learned(value, () if velocity is None else (velocity,)), None, inverse_norm)

    def _gather(self, name: str, learned: Learned, used: InUse, buffers: Buffers, moments: bool) -> Learned:
        shape = (used.count, *learned.value.shape[1:])
        value = torch.index_select(learned.value, 0, used.ids, out=buffers.get(name, *shape))
        if used.missed is None and not moments:
            return Learned(value, ())
        taken = tuple(
            torch.index_select(moment, 0, used.ids, out=buffers.get(f"{name}_moment_{i}", *shape))
            for i, moment in enumerate(learned.moments)
        )
        if used.missed is None:
            return Learned(value, taken)
        momentum = buffers.get(f"{name}_caught_up", *shape) if moments else None
        catch_up(value, taken[0], used.missed, momentum)
        return Learned(value, () if momentum is None else (momentum,))

    def rows_at(self, used: InUse, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Copies of the rows in use at `index` (B,), caught up: weight (B, D) and bias (B,)."""
        if used.ids is None:
            return self.weight.value[index], None if self.bias is None else self.bias.value[index]
        rows = self.take(used[index], slice(None), Buffers.like(self.weight.value), moments=False)
        return rows.weight.value, None if rows.bias is None else rows.bias.value

    def put(self, used: InUse, rows: slice, part: Rows) -> None:
        """Ends the update of a chunk: new inverse norms, or what was taken into buffers written back."""
        if used.ids is None:
            if part.inverse_norm is not None and self.kernels is None:
                # plain in every case: a resumed run computes them the same way
                inverse_norms(part.weight.value, part.inverse_norm)
            return
        self.weight.put(used.ids[rows], part.weight)
        if self.bias is not None:
            self.bias.put(used.ids[rows], part.bias)

    def end_update(self, used: InUse, lr: float) -> None:
        """Counts the update; rows that were not in use have missed it."""
        self.updates += 1
        if self.last_update is None:
            return
        self.missed.record(lr, self.optimizer.momentum, self.optimizer.weight_decay)
        self.last_update.index_fill_(0, used.ids, self.missed.updates)  # on CUDA the host does not wait
        if self.missed.updates % self.TRIM_EVERY == 0 and len(self.last_update):
            self.missed.keep(self.missed.updates - int(self.last_update.min()))


def _at_rest(value: Tensor, optimizer: Optimizer) -> Learned:
    return Learned(value, tuple(torch.zeros_like(value) for _ in optimizer.moments))


def catch_up(value: Tensor, momentum: Tensor, missed: Tensor, momentum_now: Tensor | None) -> None:
    """Catches up `value`, (n, D) or (n,), in place, and `momentum` into `momentum_now` where there is one.

    missed (4, n): entries of the matrix that each row missed.
    """
    value_of_value, value_of_momentum, momentum_of_value, momentum_of_momentum = (
        missed.unsqueeze(2) if value.ndim == 2 else missed
    )
    if momentum_now is not None:
        torch.mul(momentum, momentum_of_momentum, out=momentum_now).addcmul_(value, momentum_of_value)
    value.mul_(value_of_value).addcmul_(momentum, value_of_momentum)
