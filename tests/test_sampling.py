"""Hard negatives: the table of nearest classes, what a step uses, and that the head stays the dense one."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from partial_fc import CosFace, PartialFC
from partial_fc.config_file import load_config
from partial_fc.head import sampling
from partial_fc.head.sampling import HardNegatives, draw_negatives, nearest_classes, with_positives
from partial_fc.parallel import distributed
from tests.conftest import run_ranks
from tests.dense import Case, assert_equals_dense
from tests.dense import nearest_classes as brute_force
from tests.pairwise import pairwise

DIM = 4


def batch(num_classes: int, step: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, DIM, generator=generator, dtype=torch.float64)
    return x, torch.randint(num_classes, (size,), generator=generator)


def train(head: PartialFC, first: int, stop: int, begin: bool = True) -> None:
    for step in range(first, stop):
        x, labels = batch(head.num_classes, step)
        mine = distributed.part(len(x), distributed.rank(), distributed.world_size())
        if begin:
            head.begin_step(step, labels)
        head(x[mine.start : mine.stop].requires_grad_(), labels[mine.start : mine.stop]).backward()
        head.step(0.1)


def build(num_classes: int, rate: float = 0.2, neighbours: int = 3, every: int = 4) -> PartialFC:
    sampler = HardNegatives(neighbours, every)
    return PartialFC(num_classes, DIM, CosFace(scale=8.0), rate, sampler=sampler, dtype=torch.float64, init_std=0.5)


def table_of(head: PartialFC) -> Tensor:
    return head.sampler.tables(head)["neighbours"]


# ---- the table


def search(num_classes: int, neighbours: int, block: int, steps: int) -> tuple[Tensor, Tensor]:
    """The table of centers that were trained with rows left out, and the centers, caught up."""
    head = build(num_classes)
    train(head, 0, steps)
    with mock.patch.object(sampling, "BLOCK", block):
        return nearest_classes(head.centers, head.classes, num_classes, neighbours), head.full_weight()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "num_classes, neighbours, block",
    [
        (101, 5, 2048),
        (101, 5, 16),  # many blocks, the last one shorter, merged with what came before
        (40, 5, 1),  # a row from each rank, fewer than neighbours
        (7, 6, 4),  # K = C - 1
        (7, 9, 4),
        (4, 2, 2048),  # the third of three ranks owns none
        (2, 1, 2),  # fewer classes than ranks
        (1, 2, 2),
    ],
)
def test_table_equals_brute_force(num_classes, neighbours, block, world_size):
    for table, weight in run_ranks(search, world_size, num_classes, neighbours, block, 5):
        assert table.dtype == torch.int32 and table.shape == (num_classes, neighbours)
        assert torch.equal(table.long(), brute_force(weight, neighbours))


def search_equal_centers() -> Tensor:
    head = build(60)
    for row, c in enumerate(head.classes):
        head.centers.weight.value[row] = torch.eye(DIM)[c % 3] * (1 if c % 2 else -1)
    with mock.patch.object(sampling, "BLOCK", 8):
        return nearest_classes(head.centers, head.classes, 60, 30)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_of_equal_cosines_the_lower_class_comes_first(world_size):
    """60 centers in 6 directions: cosines 1, 0 and -1, and -0 is 0."""
    for table in run_ranks(search_equal_centers, world_size):
        same = [c for c in range(60) if c % 6 == 5 and c != 17]
        across = [c for c in range(60) if c % 3 != 2]
        assert table[17].tolist() == [*same, *across][:30]


def test_keys_sort_as_cosines_and_then_as_falling_ids():
    cosine = torch.tensor([[0.5, -0.0, 0.0, -0.25, 1.0, -1.0, 1e-40, 0.5, -0.25]])
    ids = torch.tensor([8, 3, 5, 6, 2**31 - 2, 4, 1, 0, 7])
    keys = sampling._order(cosine, ids)
    order = keys[0].argsort(descending=True)
    assert ids[order].tolist() == [2**31 - 2, 0, 8, 1, 3, 5, 6, 7, 4]
    assert torch.equal(sampling._class_of(keys)[0].long(), ids)
    assert keys.min() > sampling.NONE


# ---- when it is refreshed


@pytest.mark.parametrize("begin", [True, False], ids=["begin_step", "forward"])
def test_refreshes_at_multiples_of_every_but_not_at_the_first_step(begin):
    head = build(50, every=4)
    train(head, 0, 4, begin)
    assert (table_of(head) == -1).all()
    wanted = brute_force(head.full_weight(), 3)
    train(head, 4, 8, begin)
    assert torch.equal(table_of(head).long(), wanted)
    wanted, last = brute_force(head.full_weight(), 3), wanted
    assert not torch.equal(wanted, last)
    with torch.no_grad():  # an evaluation while step 8 is the next
        head(*batch(50, 99))
    assert torch.equal(table_of(head).long(), last)
    train(head, 8, 9, begin)
    assert torch.equal(table_of(head).long(), wanted)


def some_steps_begun() -> Tensor:
    head = build(50, every=2)
    for step in range(5):
        train(head, step, step + 1, begin=step % 2 == 0)
        if distributed.rank() == 0:
            head.sampler(head, head.step_count, torch.arange(5))  # what one rank asks alone is no collective
    return table_of(head)


@pytest.mark.slow
def test_all_ranks_hold_one_table():
    tables = run_ranks(some_steps_begun, 3)
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2]) and (tables[0] >= 0).all()


# ---- the negatives of a step


def negatives(rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of a step after a refresh: this rank's, the labels, the table."""
    head = build(101, rate)
    train(head, 0, 5)
    labels = torch.tensor([3, 3, 50, 100, sampling.NONE])  # the last as padding is labeled
    return head.sampler(head, 7, labels), labels[:-1], table_of(head)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_negatives_are_the_neighbours_and_the_random_draw(world_size):
    ranks = run_ranks(negatives, world_size, 0.4)
    union = torch.cat([drawn for drawn, _, _ in ranks])
    assert len(union) == len(union.unique()), "not distinct"
    _, labels, table = ranks[0]
    random = draw_negatives(0, 7, range(101), 101, 0.4)
    near = table[labels].flatten().long()
    assert len(near) == 12 and set(union.tolist()) == set(random.tolist()) | set(near.tolist())
    both = set(near.tolist()) & set(random.tolist())
    assert 0 < len(both) < len(near.unique()), "the random draw has none of them, or all: this shows nothing"


def test_options_out_of_range():
    for arguments in (dict(neighbours=0), dict(every=0)):
        with pytest.raises(ValueError, match="both must be positive"):
            HardNegatives(**arguments)


def test_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("{run: {steps: 1}, data: {train: x, global_batch_size: 8}, backbone: {name: smallnet}}")
    assert load_config(file).head.hard_negatives is None
    chosen = load_config(file, ["head.sample_rate=0.1", "head.hard_negatives={neighbours: 4}"]).head.hard_negatives
    assert (chosen.neighbours, chosen.every) == (4, 1000)
    with pytest.raises(ValueError, match="head.hard_negatives with head.sample_rate 1: every class is a negative"):
        load_config(file, ["head.hard_negatives={}"])


# ---- any sampler: the head equals the dense one over the same rows


def every_third(head, step: int, labels: Tensor) -> Tensor:
    """A user's own: some classes that depend on step and labels, highest first."""
    ids = torch.arange(head.classes.start, head.classes.stop).flip(0)
    return ids[(ids + step + labels[labels >= 0].sum()) % 3 == 0]


SAMPLERS = {  # sampler, rate, classes
    "function": (every_third, 1.0, 23),
    "hard": (HardNegatives(2, 3), 0.1, 41),
    "hard at every step": (HardNegatives(1, 1), 0.01, 23),
    "hard with few classes": (HardNegatives(5), 0.3, 3),
}


@pairwise("dense", kind=SAMPLERS, forwards=[1, 2], world_size=[1, 2, 3, 4])
def test_equals_dense(kind, forwards, world_size):
    sampler, rate, num_classes = SAMPLERS[kind]
    sizes = {1: (6,), 2: (2, 5), 3: (3, 1, 2), 4: (1, 2, 2, 3)}[world_size]
    assert_equals_dense(
        Case(
            "cosface",
            num_classes=num_classes,
            sample_rate=rate,
            sampler=sampler,
            sizes=sizes,
            forwards=forwards,
            steps=8,
        )
    )


def twice(head: PartialFC, step: int, labels: Tensor) -> Tensor:
    drawn = every_third(head, step, labels)
    return torch.cat([drawn, drawn.flip(0)])


def test_a_class_that_is_drawn_twice_counts_once():
    x, labels = torch.randn(6, DIM), torch.arange(6)
    losses = [PartialFC(23, DIM, sampler=sampler)(x, labels) for sampler in (every_third, twice)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "drawn, positives",
    [([], []), ([], [3, 1, 3]), ([2, 4, 9], []), ([2, 4, 9], [9, 2, 4]), ([2, 4, 9], [11, 0, 4, 5, 11])],
)
def test_drawn_rows_and_positives_are_joined(drawn, positives):
    both = with_positives(torch.tensor(drawn, dtype=torch.int64), torch.tensor(positives, dtype=torch.int64))
    assert both.tolist() == sorted({*drawn, *positives}) and both.dtype == torch.int64


def wrong_sampler(kind: str) -> str:
    """On the last rank alone the sampler is wrong."""
    last = distributed.rank() == distributed.world_size() - 1

    def sampler(head: PartialFC, step: int, labels: Tensor):
        if kind == "raises" and last:
            raise KeyError("no such table")
        if kind == "is a list" and last:
            return [1, 2]
        return torch.tensor([0]) if kind == "gives another rank's" else torch.tensor([head.classes.start])

    head = PartialFC(100, DIM, sampler=sampler)
    try:
        head(torch.randn(2, DIM), torch.tensor([1, 2]))
    except distributed.RunError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, message",
    [
        ("raises", "the sampler failed on rank 1: KeyError: 'no such table'"),
        ("is a list", "the sampler failed on rank 1: it gave list; wanted class ids of head.classes, here 50 to 99"),
        ("gives another rank's", "the sampler failed on rank 1: it gave class 0; wanted class ids of head.classes"),
    ],
)
def test_a_wrong_sampler_on_one_rank_stops_all_ranks(kind, message):
    messages = run_ranks(wrong_sampler, 2, kind)
    assert messages[0] == messages[1] and message in messages[0]
