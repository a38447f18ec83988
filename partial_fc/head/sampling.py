"""Which negatives a step uses: the same classes whatever the number of ranks.

Shapes: B labels of the global batch, D embedding size, C classes, C_r classes of this rank, K neighbours of a class.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from partial_fc.head.centers import Centers
from partial_fc.head.matmul import matmul_nt
from partial_fc.head.partition import class_range
from partial_fc.head.softmax import Buffers
from partial_fc.head.targets import unit
from partial_fc.parallel import distributed
from partial_fc.seeds import keyed_bytes

if TYPE_CHECKING:  # it imports this module
    from partial_fc.head.partial_fc import PartialFC

# sampler(head, step, labels of the global batch (B,)) -> distinct class ids (n,), int64, of head.classes, in any order.
# One that keeps tables of all classes has two methods more, as HardNegatives has: refresh(head, step), which all ranks
# call before a training step's rows are fixed, and tables(head), what a checkpoint stores.
Sampler = Callable[["PartialFC", int, Tensor], Tensor]

DRAW_BLOCK = 1 << 16  # classes that share one permutation of the negatives' draw
BLOCK = 2048  # centers of all ranks that a search has in hand at once
NONE = torch.iinfo(torch.int64).min  # no neighbour: below every key of `_order`


def random_negatives(head, step: int, labels: Tensor) -> Tensor:
    """The default sampler: every class with probability head.sample_rate, whatever the labels."""
    return draw_negatives(head.seed, step, head.classes, head.num_classes, head.sample_rate)


def negatives(head, step: int, labels: Tensor) -> Tensor:
    """What the head's sampler gives, int64 on the host, sorted.

    A sampler of the caller's is run and checked on all ranks together, one collective more: Raises RunError on all of
    them where it fails on one, or gives what is no class of its rank.
    """
    if head.sampler is random_negatives or isinstance(head.sampler, HardNegatives):
        return head.sampler(head, step, labels)
    with distributed.together("the sampler"):
        drawn = head.sampler(head, step, labels)
        wanted = f"wanted class ids of head.classes, here {head.classes.start} to {head.classes.stop - 1}, int64 (n,)"
        if not isinstance(drawn, Tensor) or drawn.dtype != torch.int64 or drawn.ndim != 1:
            found = f"{drawn.dtype} {tuple(drawn.shape)}" if isinstance(drawn, Tensor) else type(drawn).__name__
            raise ValueError(f"it gave {found}; {wanted}")
        outside = drawn[(drawn < head.classes.start) | (drawn >= head.classes.stop)]
        if len(outside):
            raise ValueError(f"it gave class {int(outside[0])}; {wanted}: give each rank its own alone")
    return drawn.cpu().unique()


def with_positives(drawn: Tensor, positives: Tensor) -> Tensor:
    """Sorted distinct ids (n,) and those of `positives` (m,), few and in any order: both, sorted and distinct.

    Without a sort of everything, which takes 116 ms of 10^6 ids.
    """
    have, new = drawn.numpy(), np.unique(positives.numpy())
    place = np.searchsorted(have, new)
    missing = np.ones(len(new), dtype=bool)
    inside = place < len(have)
    missing[inside] = have[place[inside]] != new[inside]
    return torch.from_numpy(np.insert(have, place[missing], new[missing]))


class HardNegatives:
    """A sampler that prefers hard negatives: the classes nearest to the batch's own, beside the random draw.

        head = PartialFC(num_classes, embedding_dim, sample_rate=0.05, sampler=HardNegatives(neighbours=16))

    A step's negatives are the `neighbours` nearest classes of each distinct label of the global batch, by the cosine of
    the class centers, and every class with probability head.sample_rate: at most B * neighbours rows more, over all
    ranks, than the random draw. Use it at a sample rate below 1, and give every head one of its own.

    The table (C, K) int32 is on the host of every rank: 64 bytes a class at K = 16. It is refreshed before the training
    steps that are multiples of `every`, from the centers as they are then, and is empty before step `every`: among
    initial centers, which are random, near means nothing. A refresh is a collective: see `nearest_classes`.
    """

    def __init__(self, neighbours: int = 16, every: int = 1000):
        if neighbours < 1 or every < 1:
            raise ValueError(f"neighbours and every are {neighbours} and {every}; both must be positive")
        self.neighbours, self.every = neighbours, every
        self._table: Tensor | None = None

    def __call__(self, head, step: int, labels: Tensor) -> Tensor:
        drawn = random_negatives(head, step, labels)
        positives = labels[(labels >= 0) & (labels < head.num_classes)].unique()  # without padding
        near = self.tables(head)["neighbours"][positives].flatten().long()
        here = near[(near >= head.classes.start) & (near < head.classes.stop)]
        return torch.cat([drawn, here]).unique()

    def refresh(self, head, step: int) -> None:
        """Makes the table anew at the steps that do, a function of `step` alone. A collective then."""
        if step > 0 and step % self.every == 0:
            table = nearest_classes(head.centers, head.classes, head.num_classes, self.neighbours)
            self.tables(head)["neighbours"].copy_(table)

    def tables(self, head) -> dict[str, Tensor]:
        """The nearest classes of every class, nearest first, (C, K) int32 and equal on all ranks; -1: none."""
        if self._table is None:
            self._table = torch.full((head.num_classes, self.neighbours), -1, dtype=torch.int32)
        return {"neighbours": self._table}


def tables(head) -> dict[str, Tensor]:
    """What the head's sampler keeps of all classes, (C, ...) int32, equal on all ranks; -1 stands for nothing."""
    return head.sampler.tables(head) if hasattr(head.sampler, "tables") else {}


@torch.no_grad()
def nearest_classes(centers: Centers, classes: range, num_classes: int, count: int) -> Tensor:
    """The `count` nearest other classes of every class by the cosine of the centers, nearest first. A collective.

    In: this rank's centers and classes. Out: (C, count) int32 on the centers' device, equal on all ranks; -1 where
    there are no more. Of equal cosines the lower class comes first, so that the number of ranks does not matter, up to
    the rounding of a cosine to float32.

    All centers pass every rank in blocks; a rank searches a block for its own classes and keeps their nearest so far:
    8 bytes for each of its classes and neighbours, never a (C_r, C) tensor nor a copy of the centers.

    2 C_r C D floating-point operations and C_r C cosines searched. One CPU thread: 0.4 s at C = 7846 and D = 128, 126 s
    at C = 1e5 and D = 512, where a step at rate 0.1 and B = 256 takes 0.1 s. Done every n steps it adds about
    C / (3 B rate n) of a step to each: 1.3 steps there at n = 1000.
    """
    world_size = distributed.world_size()
    device = centers.weight.value.device
    per_rank = len(class_range(num_classes, 0, world_size))  # the first rank has the most
    rows = -(-BLOCK // world_size)  # from each rank
    tile = 512 if device.type == "cpu" else 8192  # on a CPU keys stay in its cache: 1 ns each, against 13 at 2048
    buffers = Buffers.like(centers.weight.value)
    best = torch.full((len(classes), count), NONE, device=device)
    with torch.autocast(device.type, enabled=False):
        for first in range(0, per_rank, rows):
            mine = _directions(centers, first, min(first + rows, len(classes)), buffers)
            padded = mine.new_zeros(rows, mine.shape[1])
            padded[: len(mine)] = mine
            block = distributed.all_gather(padded).flatten(0, 1)
            local = torch.arange(first, first + rows)
            ids = per_rank * torch.arange(world_size).unsqueeze(1) + local
            real = (local < per_rank) & (ids < num_classes)
            block, ids = block[real.flatten().to(device)], ids[real].to(device)
            for start in range(0, len(classes), tile):
                stop = min(start + tile, len(classes))
                keys = _order(matmul_nt(_directions(centers, start, stop, buffers), block), ids)
                own = torch.arange(classes.start + start, classes.start + stop, device=device)
                keys.masked_fill_(own.unsqueeze(1) == ids, NONE)
                keys = keys.topk(min(count, len(ids)), dim=1, sorted=False).values
                best[start:stop] = torch.cat([best[start:stop], keys], dim=1).topk(count, dim=1).values
    found = torch.where(best == NONE, -1, _class_of(best)).to(torch.int32)
    return distributed.gather_rows(found, per_rank, num_classes)


def _directions(centers: Centers, start: int, stop: int, buffers: Buffers) -> Tensor:
    """This rank's rows from `start` to `stop`, caught up, of length 1."""
    used = centers.select(torch.arange(start, max(start, stop), device=centers.weight.value.device))
    return unit(centers.take(used, slice(None), buffers, moments=False).weight.value)[0]


def _order(cosine: Tensor, ids: Tensor) -> Tensor:
    """Distinct int64 keys (n, m) that sort by cosine (n, m) as float32, and by falling class id (m,) where equal."""
    bits = cosine.float().add_(0.0).view(torch.int32)  # -0 becomes 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # float32 bits sort like integers once those of negative numbers turn
    return bits.long().bitwise_left_shift_(32).add_(0x7FFFFFFF - ids)


def _class_of(keys: Tensor) -> Tensor:
    return (0x7FFFFFFF - (keys & 0x7FFFFFFF)).int()


def draw_negatives(seed: int, step: int, classes: range, num_classes: int, sample_rate: float) -> Tensor:
    """The negatives of a step inside `classes`: distinct class ids (n,), int64, sorted.

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
        in_use = np.zeros(size, dtype=bool)  # in the processor's cache; it sorts, for who reads rows in this order
        in_use[_first_of_permutation(int(sample_rate * size + uniform), size, key[8:])] = True
        start, stop = max(classes.start - first, 0), classes.stop - first
        drawn.append(torch.from_numpy(np.flatnonzero(in_use[start:stop]) + (first + start)))
    return torch.cat(drawn)


def _first_of_permutation(count: int, size: int, key: bytes) -> np.ndarray:
    """The first `count` entries of a keyed permutation of range(size), uint32; `size` at most 2^16.

    Four rounds of an odd multiplication and a xor-shift, both bijections of [0, 2^bits). A size that is no power of
    two takes the entries below it in order, which needs the whole of the next power: only the last block is like that.
    """
    bits = max((size - 1).bit_length(), 1)
    mask, half = np.uint32((1 << bits) - 1), np.uint32((bits + 1) // 2)
    whole = size == mask + 1
    x = np.arange(count if whole else mask + 1, dtype=np.uint32)
    # a product of two numbers below 2^16 fits; a carry out of the sum is above the mask
    for multiplier, increment in np.frombuffer(key, dtype=np.uint16).astype(np.uint32).reshape(-1, 2):
        x *= multiplier | np.uint32(1)
        x += increment
        x &= mask
        x ^= x >> half
    return x if whole else x[x < size][:count]
