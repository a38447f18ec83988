"""The heads that partial-fc benchmark head compares.

Shapes: b this rank's batch, B global batch, D embedding size, C_r classes of this rank, U rows in use.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partial_fc.benchmark.measure import WARM_UP, counted, peak_beyond, place_of, return_large_blocks
from partial_fc.benchmark.peers import Dense, Limit, Published, head_matmul, torch_matmul
from partial_fc.head.margins import CosFace
from partial_fc.head.matmul import Precision
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.softmax import default_chunk
from partial_fc.parallel import distributed

MARGIN = CosFace(scale=64.0, margin=0.35)
SGD = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)

# what --variants takes and what the table prints
LABELS = {
    "dense": "dense",
    "published": "published",
    "recompute": "ours recompute",
    "recompute-compiled": "ours recompute, compiled",
    "cache-fp32": "ours cache fp32",
    "cache-fp32-compiled": "ours cache fp32, compiled",
    "cache-bf16": "ours cache bf16",
    "cache-bf16-compiled": "ours cache bf16, compiled",
    "limit": "limit",
    "limit-ours": "limit (our matmul)",
}
LIMITS = {"limit": torch_matmul, "limit-ours": head_matmul}
CACHES = {"recompute": None, "cache-fp32": torch.float32, "cache-bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cell:
    """One size of the problem. batch is global; ranks share classes and batch. precision: of all variants' products."""

    classes: int
    dim: int
    batch: int
    rate: float
    ranks: int = 1
    precision: Precision = "float32"

    @property
    def classes_of_rank(self) -> int:
        return -(-self.classes // self.ranks)

    @property
    def rows(self) -> int:
        """U of a rank as published: the positives are among them. PartialFC's positives come on top."""
        return int(self.rate * self.classes_of_rank)


class Ours:
    """PartialFC with a step like the peers'."""

    def __init__(self, variant: str, cell: Cell, device: torch.device):
        cache = CACHES[variant.removesuffix("-compiled")]
        # room for every row in use: drawn negatives, up to one more a block of 2^16 classes, and positives
        most = min(cell.classes_of_rank, cell.rows + cell.classes_of_rank // 2**16 + 2 + cell.batch)
        self.head = PartialFC(
            cell.classes,
            cell.dim,
            MARGIN,
            cell.rate,
            momentum=SGD["momentum"],
            weight_decay=SGD["weight_decay"],
            cache_bytes=0 if cache is None else cell.batch * most * cache.itemsize,
            cache_dtype=cache or torch.float32,
            matmul_precision=cell.precision,
            compile=variant.endswith("-compiled"),
            device=device,
        )

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = self.head(embeddings, labels, padded_size=len(labels))
        loss.backward()
        self.head.step(SGD["lr"])
        _ = self.head.centers  # on CUDA the update has a stream of its own: this one waits for it, and is timed
        return loss.detach()

    def state(self) -> list[Tensor]:
        return list(self.head.centers.state().values())


def build(variant: str, cell: Cell, device: torch.device) -> Dense | Published | Limit | Ours:
    head = _build(variant, cell, device)
    with torch.no_grad():
        for tensor in head.state():
            tensor.add_(0)  # zeros that were never written take no memory, a trained momentum does
    return head


def _build(variant: str, cell: Cell, device: torch.device) -> Dense | Published | Limit | Ours:
    sizes = (cell.classes, cell.dim, MARGIN, cell.rate)
    options = dict(precision=cell.precision, device=device)
    if variant == "dense":
        return Dense(*sizes, **SGD, **options)
    if variant == "published":
        return Published(*sizes, **SGD, **options)
    if variant in LIMITS:
        chunk = default_chunk(cell.dim, device, fused=cell.precision != "float32")
        return Limit(cell.rows, cell.dim, cell.batch, LIMITS[variant], chunk=chunk, **options)
    return Ours(variant, cell, device)


def data(variant: str, cell: Cell, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Step number `step`'s embeddings (b, D), which require a gradient, and labels (b,): the same for all variants.

    A limit has no collectives: it gets the whole batch of B, which a rank has after the gather.
    """
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(cell.batch, cell.dim, generator=generator)
    labels = torch.randint(cell.classes, (cell.batch,), generator=generator)
    part = range(cell.batch)
    if variant not in LIMITS:
        part = distributed.part(cell.batch, distributed.rank(), distributed.world_size())
    mine = slice(part.start, part.stop)
    return embeddings[mine].to(device).requires_grad_(), labels[mine].to(device)


def measure_memory(heads: list[tuple[Cell, str]], threads: int, device: str) -> list[dict]:
    """Of each (cell, variant), one after the other: see `_alone`. On a CPU give one alone to a fresh process."""
    return_large_blocks()
    torch.set_num_threads(threads)
    return [_alone(cell, variant, place_of(device)) for cell, variant in heads]


def _alone(cell: Cell, variant: str, place: torch.device) -> dict:
    """`memory`: peak bytes of a step beyond what this process held before the head was built; None where nobody tells.

    Weight, momentum and whatever a step needs. Before, a head of a few chunks runs in the same process, so that
    libraries, threads and compiled parts are not counted. `collectives` and `bytes`: of a step, see measure.counted.
    """
    small = replace(cell, classes=min(cell.classes, int(cell.ranks * 5000 / cell.rate)))
    _steps(small, variant, place, WARM_UP)
    counts = {}
    memory = peak_beyond(lambda: counts.update(_steps(cell, variant, place, WARM_UP + 1)), place)
    return {"memory": memory, **counts}


def _steps(cell: Cell, variant: str, device: torch.device, count: int) -> dict:
    """What the last one's collectives were."""
    head = build(variant, cell, device)
    for step in range(count):
        with counted() as counts:
            head.step(*data(variant, cell, step, device))
    return counts
