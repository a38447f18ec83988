"""The cache of a step: within its budget, and without an influence on the result beyond its dtype."""

import pytest
import torch

from partial_fc import CosFace, PartialFC
from partial_fc.head.softmax import Cache
from tests.dense import MARGINS, Case, assert_equals_dense, error
from tests.pairwise import pairwise

ENTRY = 8  # bytes of a float64
WHOLE = 1 << 20


def cached(cache_bytes: int) -> dict:
    return dict(cache_bytes=cache_bytes, cache_dtype=torch.float64)


@pytest.mark.slow
@pairwise("dense", margin=MARGINS, rate=[1.0, 0.3], sizes=[(6,), (3, 1, 2)])
def test_cached_equals_dense(margin, rate, sizes):
    assert_equals_dense(Case(margin, sample_rate=rate, sizes=sizes, head=cached(WHOLE)))


@pytest.mark.parametrize("margin", ["biased", "cosface-s200"])
@pytest.mark.parametrize("rows", [3, 4, 9, 22, 23])
def test_a_cache_with_room_for_some_chunks_equals_dense(margin, rows):
    """23 rows in chunks of 4: room for none, one, two, five chunks, and for all with the short last one."""
    assert_equals_dense(Case(margin, sizes=(6,), head=cached(rows * 6 * ENTRY)))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 13, 30, 60])
def test_micro_batches_share_the_cache(rows):
    case = Case("arcface", sample_rate=0.5, sizes=(2, 3), forwards=3, steps=4, head=cached(rows * 6 * ENTRY))
    assert_equals_dense(case)


def test_the_cache_stays_within_its_budget():
    cache = Cache(1000 * 4, torch.float32, torch.device("cpu"))
    for rows in (50, 90, 20, 100, 97):  # sampling changes the rows in use from step to step
        taken = [cache.reserve(8, rows, 16), cache.reserve(8, rows, 16), cache.reserve(8, rows, 16)]
        fits = [len(block) // 8 for block in taken]
        assert fits[0] == rows and sum(map(len, taken)) <= 1000
        assert all(count == rows or count % 16 == 0 for count in fits)
        assert cache._flat.numel() <= 1000
        for number, block in enumerate(taken):
            block.fill_(number)
        assert all((block == number).all() for number, block in enumerate(taken))  # they do not overlap
        cache.clear()
    assert len(Cache(0, torch.float32, torch.device("cpu")).reserve(8, 50, 16)) == 0


def test_what_fits_does_not_depend_on_earlier_steps():
    """A resumed run has no earlier steps, and must keep and compute again the same chunks."""
    new, old = (Cache(1000 * 4, torch.float32, torch.device("cpu")) for _ in range(2))
    old.reserve(8, 110, 16)  # more than any forward of the step that follows
    old.clear()
    for rows in (60, 50, 40):
        assert len(old.reserve(8, rows, 16)) == len(new.reserve(8, rows, 16))


def gradients(margin: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by embeddings and centers of one step in which nothing else moves the centers."""
    head = PartialFC(500, 32, MARGINS[margin], **(dict(chunk=64, momentum=0.0, weight_decay=0.0) | options))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 32, generator=generator).to(head.dtype).requires_grad_()
    before = head.full_weight().clone()
    head(x, torch.randint(500, (48,), generator=generator)).backward()
    head.step(2.0**20)
    return x.grad.double(), (before.double() - head.full_weight().double()) / 2.0**20


@pytest.mark.parametrize("margin", MARGINS)
def test_bf16_cache_rounds_the_centers_gradient_alone(margin):
    """bfloat16 has 8 bits: 2^-9 a weight, and less in a sum; the embeddings' gradient is made before the rounding."""
    exact = gradients(margin, dtype=torch.float64)
    plain = gradients(margin)
    x, w = gradients(margin, cache_bytes=WHOLE, cache_dtype=torch.bfloat16)
    assert torch.equal(x, plain[0])
    assert error(plain[1], exact[1]) < error(w, exact[1]) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_float64_head_keeps_fits_into_a_narrower_cache(dtype):
    """At scale 200 and cosines near 1, e^200 does not: it is kept relative to a maximum."""
    weights = []
    for kind in (torch.float64, dtype):
        head = PartialFC(64, 4, CosFace(scale=200), dtype=torch.float64, cache_bytes=WHOLE, cache_dtype=kind)
        x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        head(x, torch.arange(48)).backward()
        head.step(0.01)
        weights.append(head.full_weight())
    assert error(weights[1], weights[0]) < 4e-3


@pytest.mark.parametrize("forwards", [1, 2])
def test_the_cache_is_used_in_every_step(forwards):
    """16 chunks of 8 samples: room for all of them, or for all of one forward's and half of the next one's."""
    head = PartialFC(64, 4, chunk=4, cache_bytes=(16 * 4 * 8 + 8 * 4 * 8) * 4)
    for step in range(4):
        labels = torch.arange(8)
        head.begin_step(step, labels)
        for _ in range(forwards):
            head(torch.randn(8, 4, requires_grad=True), labels).backward()
        assert [len(kept.cached) for kept in head._forwards] == [16, 8][:forwards]
        head.step(0.1)


def test_errors_name_what_to_do():
    for arguments in (dict(cache_bytes=-1), dict(cache_dtype=torch.float16)):
        with pytest.raises(ValueError, match="cache_bytes and cache_dtype are .*; give 0 or more, and torch.float32"):
            PartialFC(4, 4, **arguments)
