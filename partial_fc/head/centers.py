"""Class centers of one rank: storage, initialization, sampling, catch-up of rows that sat out.

Nothing here depends on the number of ranks: a center's initial value is a function of (seed, class), a step's negatives
of (seed, step, class).

Shapes: C_r classes of this rank, D embedding size, U rows in use, K lags of the catch-up table.
"""

from array import array
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from partial_fc.head.softmax import Buffers, Rows, chunks, inverse_norms
from partial_fc.seeds import keyed_bytes, seed_for

INIT_BLOCK = 1024  # classes that share one random generator: 1 ms of drawing at D = 512
DRAW_BLOCK = 1 << 16  # classes that share one permutation of the negatives' draw


def initial_centers(classes: range, dim: int, seed: int, std: float, out: Tensor) -> None:
    """Fills `out` (C_r, D) with N(0, std^2), a function of (seed, class) alone; float32 draws whatever the dtype."""
    for block in range(classes.start // INIT_BLOCK, -(-classes.stop // INIT_BLOCK)):
        first = block * INIT_BLOCK
        generator = torch.Generator().manual_seed(seed_for("centers", seed, block))
        values = torch.randn(INIT_BLOCK, dim, generator=generator).mul_(std)
        start, stop = max(classes.start, first), min(classes.stop, first + INIT_BLOCK)
        if start < stop:
            out[start - classes.start : stop - classes.start] = values[start - first : stop - first].to(out)


def draw_negatives(seed: int, step: int, classes: range, num_classes: int, sample_rate: float) -> Tensor:
    """The negatives of a step inside `classes`: distinct class ids (n,), int64, in no order.

    Every class is drawn with probability `sample_rate` exactly. Class ids are cut into blocks of 2^16; in each, the
    first floor(rate * size + u) entries of a permutation of its ids are drawn, with u uniform in [0, 1) and both
    keyed by (seed, step, block). So a rank evaluates the blocks that its range touches and nothing else, the cost
    is that of the drawn rows (no sort over C, no random number per class), and neighbouring ids do not share their
    fate.
    """
    drawn = [torch.empty(0, dtype=torch.int64)]
    if len(classes) == 0:
        return drawn[0]
    for block in range(classes.start // DRAW_BLOCK, -(-classes.stop // DRAW_BLOCK)):
        first = block * DRAW_BLOCK
        size = min(DRAW_BLOCK, num_classes - first)
        key = keyed_bytes(24, "negatives", seed, step, block)
        uniform = int.from_bytes(key[:7], "little") / 2**56
        ids = first + _first_of_permutation(int(sample_rate * size + uniform), size, key[8:])
        drawn.append(torch.from_numpy(ids[(ids >= classes.start) & (ids < classes.stop)]))
    return torch.cat(drawn)


def _first_of_permutation(count: int, size: int, key: bytes) -> np.ndarray:
    """The first `count` entries of a keyed permutation of range(size), int64; `size` at most 2^16.

    Four rounds of an odd multiplication and a xor-shift, both bijections of [0, 2^bits). A size that is no power of
    two takes the entries below it in order, which needs the whole of the next power: only the last block is like that.
    """
    bits = max((size - 1).bit_length(), 1)
    mask = (1 << bits) - 1
    whole = size == mask + 1
    x = np.arange(count if whole else mask + 1, dtype=np.int64)
    for multiplier, increment in np.frombuffer(key, dtype=np.uint16).astype(np.int64).reshape(-1, 2):
        x = (x * (multiplier | 1) + increment) & mask
        x ^= x >> ((bits + 1) // 2)
    return x if whole else x[x < size][:count]


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
        return torch.from_numpy(self.table).to(lag.device)[lag]

    @staticmethod
    def apply(matrices: Tensor, weight: Tensor, velocity: Tensor, scratch: Tensor) -> None:
        """Catches up `weight` and `velocity`, (n, D) or (n,), by `matrices` (n, 2, 2), in place."""
        matrices = matrices.to(weight.dtype)
        if weight.ndim == 2:
            matrices = matrices.unsqueeze(-1)
        before = scratch.copy_(weight)
        weight.mul_(matrices[:, 0, 0]).addcmul_(velocity, matrices[:, 0, 1])
        velocity.mul_(matrices[:, 1, 1]).addcmul_(before, matrices[:, 1, 0])


class Centers:
    """The rows of one rank and their optimizer state.

    State: weight (C_r, D), momentum (C_r, D); 1/|w| (C_r,) kept true by every update where centers are normalized
    and nothing is sampled; `last_update` (C_r,), the updates that a row has seen, when sampled; bias and its
    momentum (C_r,).
    """

    TRIM_EVERY = 1024  # updates; finding the largest lag reads last_update once

    def __init__(
        self,
        classes: range,
        dim: int,
        *,
        sampled: bool,
        normalized: bool,
        has_bias: bool,
        seed: int,
        init_std: float,
        chunk: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.normalized, self.chunk = normalized, chunk
        count = len(classes)
        self.weight = torch.empty(count, dim, dtype=dtype, device=device)
        initial_centers(classes, dim, seed, init_std, self.weight)
        self.momentum = torch.zeros_like(self.weight)
        self.bias = self.weight.new_zeros(count) if has_bias else None
        self.bias_momentum = self.weight.new_zeros(count) if has_bias else None
        self.last_update = torch.zeros(count, dtype=torch.int32, device=device) if sampled else None
        self.missed = MissedUpdates()
        self.inverse_norm = self.weight.new_empty(count) if normalized and not sampled else None
        if self.inverse_norm is not None:
            inverse_norms(self.weight, chunk, self.inverse_norm)

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps by class: live tensors whose first dimension is C_r."""
        state = {
            "weight": self.weight,
            "momentum": self.momentum,
            "bias": self.bias,
            "bias_momentum": self.bias_momentum,
            "last_update": self.last_update,
        }
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    def load(self, read: Callable[[str, Tensor], bool], history: Tensor) -> None:
        """Overwrites the state. `read(name, out)` fills `out` with this rank's rows, or says False without last_update.

        A checkpoint that was written at another sample rate is fine: what it lacks means that every row is current, and
        rows that lag in it are caught up where nothing is sampled.
        """
        last_update = self.last_update
        if last_update is None:
            last_update = torch.empty(len(self.weight), dtype=torch.int32, device=self.weight.device)
        for name, tensor in self.state().items():
            if name != "last_update":
                read(name, tensor)
        if not read("last_update", last_update):
            last_update.fill_(len(history))
        lags = len(history) - int(last_update.min()) if len(last_update) else 0
        self.missed.replay(history, lags)
        if self.last_update is None and lags > 0:
            everything = Rows(self.weight, self.momentum, None, self.bias, self.bias_momentum)
            self._catch_up(everything, self.missed.updates - last_update.long(), Buffers.like(self.weight))
        if self.last_update is None:
            self.missed = MissedUpdates()
        if self.inverse_norm is not None:
            inverse_norms(self.weight, self.chunk, self.inverse_norm)

    def take(self, ids: Tensor | None, buffers: Buffers) -> Rows:
        """The local rows `ids` (U,), sorted, caught up, in `buffers`; where nothing is sampled, the state itself."""
        if self.last_update is None:
            return Rows(self.weight, self.momentum, self.inverse_norm, self.bias, self.bias_momentum)
        taken = {
            name: torch.index_select(tensor, 0, ids, out=buffers.get(name, len(ids), *tensor.shape[1:]))
            for name, tensor in self.state().items()
            if name != "last_update"
        }
        rows = Rows(taken["weight"], taken["momentum"], None, taken.get("bias"), taken.get("bias_momentum"))
        self._catch_up(rows, self.missed.updates - self.last_update[ids].long(), buffers)
        if not self.normalized:
            return rows
        return rows._replace(inverse_norm=inverse_norms(rows.weight, self.chunk, buffers.get("inverse_norm", len(ids))))

    def _catch_up(self, rows: Rows, lag: Tensor, buffers: Buffers) -> None:
        matrices = self.missed.matrices(lag)
        for selected in chunks(len(lag), self.chunk):
            part = rows.chunk(selected)
            for weight, velocity in ((part.weight, part.momentum), (part.bias, part.bias_momentum)):
                if weight is not None:
                    self.missed.apply(matrices[selected], weight, velocity, buffers.get("product", *weight.shape))

    def put(self, ids: Tensor | None, rows: Rows, lr: float, momentum: float, weight_decay: float) -> None:
        """Ends an update: writes back rows that were taken into buffers, and records the update for all others."""
        if self.last_update is None:
            return
        self.missed.record(lr, momentum, weight_decay)
        for name, tensor in self.state().items():
            if name != "last_update":
                tensor.index_copy_(0, ids, getattr(rows, name))
        self.last_update[ids] = self.missed.updates
        if self.missed.updates % self.TRIM_EVERY == 0 and len(self.last_update):
            self.missed.keep(self.missed.updates - int(self.last_update.min()))
