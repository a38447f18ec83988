"""The compiled elementwise parts: the same tests as the plain ones, where a compiler works."""

from collections.abc import Iterator

import pytest
import torch

from partial_fc import CosFace, PartialFC
from partial_fc.head import elementwise
from tests.dense import MARGINS, Case, assert_equals_dense
from tests.pairwise import pairwise
from tests.test_partial_fc import assert_as_good_as_naive

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    if not elementwise.compiler_works("cpu"):
        pytest.skip("not run: torch.compile does not work here (it needs a C++ compiler)")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64):  # else it goes on uncompiled
        yield


needs_compiler = pytest.mark.usefixtures("compiler")
COMPILED = dict(compile=True)


def soaked(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.soak("compiled"))


@needs_compiler
@pairwise("compiled", margin=MARGINS, rate=[1.0, 0.3])
def test_compiled_equals_dense(margin, rate):
    """torch compiles anew for a last chunk of one row: in chunks of 4, for one margin here; in `make soak` for all."""
    chunk = 4 if margin == "biased" else 3
    assert_equals_dense(Case(margin, sample_rate=rate, sizes=(6,), chunk=chunk, head=COMPILED))


@needs_compiler
@pytest.mark.parametrize("margin", [soaked(one) for one in (*MARGINS, "curricularface-filtered", "subcenterarcface")])
def test_compiled_equals_dense_with_a_last_chunk_of_one_row(margin):
    assert_equals_dense(Case(margin, sample_rate=0.3, sizes=(6,), chunk=4, head=COMPILED))


# Two ranks run the same compiled parts; each new graph costs both of them 3 to 6 s.
ON_TWO_RANKS = [(margin, rate) for margin in MARGINS for rate in (1.0, 0.3)]


@needs_compiler
@pytest.mark.parametrize("margin, rate", [soaked(*one) for one in ON_TWO_RANKS])
def test_compiled_equals_dense_on_two_ranks(margin, rate):
    assert_equals_dense(Case(margin, sample_rate=rate, sizes=(3, 1), head=COMPILED))


@needs_compiler
@pytest.mark.parametrize("sizes", [(6,), soaked((3, 1))])
@pytest.mark.parametrize("margin", ["curricularface-filtered", soaked("subcenterarcface")])
def test_compiled_negatives_equal_dense(margin, sizes):
    chunk = 3 if len(sizes) == 1 else 4
    assert_equals_dense(Case(margin, sample_rate=0.3, sizes=sizes, chunk=chunk, head=COMPILED))


@needs_compiler
@pytest.mark.parametrize("sizes", [(6,), soaked((3, 1))])
def test_compiled_adamw_and_cache_equal_dense(sizes):
    hyper = dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    options = dict(cache_bytes=100 * 8, cache_dtype=torch.float64, **COMPILED)
    assert_equals_dense(Case("arcface", sizes=sizes, forwards=2, optimizer="adamw", hyper=hyper, head=options))


@needs_compiler
@pytest.mark.parametrize("inputs", ["random", "trained"])
@pytest.mark.parametrize("margin", [soaked("cosface"), soaked("arcface"), soaked("biased"), "cosface-s200"])
def test_compiled_float32_is_as_good_as_naive_float32(margin, inputs):
    assert_as_good_as_naive(MARGINS[margin], inputs, **COMPILED)


@needs_compiler
def test_nothing_is_compiled_anew_from_step_to_step():
    """Learning rate, chunk length and rows in use change all the time."""
    head = PartialFC(1000, 8, CosFace(), 0.3, optimizer="adamw", chunk=64, **COMPILED)
    counted = []
    for step in range(8):
        labels = torch.randint(1000, (6,))
        head(torch.randn(6, 8, requires_grad=True), labels).backward()
        head.step(0.1 / (1 + step))
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counted[2] == counted[-1] > 0


def test_small_heads_are_not_compiled_unasked():
    assert not PartialFC(1000, 8).compiled
    assert PartialFC(2**15, 512, sample_rate=1.0, init_std=1.0).compiled == elementwise.compiler_works("cpu")
    assert not PartialFC(2**15, 512, sample_rate=0.9).compiled
    assert not PartialFC(2**15, 512, compile=False).compiled
