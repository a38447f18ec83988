"""What changes more than the target: negatives, sub-centers, a learned scale, parameters by step; and dropout."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc import (
    AdaFace,
    ArcFace,
    CenterLoss,
    CombinedMargin,
    CosFace,
    CurricularFace,
    HardNegatives,
    L2Softmax,
    NormSoftmax,
    PartialFC,
    Softmax,
    SphereFace,
    SubCenterArcFace,
    WarmUp,
)
from partial_fc.head import draws
from partial_fc.head.elementwise import Negatives
from partial_fc.head.forward import _bounded
from partial_fc.head.margins import build_margin
from partial_fc.parallel import distributed
from tests.conftest import run_ranks
from tests.dense import (
    CHANGING_MARGINS,
    EXACT,
    Case,
    HeadLoss,
    assert_equals_dense,
    error,
    full,
    make_head,
    run_dense,
)
from tests.pairwise import pairwise
from tests.test_partial_fc import SIZES, assert_as_good_as_naive, peak_case, set_centers


@pairwise("dense", margin=CHANGING_MARGINS, rate=[1.0, 0.1], world_size=[1, 2, 3, 4])
def test_equals_dense(margin, rate, world_size):
    """As in test_partial_fc; t and the learned scale move in every step, and so does what warms up."""
    assert_equals_dense(Case(margin, sample_rate=rate, sizes=SIZES[world_size], steps=6 if rate < 1 else 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_classes=2, sizes=(1, 2, 2, 3)),
        dict(num_classes=1, sizes=(2, 1)),
        dict(sizes=(5, 0, 2)),
        dict(sizes=(1,)),
        dict(labels="one_rank"),
        dict(labels="duplicates", chunk=1),
        dict(forwards=3, loss_scale=8.0, loss_factor=0.5, auxiliary=True),
        dict(optimizer="adamw", hyper=dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1), forwards=2),
        dict(head=dict(cache_bytes=70 * 8, cache_dtype=torch.float64), forwards=2, sample_rate=1.0),
        dict(dropout=0.5, dim=16, forwards=2),
        dict(dropout=0.3, sizes=(5, 0, 2)),
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.parametrize(
    "margin", ["curricularface-filtered", "subcenterarcface", "learned-scale-elastic", "warm-up-adaface"]
)
def test_equals_dense_in_awkward_cases(margin, changes):
    assert_equals_dense(replace(Case(margin, sample_rate=0.3, sizes=(3, 1, 2)), **changes))


@pytest.mark.slow
@pytest.mark.parametrize("margin", ["softmax", "cosface-unnormalized", "magface", "adaface", "l2softmax"])
def test_dropout_equals_dense(margin):
    """What depends on |x| sees it after the dropout."""
    assert_equals_dense(Case(margin, sizes=(3, 1, 2), dropout=0.4, sample_rate=0.3, dim=16, forwards=2))


def test_the_cases_meet_every_branch():
    """Hard and easy negatives, filtered ones, sub-centers that are not the first, a scale at its floor and above."""
    case = Case("curricularface", sizes=(6,), steps=1)
    head = make_head(case)
    weight = head.full_weight()
    x = case.backbone()(case.data(0, 0)[0]).detach()
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).T
    target = cosine[range(6), case.data(0, 0)[1]]
    hard = cosine > ArcFace(margin=0.3).target(target).unsqueeze(1)
    assert 0.2 < hard.float().mean() < 0.8
    for name in ("curricularface-filtered", "cosface-filtered", "magface-filtered"):
        share = (cosine > CHANGING_MARGINS[name].interclass_filtering_threshold).float().mean()
        assert 0.05 < share < 0.5, name
    assert min(run_dense(Case("learned-scale-elastic", sizes=(6,), steps=6), weight)["scale"]) == 1
    assert len(set(run_dense(Case("learned-scale", sizes=(6,), steps=6), weight)["scale"])) == 6


@pytest.mark.parametrize(
    "name", ["curricularface", "curricularface-filtered", "cosface-filtered", "subcenterarcface-2"]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_derivative_of_negatives(name, dim):
    """By numerical differences, but for entries that have none: filtered, or another sub-center is nearer."""
    margin = CHANGING_MARGINS[name]
    cosine = torch.linspace(-0.95, 0.95, 60, dtype=torch.float64).view(10, 6)
    cosine = cosine if dim == 1 else cosine.T.contiguous()
    psi = torch.linspace(-0.5, 0.5, 10, dtype=torch.float64)
    negatives = Negatives.of(margin, 5.0, psi, {"t": torch.tensor(0.3, dtype=torch.float64)})

    def changed(cosine: Tensor) -> tuple[Tensor, Tensor]:
        logits = 5.0 * cosine
        slope = negatives.change(logits, dim)
        return logits, torch.ones_like(cosine) if slope is None else slope

    logits, slope = changed(cosine)
    step = 1e-6
    wanted = (changed(cosine + step)[0] - changed(cosine - step)[0]) / (2 * 5 * step)
    left = logits > -torch.inf
    assert 10 <= left.sum() <= 60 and error(slope[left], wanted[left]) < 1e-8
    logits = torch.full_like(cosine, -torch.inf)
    negatives.change(logits, dim)
    assert (logits == -torch.inf).all()


def test_gradcheck_through_the_head():
    labels = torch.tensor([0, 5, 5, 11])
    torch.manual_seed(0)
    for name, margin in CHANGING_MARGINS.items():
        if "adaface" in name:  # on purpose no gradient through |x|
            continue
        if isinstance(full(margin), CurricularFace):  # its t has this batch in it, without gradient, on purpose
            margin = replace(margin, momentum=1e-12)
        head = PartialFC(12, 3, margin, dtype=torch.float64, init_std=1.0, chunk=5)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, head=head: HeadLoss.apply(x, head, labels), (x,)), name


@pytest.mark.parametrize("inputs", ["random", "trained"])
@pytest.mark.parametrize(
    "margin",
    [
        CurricularFace(scale=30.0, margin=0.5),
        CurricularFace(scale=64.0, margin=0.5),
        CosFace(scale=64.0, interclass_filtering_threshold=0.2),
        CosFace(scale=64.0, learn_scale=True),
        SubCenterArcFace(scale=64.0, margin=0.5, sub_centers=4),
    ],
    ids=str,
)
def test_float32_is_as_good_as_naive_float32(margin, inputs):
    assert_as_good_as_naive(margin, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("margin", ["curricularface-filtered", "subcenterarcface", "learned-scale"])
def test_memory_of_a_step_does_not_grow_with_the_classes(margin, rate):
    peak, state = peak_case(CHANGING_MARGINS[margin], rate, 1)
    assert 0 < peak < 0.3 * state * full(CHANGING_MARGINS[margin]).sub_centers


# ---- CurricularFace


def cosines_and_t() -> list[float]:
    """Of three steps, the last with an empty batch."""
    head = PartialFC(23, 5, CurricularFace(momentum=0.25), dtype=torch.float64)
    seen = []
    for step, size in enumerate((6, 6, 0)):
        x = torch.randn(size, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        mine = distributed.part(size, distributed.rank(), distributed.world_size())
        labels = torch.arange(size)[mine.start : mine.stop]
        head(x[mine.start : mine.stop].requires_grad_(), labels).backward()
        seen += [head.target_cosine.item(), head.statistics["t"].item()]
        head.step(0.1)
    return seen


@pytest.mark.slow
def test_t_is_a_running_mean_of_target_cosines_equal_on_all_ranks():
    (alone,) = run_ranks(cosines_and_t, 1)
    first = 0.25 * alone[0]
    assert alone[1::2] == pytest.approx([first, *[first + 0.25 * (alone[2] - first)] * 2], rel=1e-14)
    for world_size in (2, 3):
        ranks = run_ranks(cosines_and_t, world_size)
        assert all(rank == ranks[0] for rank in ranks)  # bit for bit
        assert ranks[0] == pytest.approx(alone, rel=1e-12)


def test_hard_negatives_weigh_more_as_t_grows():
    cosine = torch.tensor([[0.1, 0.6]], dtype=torch.float64)
    for t, wanted in ((0.0, 0.36), (0.5, 0.66)):
        f, slope = CurricularFace().negatives(cosine, torch.tensor([[0.4]]), {"t": torch.tensor(t)})
        assert f.tolist() == [[0.1, pytest.approx(wanted)]] and slope.tolist() == [[1.0, pytest.approx(1.2 + t)]]


@pytest.mark.parametrize(
    "margin, bounded",
    [
        (CurricularFace(scale=30.0), True),  # f may be 2
        (CurricularFace(scale=40.0), False),
        (CosFace(scale=60.0), True),
        (CosFace(scale=60.0, learn_scale=True), False),  # it may grow
        (WarmUp(CosFace(scale=60.0), 5, {"scale": 80.0}), False),
    ],
    ids=str,
)
def test_what_may_grow_past_float32_keeps_a_maximum(margin, bounded):
    assert _bounded(PartialFC(100, 4, margin)) == bounded


@pytest.mark.parametrize("margin", CHANGING_MARGINS)
def test_an_empty_global_batch_changes_nothing(margin):
    head = PartialFC(50, 4, CHANGING_MARGINS[margin])
    head(torch.randn(6, 4, requires_grad=True), torch.arange(6)).backward()
    head.step(0.1)
    before = {name: value.item() for name, value in head.statistics.items() if "scale" not in name}
    loss = head(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    head.step(0.1)
    assert loss == 0 and before == {name: head.statistics[name].item() for name in before}


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    "margin",
    [CosFace(scale=s, margin=m) for s, m in ((64.0, 0.35), (64.0, 0.5), (68.0, 0.35))]
    + [ArcFace(scale=68.0, margin=1.5), CombinedMargin(scale=64.0, m1=4.0), AdaFace(), CosFace(scale=200.0)],
    ids=str,
)
def test_a_sample_without_negatives_has_gradient_zero(margin, cache_bytes):
    """All negatives filtered, or one class: Z is the target's alone, and e^(s psi) too small to divide by."""
    filtered = replace(margin, interclass_filtering_threshold=0.1)
    weight = torch.tensor([[-1.0, 0.01], [1.0, 0.0], [1.0, 0.01], [1.0, -0.01], [1.0, 0.02]])
    for one, centers in ((filtered, weight), (margin, weight[:1])):
        head = PartialFC(len(centers), 2, one, momentum=0.0, weight_decay=0.0, cache_bytes=cache_bytes)
        set_centers(head, centers)
        x = torch.tensor([[1.0, 0.0], [0.9, 0.1]], requires_grad=True)
        loss = head(x, torch.tensor([0, 0]))
        loss.backward()
        head.step(0.1)
        assert loss == 0 and not x.grad.any() and torch.equal(head.full_weight(), centers)


# ---- sub-centers


def test_each_sub_center_gets_its_own_samples():
    """Two samples of class 0 at opposite ends: each pulls at the sub-center that is nearest to it, and at no other."""
    head = PartialFC(2, 2, SubCenterArcFace(scale=4.0, sub_centers=2), momentum=0.0, weight_decay=0.0)
    weight = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [0.1, 1.0], [0.1, -1.0]])
    set_centers(head, weight.view(2, 2, 2))
    head(torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([0])).backward()
    head.step(0.1)
    moved = (head.full_weight() - weight).norm(dim=1) > 0
    assert moved.tolist() == [True, False, True, False]  # of class 1 too the nearest: the first of two


def test_one_sub_center_is_arcface():
    one, other = SubCenterArcFace(sub_centers=1), ArcFace()
    x, labels = torch.randn(6, 8), torch.arange(6)
    losses = [PartialFC(50, 8, margin)(x, labels) for margin in (one, other)]
    assert torch.equal(*losses)


def test_hard_negatives_know_one_center():
    with pytest.raises(ValueError, match="HardNegatives, and the margin has 3 sub-centers a class"):
        PartialFC(50, 4, SubCenterArcFace(), 0.1, sampler=HardNegatives(2))


# ---- the learned scale


def test_a_skipped_step_leaves_the_scale():
    head = PartialFC(50, 4, NormSoftmax(scale=8.0, learn_scale=True), optimizer="adamw")
    unskipped = PartialFC(50, 4, NormSoftmax(scale=8.0, learn_scale=True), optimizer="adamw")
    for step in range(3):
        x = torch.randn(6, 4)
        head(x.clone().requires_grad_(), torch.arange(6)).backward()
        before = dict(head.statistics)
        head.skip_step() if step == 1 else head.step(0.1)
        assert (head.statistics == before) == (step == 1)
        if step != 1:
            unskipped(x.requires_grad_(), torch.arange(6)).backward()
            unskipped.step(0.1)
    assert torch.equal(head.scale, unskipped.scale)  # AdamW's correction counts updates
    assert head.scale is head.statistics["scale"] and set(head.statistics) == {
        "scale",
        "scale_exp_avg",
        "scale_exp_avg_sq",
    }


def test_what_is_not_learned_is_the_margins():
    assert PartialFC(4, 2, CosFace(scale=8.0)).scale == 8.0 and PartialFC(4, 2, CosFace(scale=None)).scale is None


# ---- warm-up


def test_a_warm_up_is_linear_and_ends():
    warm = WarmUp(CosFace(scale=64.0, margin=0.4), 4, {"margin": 0.0, "scale": 16.0})
    seen = [(warm.at(step).scale, warm.at(step).margin) for step in (0, 1, 3, 4, 10**9)]
    assert seen == [(16, 0), (28, 0.1), (52, pytest.approx(0.3)), (64, 0.4), (64, 0.4)]
    head = PartialFC(4, 2, warm)
    assert warm.at(0) == head.margin
    head.begin_step(3, torch.arange(2))
    assert warm.at(3) == head.margin


def test_what_changes_in_training_can_be_logged():
    warm = WarmUp(CurricularFace(margin=0.4), 4, {"margin": 0.0})
    head = PartialFC(4, 2, warm)
    assert head.changing() == {"t": 0.0, "margin": 0.0}
    head(torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([0])).backward()
    head.step(0.1)
    assert head.changing() == {"t": pytest.approx(0.01 * head.target_cosine.item()), "margin": 0.0}  # of that step
    head.skip_step()
    assert head.changing()["margin"] == pytest.approx(0.1)
    assert PartialFC(4, 2).changing() == {}
    assert PartialFC(4, 2, CosFace(scale=8.0, learn_scale=True)).changing() == {"scale": 8.0}


# ---- dropout


def test_dropout_is_drawn_for_every_place_step_and_forward():
    real = torch.arange(4000) >= 0
    one = draws.dropout(0.75, 8, torch.float32, 0, 0, 0, real)
    assert set(one.unique().tolist()) == {0.0, 4.0}
    assert abs((one == 0).float().mean() - 0.75) < 0.01
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert (
            abs((one - 1).mul(draws.dropout(0.75, 8, torch.float32, *other, real) - 1).mean()) < 0.1
        )  # 3 if they were the same
    padded = torch.tensor([True, False, True, True])
    assert torch.equal(draws.dropout(0.75, 8, torch.float32, 0, 0, 0, padded)[padded], one[:3])


def test_an_evaluation_drops_nothing():
    head = PartialFC(50, 4, dropout=0.9)
    x, labels = torch.randn(6, 4), torch.arange(6)
    with torch.no_grad():
        assert torch.equal(head(x, labels), PartialFC(50, 4)(x, labels).detach())
    assert not torch.equal(head(x, labels), PartialFC(50, 4)(x, labels))


# ---- traffic, errors


def collectives(margin) -> int:
    head = PartialFC(50, 4, margin)
    calls = 0
    places = [(distributed, "_all_gather_single"), (dist, "all_reduce"), (distributed, "_reduce_scatter_single")]
    originals = [getattr(*place) for place in places]

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)

        return call

    try:
        for place, original in zip(places, originals, strict=True):
            setattr(*place, counted(original))
        head(torch.randn(3, 4, requires_grad=True), torch.arange(3), 3).backward()
        head.step(0.1)
    finally:
        for place, original in zip(places, originals, strict=True):
            setattr(*place, original)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "margin, count",
    [
        (CosFace(interclass_filtering_threshold=0.4), 3),
        (SubCenterArcFace(), 3),
        (CurricularFace(), 4),
        (CosFace(learn_scale=True), 4),
    ],
    ids=str,
)
def test_collectives_of_a_step(margin, count):
    assert run_ranks(collectives, 2, margin) == [count, count]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Softmax(learn_scale=True), "unexpected keyword argument 'learn_scale'"),
        (lambda: CosFace(scale=None, learn_scale=True), "CosFace: learn_scale is True; give False: it has no scale"),
        (lambda: CurricularFace(learn_scale=True), "learn_scale is True; give False: its negatives are not"),
        (lambda: CosFace(scale=0.5, learn_scale=True), "scale is 0.5; give 1 or more"),
        (lambda: CosFace(interclass_filtering_threshold=1.2), r"threshold is 1.2; give one in \(0, 1\), or None"),
        (lambda: CosFace(scale=None, interclass_filtering_threshold=0.4), "give None: its logits are not s cos"),
        (lambda: SphereFace(interclass_filtering_threshold=0.4), "unexpected keyword argument 'interclass_filt"),
        (lambda: L2Softmax(interclass_filtering_threshold=0.4), "give None: its logits are not s cos"),
        (lambda: CurricularFace(momentum=0), "momentum is 0; give one in"),
        (lambda: SubCenterArcFace(sub_centers=0), "sub_centers is 0; give a positive whole number"),
        (lambda: SubCenterArcFace(sub_centers=2.5), "sub_centers is 2.5; give a positive whole number"),
        (lambda: WarmUp(CosFace(), 0, {"margin": 0.0}), "WarmUp: steps and start are 0"),
        (lambda: WarmUp(CosFace(), 2.5, {"margin": 0.0}), "WarmUp: steps and start are 2.5"),
        (lambda: WarmUp(None, 5, {"margin": 0.0}), "WarmUp: margin is None; give an object"),
        (lambda: SubCenterArcFace(sub_centers=True), "sub_centers is True; give a positive whole number"),
        (lambda: PartialFC(4, 2, embedding_losses=CenterLoss()), "give a list of objects such as CenterLoss"),
        (lambda: PartialFC(4, 2, embedding_losses=[CenterLoss()] * 2), "give one CenterLoss at most"),
        (
            lambda: PartialFC(4, 2, embedding_losses=[type("Mine", (CenterLoss,), {})()]),
            "derive a loss of yours from EmbeddingLoss",
        ),
        (lambda: WarmUp(CosFace(), 5, {}), "WarmUp: steps and start are 5 and {}"),
        (lambda: WarmUp(CosFace(), 5, {"m": 0.0}), "CosFace has no number m to warm up; it has scale, margin"),
        (lambda: WarmUp(SphereFace(), 5, {"margin": 1}), "has no number margin to warm up; it has lambda_max"),
        (lambda: WarmUp(CosFace(scale=None), 5, {"scale": 8.0}), "has no number scale to warm up; it has margin"),
        (lambda: WarmUp(CosFace(), 5, {"margin": "low"}), "WarmUp: margin starts at 'low'; wanted a number"),
        (lambda: WarmUp(CosFace(), 5, {"margin": -1.0}), "CosFace: margin is -1.0; give one in"),
        (lambda: WarmUp(CosFace(learn_scale=True), 5, {"scale": 8.0}), "learns its scale from 64 on"),
        (lambda: PartialFC(4, 2, dropout=1.0), r"dropout is 1.0; give a probability in \[0, 1\)"),
        (lambda: build_margin("cosface", {"warmup": 100}), r"got 100; wanted as \{steps: 1000, margin: 0.0\}"),
        (lambda: build_margin("cosface", {"warmup": {"steps": 9, "m": 0}}), "CosFace has no number m to warm up"),
        (lambda: build_margin("subcenterarcface", {"sub_centers": 2.5}), "sub_centers is 2.5; give"),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_config_names_them():
    assert build_margin("curricularface", {"margin": "3e-1"}) == CurricularFace(margin=0.3)
    assert build_margin("subcenterarcface", {"sub_centers": 4}) == SubCenterArcFace(sub_centers=4)
    found = build_margin("cosface", {"interclass_filtering_threshold": 0.4, "learn_scale": True})
    assert found == CosFace(interclass_filtering_threshold=0.4, learn_scale=True)
    assert build_margin("cosface", {"interclass_filtering_threshold": None}) == CosFace()
    warm = build_margin("cosface", {"margin": 0.4, "warmup": {"steps": 100, "margin": 0, "scale": 16}})
    assert warm == WarmUp(CosFace(margin=0.4), 100, {"margin": 0.0, "scale": 16.0})


def test_the_learned_scale_has_the_gradient_of_the_loss():
    """Numerically, through the update: with plain SGD at rate lr the scale moves by -lr dL/ds."""
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6)

    def after(scale: float) -> tuple[float, float]:
        head = PartialFC(9, 4, CosFace(scale=scale, learn_scale=True), momentum=0.0, dtype=torch.float64)
        loss = head(x.clone().requires_grad_(), labels)
        loss.backward()
        head.step(1.0)
        return loss.item(), scale - head.scale.item()

    step = 1e-6
    wanted = (after(8 + step)[0] - after(8 - step)[0]) / (2 * step)
    assert after(8.0)[1] == pytest.approx(wanted, rel=1e-7) and abs(wanted) > EXACT
