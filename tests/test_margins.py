"""Every margin: formula, derivative, shape over the angle, defaults of its paper; on the head; beside other code."""

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from partial_fc import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticArcFace,
    ElasticCosFace,
    L2Softmax,
    LSoftmax,
    MagFace,
    Margin,
    NormSoftmax,
    PartialFC,
    SoftMarginSoftmax,
    Softmax,
    SphereFace,
    SubCenterArcFace,
)
from partial_fc.head import draws
from partial_fc.head.margin import Sample, least_scale
from partial_fc.parallel import distributed
from tests.conftest import run_ranks
from tests.dense import (
    ALL_MARGINS,
    EXACT,
    MORE_MARGINS,
    Case,
    HeadLoss,
    Seen,
    assert_equals_dense,
    error,
    full,
    naive_target_logit,
    seen_by,
)
from tests.pairwise import pairwise
from tests.test_partial_fc import SIZES, assert_as_good_as_naive, set_centers

TARGETS = {name: full(margin) for name, margin in ALL_MARGINS.items()}  # for the function of the target alone
ANGLES = torch.linspace(0, math.pi, 2001, dtype=torch.float64)


def sample_of(cosine: Tensor, length: Tensor | float = 1.0, step: int = 3, normal: float = 0.5, **statistics) -> Sample:
    length = torch.as_tensor(length, dtype=cosine.dtype).expand_as(cosine)
    statistics = {"length_mean": 1.1, "length_deviation": 0.6} | statistics
    statistics = {name: torch.tensor(value, dtype=torch.float64) for name, value in statistics.items()}
    real = torch.ones_like(cosine, dtype=torch.bool)
    return Sample(cosine, length, real, step, statistics, lambda: torch.full_like(cosine, normal))


# ---- the function itself


@pytest.mark.parametrize("margin", [name for name in TARGETS if name != "arcface-straight"])
def test_gradcheck(margin):
    """By cosine and by |x|; AdaFace sends none through |x| on purpose, which numerical differences cannot know."""
    cosine = torch.cos(ANGLES[50:-50:25]).requires_grad_()
    margin = TARGETS[margin]
    length = torch.linspace(0.3, 2.5, len(cosine), dtype=torch.float64)
    length.requires_grad_(not isinstance(margin, AdaFace))
    assert torch.autograd.gradcheck(lambda c, a: margin.target_of(sample_of(c, a)), (cosine, length))
    by_cosine, by_length = margin.derivatives(sample_of(cosine, length))
    for derivative, vector in ((by_cosine, cosine), (by_length, length)):
        psi = margin.target_of(sample_of(cosine, length)).sum()
        wanted = torch.autograd.grad(psi, vector, materialize_grads=True)[0] if vector.requires_grad else 0 * vector
        assert torch.equal(derivative, wanted)


@pytest.mark.parametrize("length", [0.1, 1.0, 1.3, 5.0])  # AdaFace's quality -1, -.2, .4, 1
@pytest.mark.parametrize(
    "margin",
    [
        *TARGETS.values(),
        ArcFace(margin=3.0),
        ArcFace(margin=0.0),
        CombinedMargin(m1=4.0, m2=3.0, m3=1.0),
        *[SphereFace(margin=m, lambda_max=0.0, lambda_min=0.0) for m in (1, 2, 3, 4)],
        LSoftmax(),
        ElasticArcFace(margin=0.1, deviation=1.0),
    ],
)
def test_decreases_in_the_angle(margin, length):
    for normal in (-3.0, 0.0, 3.0):
        psi = margin.target_of(sample_of(torch.cos(ANGLES), length, normal=normal))
        if isinstance(margin, AdaFace):  # the shifted angle is clipped: flat at one end or at the other
            inside = (math.pi / 2 - ANGLES).abs() < math.pi / 2 - 0.41
            assert (psi.diff() <= 0).all() and (psi[inside].diff() < 0).all()
        else:
            assert (psi.diff() < 0).all()


@pytest.mark.parametrize("margin", TARGETS)
def test_equals_the_formula_of_the_paper(margin):
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64)  # in 3-D: angles all over [0, pi]
    x[:20] = w[:20] + 1e-2 * x[:20]
    x[20:40] = -w[20:40] + 1e-2 * x[20:40]
    bias = torch.randn(200, generator=generator, dtype=torch.float64)
    margin = TARGETS[margin]
    for i in range(200):
        step, normal = i % 5, math.sin(i)
        cosine = torch.nn.functional.cosine_similarity(x[i], w[i], dim=0)
        r = x[i].norm() if margin.scale is None else margin.scale
        n = 1 if margin.normalize_centers else w[i].norm()
        sample = sample_of(cosine, x[i].norm(), step, normal, length_mean=1.5, length_deviation=0.7)
        logit = r * n * margin.target_of(sample) + (bias[i] if margin.has_bias else 0) - margin.shift()
        wanted = naive_target_logit(margin, x[i], w[i], bias[i], Seen(step, 1.5, 0.7), normal)
        torch.testing.assert_close(logit, wanted, rtol=1e-11, atol=1e-11)  # the largest error is 2e-12


@pytest.mark.parametrize(
    "margin, edges",
    [
        (ArcFace(margin=0.5), [math.pi - 0.5]),
        (CombinedMargin(m1=1.0, m2=0.3, m3=0.2), [math.pi - 0.3]),
        (CombinedMargin(m1=2.5, m2=0.4, m3=0.0), [(k * math.pi - 0.4) / 2.5 for k in (1, 2)]),
        (MagFace(low=0.5, high=1.5, low_margin=0.2, high_margin=0.6), [math.pi - 0.4]),
        (ElasticArcFace(margin=0.5, deviation=0.2), [math.pi - 0.6]),
        *[
            (kind(margin=m, lambda_max=0.0, lambda_min=0.0), [k * math.pi / m for k in range(1, m)])
            for kind in (LSoftmax, SphereFace)
            for m in (2, 3, 4)
        ],
    ],
)
def test_continued_without_a_jump_or_a_kink(margin, edges):
    """Where cos(phi) turns back up, at phi = k pi, d psi / d theta is 0 on both sides."""
    for edge in edges:
        cosine = torch.cos(torch.tensor([edge - 1e-7, edge + 1e-7], dtype=torch.float64)).requires_grad_()
        psi = margin.target_of(sample_of(cosine))
        (slope,) = torch.autograd.grad(psi.sum(), cosine)
        assert abs(psi[0] - psi[1]) < 1e-6
        assert slope.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", TARGETS)
def test_finite_at_the_ends(margin, dtype):
    for length in (1e-12, 1.0, 1e6):  # a zero embedding counts as 1e-12 long
        sample = sample_of(torch.tensor([1.0, -1.0, 1 - 1e-7, 1e-7 - 1], dtype=dtype), length)
        psi = TARGETS[margin].target_of(sample)
        assert psi.isfinite().all()
        assert all(derivative.isfinite().all() for derivative in TARGETS[margin].derivatives(sample))


def test_arcface_gradient_is_the_true_one():
    sample = sample_of(torch.tensor([0.5], dtype=torch.float64))
    assert 64 * ArcFace(margin=0.5).derivatives(sample)[0].item() == pytest.approx(73.88, abs=5e-3)
    assert 64 * ArcFace(margin=0.5, straight_through=True).derivatives(sample)[0].item() == 64


def test_straight_through_changes_the_derivative_alone():
    sample = sample_of(torch.cos(ANGLES))
    true, straight = ArcFace(), ArcFace(straight_through=True)
    assert (straight.target_of(sample) - true.target_of(sample)).abs().max() < 1e-15
    assert (straight.derivatives(sample)[0] == 1).all()


def test_combined_margin_is_one_formula():
    """m1, m2 and m3 together; each alone is SphereFace's psi, ArcFace and CosFace."""
    sample = sample_of(torch.cos(ANGLES[1:-1]))
    for combined, alone in [
        (CombinedMargin(m1=4.0, m2=0.0, m3=0.0), SphereFace(margin=4, lambda_max=0.0, lambda_min=0.0)),
        (CombinedMargin(m1=1.0, m2=0.5, m3=0.0), ArcFace(margin=0.5)),
        (CombinedMargin(m1=1.0, m2=0.0, m3=0.35), CosFace(margin=0.35)),
    ]:
        assert (combined.target_of(sample) - alone.target_of(sample)).abs().max() < 1e-13
    theta = torch.tensor(1.0, dtype=torch.float64)
    psi = CombinedMargin(m1=0.9, m2=0.4, m3=0.15).target(torch.cos(theta))
    assert psi.item() == pytest.approx(math.cos(0.9 + 0.4) - 0.15)


@pytest.mark.parametrize(
    "margin, wanted",
    [
        (CosFace(), dict(scale=64, margin=0.35)),
        (ArcFace(), dict(scale=64, margin=0.5, straight_through=False)),
        (CombinedMargin(), dict(scale=64, m1=1, m2=0.3, m3=0.2)),
        (LSoftmax(), dict(scale=None, margin=4)),
        (SphereFace(), dict(scale=None, margin=4, lambda_max=1000, lambda_min=5, gamma=0.12)),
        (MagFace(), dict(scale=64, low=10, high=110, low_margin=0.45, high_margin=0.8, regularization=35)),
        (AdaFace(), dict(scale=64, margin=0.4, h=0.333, momentum=0.01)),
        (CurricularFace(), dict(scale=64, margin=0.5, momentum=0.01)),  # the authors' code
        (SubCenterArcFace(), dict(scale=64, margin=0.5, sub_centers=3)),
        (ElasticCosFace(), dict(scale=64, margin=0.35, deviation=0.05)),  # their class has .0125; trained with .05
        (ElasticArcFace(), dict(scale=64, margin=0.5, deviation=0.05)),
    ],
)
def test_defaults_are_the_papers(margin, wanted):
    assert {name: getattr(margin, name) for name in wanted} == wanted


def test_what_is_normalized():
    nothing, features, both = (None, False), (1.0, False), (1.0, True)
    wanted = {
        (Softmax, SoftMarginSoftmax, LSoftmax): nothing,
        (L2Softmax,): features,
        (SphereFace,): (None, True),
        (NormSoftmax, CosFace, ArcFace, CombinedMargin, MagFace, AdaFace, ElasticCosFace, ElasticArcFace): both,
    }
    for kinds, (scale, normalize_centers) in wanted.items():
        for kind in kinds:
            assert (kind().scale is None) == (scale is None) and kind.normalize_centers == normalize_centers
            assert kind.has_bias == (kind in (Softmax, SoftMarginSoftmax, L2Softmax))
    assert Margin().normalize_centers and not Margin().has_bias


def test_sphereface_anneals_from_1000_to_5():
    steps = (0, 100, 1658, 1659, 10**6)
    assert [SphereFace().annealing(step) for step in steps] == pytest.approx([1000, 1000 / 13, 1000 / 199.96, 5, 5])
    cosine = torch.cos(ANGLES)
    for step, share in ((0, 1 / 1001), (10**6, 1 / 6)):
        psi = SphereFace().target_of(sample_of(cosine, step=step))
        alone = SphereFace(lambda_max=0.0, lambda_min=0.0).target_of(sample_of(cosine))
        assert (psi - (share * alone + (1 - share) * cosine)).abs().max() < 1e-13


def test_magface_margin_and_regularizer():
    """m(a) linear from .45 at 10 to .8 at 110; g(a) = 1 / a + a / 110^2 falls up to 110, where its slope is 0."""
    a = torch.tensor([1.0, 10.0, 60.0, 110.0, 500.0], dtype=torch.float64)
    psi = MagFace().target_of(sample_of(torch.full_like(a, math.cos(1.0)), a))
    wanted = [math.cos(1 + m) for m in (0.45, 0.45, 0.625, 0.8, 0.8)]
    assert psi.tolist() == pytest.approx(wanted, abs=1e-14)
    g = MagFace().regularizer(a) / 35
    assert g.tolist() == pytest.approx([1 / 10 + 10 / 12100] * 2 + [1 / 60 + 60 / 12100] + [2 / 110] * 2)
    a = torch.linspace(10.1, 109.9, 1001, dtype=torch.float64).requires_grad_()
    g = MagFace().regularizer(a)
    (slope,) = torch.autograd.grad(g.sum(), a)
    assert (slope < 0).all() and (slope.diff() > 0).all() and slope[-1] > -35 * 2 * 0.1 / 110**3 * 1.01


def test_adaface_keeps_running_statistics_of_real_samples():
    margin = AdaFace(momentum=0.25)
    length = torch.tensor([3.0, 1e-12, 9.0, 500.0, 1e-9], dtype=torch.float64)
    sample = sample_of(torch.zeros_like(length), length, length_mean=20.0, length_deviation=100.0)
    observed = margin.observe(sample._replace(real=torch.tensor([True, False, True, True, True])))
    clipped = torch.tensor([3.0, 9.0, 100.0, 1e-3], dtype=torch.float64)
    wanted = {"length_mean": 15 + clipped.mean().item() / 4, "length_deviation": 75 + clipped.std().item() / 4}
    assert {name: value.item() for name, value in observed.items()} == pytest.approx(wanted)
    assert margin.first_statistics() == {"length_mean": 20.0, "length_deviation": 100.0}
    for real in (0, 1):  # one sample has no deviation
        few = margin.observe(sample._replace(real=torch.arange(5) < real))
        assert all(torch.equal(few[name], sample.statistics[name]) for name in few)


def test_adaface_of_poor_and_of_good_images():
    """Quality -1: cos(theta + m), as ArcFace; 0: cos(theta) - m, as CosFace; 1: cos(theta - m) - 2 m."""
    cosine = torch.cos(ANGLES[300:-300])
    for length, psi in [
        (0.001, ArcFace(margin=0.4).target(cosine)),
        (20.0, CosFace(margin=0.4).target(cosine)),
        (100.0, torch.cos(torch.acos(cosine) - 0.4) - 0.8),
    ]:
        sample = sample_of(cosine, length, length_mean=20.0, length_deviation=5.0)
        assert (AdaFace().target_of(sample) - psi).abs().max() < 1e-13


def test_a_negative_draw_of_elasticface_is_no_margin():
    """theta + m below 0 would come back up: N(.5, .05^2) draws such a margin once in 10^23, N(.5, .25^2) once in 44."""
    cosine = torch.cos(ANGLES)
    psi = ElasticArcFace(margin=0.5, deviation=0.25).target_of(sample_of(cosine, normal=-2.1))
    assert (psi - cosine).abs().max() < 1e-15


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CosFace(scale=0), "scale is 0; give a positive number, or None"),
        (lambda: NormSoftmax(scale=math.nan), "scale is nan"),
        (lambda: CosFace(margin=-0.1), "CosFace: margin is -0.1; give one in"),
        (lambda: ArcFace(margin=3.2), r"ArcFace: margin is 3.2; give one in \[0, pi\), in rad; the paper's is 0.5"),
        (lambda: SoftMarginSoftmax(margin=-1), "SoftMarginSoftmax: margin is -1; give 0 or more"),
        (lambda: LSoftmax(margin=5), "LSoftmax: margin is 5; give 1, 2, 3 or 4"),
        (lambda: SphereFace(margin=2.5), "SphereFace: margin is 2.5; give 1, 2, 3 or 4"),
        (lambda: SphereFace(lambda_min=2000), "lambda_min is 2000; give 0 to lambda_max"),
        (lambda: SphereFace(gamma=-1), "gamma is -1; give 0 or more"),
        (lambda: CombinedMargin(m1=0), "m1 is 0; give a positive number"),
        (lambda: CombinedMargin(m2=3.2), "m2 is 3.2; give one in"),
        (lambda: CombinedMargin(m3=math.nan), "m3 is nan; give one in"),
        (lambda: MagFace(low=200), "low is 200; give a positive number below high"),
        (lambda: MagFace(low_margin=0.9), "low_margin is 0.9; give 0 to high_margin < pi"),
        (lambda: MagFace(high_margin=4), "low_margin is 0.45; give 0 to high_margin < pi"),
        (lambda: MagFace(regularization=-1), "regularization is -1; give 0 or more"),
        (
            lambda: CurricularFace(scale=None),
            "CurricularFace changes the cosines of negatives .*; got scale None",
        ),
        (lambda: AdaFace(margin=1), "margin is 1; give one in"),
        (lambda: AdaFace(h=0), "h is 0; give a positive number"),
        (lambda: AdaFace(momentum=0), "momentum is 0; give one in"),
        (lambda: ElasticCosFace(margin=2), "ElasticCosFace: margin is 2; give one in"),
        (lambda: ElasticCosFace(deviation=-1), "ElasticCosFace: deviation is -1; give 0 or more"),
        (lambda: ElasticArcFace(margin=4), "ElasticArcFace: margin is 4; give one in"),
        (lambda: ElasticArcFace(deviation=-1), "ElasticArcFace: deviation is -1; give 0 or more"),
        (lambda: Softmax(scale=3), "unexpected keyword argument 'scale'"),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# ---- on the head: those that look at more than the cosine, and new factors; test_partial_fc has the others


@pairwise("dense", margin=MORE_MARGINS, rate=[1.0, 0.1], world_size=[1, 2, 3, 4])
def test_equals_dense(margin, rate, world_size):
    """As in test_partial_fc; lambda falls, running statistics run, margins are drawn anew in every step."""
    assert_equals_dense(Case(margin, sample_rate=rate, sizes=SIZES[world_size], steps=6 if rate < 1 else 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_classes=2, sizes=(1, 2, 2, 3)),
        dict(num_classes=1, sizes=(2, 1)),
        dict(sizes=(5, 0, 2)),  # padding between the samples: no part of statistics, draws or regularizer
        dict(sizes=(1,)),
        dict(forwards=3, loss_scale=8.0, loss_factor=0.5, auxiliary=True),
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.parametrize("margin", ["magface", "adaface", "elasticarcface", "l2softmax"])
def test_equals_dense_in_awkward_cases(margin, changes):
    assert_equals_dense(replace(Case(margin, sample_rate=0.3, sizes=(3, 1, 2)), **changes))


def test_gradcheck_through_the_head():
    """As in test_partial_fc. Not AdaFace and the straight-through ArcFace: they leave a part of the derivative out, on
    purpose; test_equals_dense compares both with autograd that leaves out the same."""

    labels = torch.tensor([0, 5, 5, 11])
    torch.manual_seed(0)
    for name, margin in MORE_MARGINS.items():
        if name in ("adaface", "arcface-straight"):
            continue
        head = PartialFC(12, 3, margin, dtype=torch.float64, init_std=1.0, chunk=5)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, head=head: HeadLoss.apply(x, head, labels), (x,)), name


@pytest.mark.parametrize("inputs", ["random", "trained"])
@pytest.mark.parametrize("margin", [name for name in MORE_MARGINS if name != "arcface-straight"])
def test_float32_is_as_good_as_naive_float32(margin, inputs):
    """On embeddings about 8 long; test_equals_dense has the regularizer, which has no partner in the naive loss."""
    margin = MORE_MARGINS[margin]
    if isinstance(margin, MagFace):
        margin = replace(margin, low=6.0, high=9.0, regularization=0.0)
    assert_as_good_as_naive(margin, inputs)


# ---- running statistics and drawn margins


def statistics_of(sizes: tuple[int, ...], padded_size: int | None, skip: int | None = None) -> tuple[dict, list]:
    """AdaFace's statistics after four steps and the loss of each; step `skip` is dropped after its forward."""
    head = PartialFC(23, 5, MORE_MARGINS["adaface"], 0.5, dtype=torch.float64)
    start, losses = sum(sizes[: distributed.rank()]), []
    mine = slice(start, start + sizes[distributed.rank()])
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(23, (sum(sizes),), generator=generator)
        loss = head(x[mine].requires_grad_(), labels[mine], padded_size)
        losses.append(loss.item())
        if step == skip:
            head.skip_step()
            continue
        loss.backward()
        head.step(0.1)
    return head.statistics, losses


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(7,), (2, 5), (5, 0, 2), (0, 6, 0, 1)])
@pytest.mark.parametrize("padded_size", [None, 9])
def test_statistics_are_equal_on_all_ranks_and_whatever_the_padding(sizes, padded_size):
    results = run_ranks(statistics_of, len(sizes), sizes, padded_size)
    seen = Seen()
    for step in range(4):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        seen = seen_by(MORE_MARGINS["adaface"], x, seen, step, 0, 0)
    for statistics, losses in results:
        assert losses == results[0][1]
        for name in ("length_mean", "length_deviation"):
            assert torch.equal(statistics[name], results[0][0][name])  # bit for bit
            assert error(statistics[name], getattr(seen, name)) < 1e-14
    assert results[0][0]["length_deviation"] < 2  # far from 100, where it began


def test_a_skipped_step_leaves_no_statistics():
    before, last = Seen(), statistics_of((7,), None, skip=2)[0]
    for step in (0, 1, 3):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        before = seen_by(MORE_MARGINS["adaface"], x, before, step, 0, 0)
    assert error(last["length_mean"], before.length_mean) < 1e-14
    assert error(last["length_deviation"], before.length_deviation) < 1e-14


def test_an_evaluation_sees_the_statistics_and_leaves_them():
    head = PartialFC(23, 5, MORE_MARGINS["adaface"])
    x, labels = torch.randn(7, 5), torch.arange(7)
    head(x, labels).backward()
    head.step(0.1)
    before = dict(head.statistics)
    with torch.no_grad():
        head(10 * x, labels)
    assert all(torch.equal(head.statistics[name], before[name]) for name in before)


def drawn(seed: int = 0, step: int = 0, count: int = 20_000, padding: int = 0) -> Tensor:
    real = torch.arange(count + padding) >= padding
    return draws.standard_normal(seed, step, 0, real)[real]


def test_elastic_margins_are_drawn_anew():
    """Standard normal numbers, of which another seed, step or sample has others, and padding has none."""
    one = drawn()
    assert abs(one.mean()) < 0.03 and abs(one.std() - 1) < 0.03 and abs((one**4).mean() - 3) < 0.3
    assert torch.equal(one, drawn(padding=5)) and torch.equal(one[:7], drawn(count=7))
    for other in (drawn(seed=1), drawn(step=1), one.roll(1)):
        assert abs((one * other).mean()) < 0.03


# ---- margins that cannot be met, or do nothing


def cannot(probability: str, advice: str) -> list[str]:
    return [f"cannot be met: .* probability is at most {probability}, .*; lower the margin{advice}$"]


@pytest.mark.parametrize(
    "margin, num_classes, dim, messages",
    [
        # 1 / (1 + 999 exp(30 (-1/999 - 0))), and so on
        (CosFace(margin=1.0, scale=30), 1000, 64, cannot("0.00103", ", or give a scale of 2.31e.03 or more")),
        (ArcFace(margin=3.0, scale=24), 764, 64, cannot("6.49e-14", "")),
        (SubCenterArcFace(margin=3.0, scale=24), 764, 64, cannot("6.49e-14", "")),
        (ElasticArcFace(margin=3.0, scale=24), 764, 64, cannot("6.49e-14", "")),
        (CombinedMargin(m1=1, m2=1.5, m3=0.9), 1000, 64, cannot("9.53e-27", "")),
        (AdaFace(margin=0.99), 1000, 64, cannot("6.*e-31", "")),  # cos 0 - 2 m
        (MagFace(high_margin=2.5), 1000, 64, cannot("5.*e-26", "")),
        (NormSoftmax(scale=2.0), 1000, 64, ["is at most 0.00736, .* of cosine 1; give a scale of 2.31 or more$"]),
        (CosFace(scale=8.0, margin=0.1), 4000, 64, []),  # the best of configs/study
        (NormSoftmax(scale=2.31), 1000, 64, []),
        (AdaFace(), 10**6, 512, []),
        (MagFace(), 10**6, 512, []),
        (CombinedMargin(), 10**6, 512, []),
        # no bound
        (CosFace(scale=None), 10**6, 512, []),
        (L2Softmax(scale=1.0), 10**6, 512, []),
        (SphereFace(), 10**6, 512, []),
        (CurricularFace(margin=3.0), 1000, 512, []),
        (CosFace(), 1, 2, []),
        # CosFace, eq. 8: 1 - cos(2 pi / C) in the plane; C / (C - 1) otherwise, reached by C <= D + 1
        (CosFace(margin=0.35, scale=10), 8, 2, ["CosFace: margin is 0.35; give at most 0.2929: 8 centers in 2 dim"]),
        (CosFace(margin=0.29), 8, 2, []),
        (CosFace(margin=1.3, scale=4), 5, 4, ["CosFace: margin is 1.3; give at most 1.25"]),
        (ElasticCosFace(margin=1.25), 5, 4, []),
        (CosFace(margin=1.4), 5, 4, [*cannot("1.69e-05", ""), "margin is 1.4; .* at most 1.25"]),
        (CosFace(margin=1.9), 2, 2, []),
    ],
)
def test_a_margin_that_cannot_be_met_is_warned_of(margin, num_classes, dim, messages):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PartialFC(1, dim)
        said = margin.cautions(num_classes, dim)
        if num_classes <= 1000:
            PartialFC(num_classes, dim, margin)
            assert [str(warning.message) for warning in caught] == said
    assert len(said) == len(messages), said
    for text, message in zip(said, messages, strict=True):
        assert re.search(message, text), text


def best(margin: Margin, lengths: tuple[float, ...] = (1.0,), classes: int = 5) -> float:
    """The least softmax probability over |x| of a sample at its center, the centers as far apart as can be."""
    w = torch.nn.functional.normalize(torch.eye(classes, dtype=torch.float64) - 1 / classes)
    cosine = w @ w.T
    length = torch.tensor(lengths, dtype=torch.float64)
    statistics = {"length_mean": torch.tensor(20.0), "length_deviation": torch.tensor(10.0)}
    one, zero = torch.ones_like(length), torch.zeros_like(length)
    psi = margin.target_of(Sample(one, length, one.bool(), 0, statistics, lambda: zero))
    logits = margin.scale * cosine[0].repeat(len(length), 1)
    logits[:, 0] = margin.scale * psi
    return torch.softmax(logits, dim=1)[:, 0].min().item()


@pytest.mark.parametrize(
    "margin", [CosFace(scale=4.0), ArcFace(scale=4.0), CombinedMargin(scale=4.0), ElasticArcFace(scale=4.0)]
)
def test_the_largest_probability_is_what_the_best_centers_give(margin):
    assert margin.largest_probability(5) == pytest.approx(best(margin), rel=1e-9)


def test_the_largest_margin_is_that_of_the_worst_length():
    lengths = tuple(range(1, 200))
    for margin in (MagFace(scale=4.0), AdaFace(scale=4.0), AdaFace(scale=4.0, margin=0.99)):
        assert margin.largest_probability(5) == pytest.approx(best(margin, lengths), rel=1e-5)
    assert AdaFace(scale=4.0).largest_probability(5) < 0.9 * AdaFace(scale=4.0, margin=0.2).largest_probability(5)


def test_the_papers_scale_gives_nine_tenths():
    margin = NormSoftmax(scale=least_scale(5))
    assert margin.largest_probability(5) == pytest.approx(0.9) == pytest.approx(best(margin))


def lengths_seen(*batches: float) -> list[str]:
    """What is said of batches of such |x|, numbers being read after each."""
    head = PartialFC(4, 3, MagFace(low=10, high=20))
    x = torch.nn.functional.normalize(torch.arange(1.0, 7).view(2, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in batches:
            head((x * torch.tensor([[length], [length + 1]])).requires_grad_(), torch.tensor([0, 1])).backward()
            head.step(0.1)
            head.changing()
    return [str(warning.message) for warning in caught]


def test_magface_says_once_that_its_margin_is_a_constant():
    (said,) = lengths_seen(7.5, 7.5, 30.0)
    assert "|x| is 7.5 to 8.5 in a batch, 100% outside low 10 to high 20" in said
    assert lengths_seen(12.0, 9.5) == []  # half of it is inside
    assert len(lengths_seen(12.0, 21.0, 21.0)) == 1  # later, where numbers are read


def warned() -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PartialFC(1000, 4, CosFace(scale=2.0))
    return len(caught)


@pytest.mark.slow
def test_one_rank_warns():
    assert run_ranks(warned, 3) == [1, 0, 0]


# ---- beside pytorch-metric-learning


def both(margin: Margin, theirs: torch.nn.Module, seed: int = 0) -> tuple[tuple, tuple, Tensor]:
    """Loss, gradients by embeddings and by centers, ours and theirs, and the angles to the targets (B,)."""
    generator = torch.Generator().manual_seed(seed)
    k = getattr(margin, "sub_centers", 1)
    weight, x = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (23 * k, 64))
    labels = torch.randint(23, (64,), generator=generator)
    nearest = torch.nn.functional.cosine_similarity(x.unsqueeze(1), weight.view(23, k, 5)[labels], dim=2)
    cosine = nearest.amax(dim=1)
    theirs.W.data = weight.T.clone()
    embeddings = x.clone().requires_grad_()
    loss = theirs(embeddings, labels)
    loss.backward()
    wanted = (loss.detach(), embeddings.grad, theirs.W.grad.T)
    head = PartialFC(23, 5, margin, momentum=0.0, weight_decay=0.0, dtype=torch.float64)
    set_centers(head, weight)
    embeddings = x.clone().requires_grad_()
    loss = head(embeddings, labels)
    loss.backward()
    head.step(1.0)
    return (loss.detach(), embeddings.grad, weight - head.full_weight()), wanted, torch.acos(cosine)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its numpy calls
@pytest.mark.parametrize(
    "name", ["normsoftmax", "cosface", "arcface", "subcenterarcface", "sphereface", "lsoftmax", "lsoftmax-2"]
)
def test_equals_pytorch_metric_learning(name):
    """Loss and gradients to 1e-11. Their margin of ArcFace is in degrees, 28.6 by default (0.4992 rad, not 0.5);
    their SphereFace and L-Softmax do not anneal, so lambda is 0 here; m = 3 and 4 turn several times."""
    from pytorch_metric_learning import losses

    none = dict(lambda_max=0.0, lambda_min=0.0)
    ours, theirs = {
        "normsoftmax": (NormSoftmax(scale=16.0), losses.NormalizedSoftmaxLoss(23, 5, temperature=1 / 16)),
        "cosface": (CosFace(scale=24.0, margin=0.35), losses.CosFaceLoss(23, 5, margin=0.35, scale=24)),
        "arcface": (ArcFace(scale=24.0, margin=math.radians(5)), losses.ArcFaceLoss(23, 5, margin=5, scale=24)),
        "subcenterarcface": (
            SubCenterArcFace(scale=24.0, margin=math.radians(5), sub_centers=2),
            losses.SubCenterArcFaceLoss(num_classes=23, embedding_size=5, margin=5, scale=24, sub_centers=2),
        ),
        "sphereface": (SphereFace(margin=4, **none), losses.SphereFaceLoss(23, 5, margin=4, scale=1)),
        "lsoftmax": (LSoftmax(margin=3, **none), losses.LargeMarginSoftmaxLoss(23, 5, margin=3, scale=1)),
        "lsoftmax-2": (LSoftmax(margin=2, **none), losses.LargeMarginSoftmaxLoss(23, 5, margin=2, scale=1)),
    }[name]
    got, wanted, theta = both(ours, theirs)
    farthest = 2.1 if name == "subcenterarcface" else 2.5  # the nearest of two centers; m = 4 turns at 2.36
    assert theta.min() < 0.6 and farthest < theta.max() < math.pi - math.radians(5)
    for some, other in zip(got, wanted, strict=True):
        assert error(some, other) < EXACT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_pytorch_metric_learning_differs():
    """ArcFace past theta = pi - m: theirs is cos(theta) - m sin(m), the fallback of the authors' code, which falls by
    m sin(m) + cos(m) - 1 (0.117 at m = 0.5) at the edge and has slope 1 past it; ours goes on without a jump, with a
    slope that rises from 0."""
    from pytorch_metric_learning import losses

    m = 0.5
    theirs = losses.ArcFaceLoss(23, 5, margin=math.degrees(m), scale=24)
    cosine = torch.cos(ANGLES[1:-1])
    got, wanted = ArcFace(margin=m).target(cosine), theirs.modify_cosine_of_target_classes(cosine)
    before = ANGLES[1:-1] < math.pi - m
    assert (got - wanted)[before].abs().max() < 1e-14
    past = cosine[~before]
    assert (wanted[~before] - (past - m * math.sin(m))).abs().max() < 1e-14
    edge = torch.cos(math.pi - m + torch.tensor([-1e-9, 1e-9], dtype=torch.float64))
    assert -theirs.modify_cosine_of_target_classes(edge).diff().item() == pytest.approx(0.1173, abs=1e-4)
    assert -ArcFace(margin=m).target(edge).diff().item() < 1e-9
