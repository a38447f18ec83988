"""Losses beside the classifier: against loops written from the papers, on ranks, beside other code, at the edges."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partial_fc import PartialFC
from partial_fc.build import build_losses
from partial_fc.config_file import load_config
from partial_fc.head import embedding_losses
from partial_fc.head.centers import initial_centers
from partial_fc.head.embedding_losses import (
    BY_NAME,
    Batch,
    CenterLoss,
    ContrastiveLoss,
    EmbeddingLoss,
    FeatureCenters,
    TripletLoss,
    build_embedding_loss,
    evaluate,
)
from partial_fc.head.exchange import PADDING
from partial_fc.head.partition import class_range
from partial_fc.study.plan import digest
from tests.conftest import REPOSITORY
from tests.dense import EMBEDDING_LOSSES, EXACT, Case, assert_equals_dense, error, naive_distance, naive_loss
from tests.pairwise import pairwise

CLASSES, DIM = 11, 5
LOSSES: dict[str, EmbeddingLoss] = {
    "triplet-soft": TripletLoss(weight=0.7),
    "triplet-margin": TripletLoss(margin=0.3),
    "triplet-no-margin": TripletLoss(margin=0.0),
    "triplet-facenet": TripletLoss(margin=0.2, normalize=True, squared=True),
    "triplet-soft-squared": TripletLoss(squared=True),
    "contrastive": ContrastiveLoss(margin=2.5, weight=1.3),
    "contrastive-normalized": ContrastiveLoss(normalize=True),
    "center": CenterLoss(weight=0.4, alpha=0.5),
}
PAIRS = {name: loss for name, loss in LOSSES.items() if name != "center"}


# ---- the papers, one sample at a time


def naive(loss: EmbeddingLoss, x: Tensor, labels: Tensor, centers: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss () and gradient (n, D)."""
    x = x.clone().requires_grad_()
    value = naive_loss(loss, x, labels, centers)
    (gradient,) = torch.autograd.grad(value, x, materialize_grads=True)
    return value.detach(), gradient


# ---- ours, on simulated ranks


def term(loss: EmbeddingLoss, rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.float64):
    """What a rank evaluates."""
    if not isinstance(loss, CenterLoss):
        return loss
    return FeatureCenters(loss, class_range(CLASSES, rank, world_size), DIM, seed=3, dtype=dtype, device="cpu")


def gathered(x: Tensor, labels: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, list[slice], Tensor]:
    """x, labels, real as the ranks gather parts of these `sizes`, each rank's rows, and where the samples went."""
    rows = max(sizes) + 1  # one row of padding at least
    places = torch.cat([torch.arange(size) + rank * rows for rank, size in enumerate(sizes)])
    everything = torch.zeros(len(sizes) * rows, x.shape[1], dtype=x.dtype)
    everything[1::2] = 2.5  # whatever stands there; zeros are what the head gathers
    everything[places] = x
    padded = torch.full((len(everything),), PADDING)
    padded[1::2] = 1  # nor does the label matter
    padded[places] = labels
    real = torch.zeros(len(everything), dtype=torch.bool)
    real[places] = True
    return everything, padded, real, [slice(r * rows, (r + 1) * rows) for r in range(len(sizes))], places


def on_ranks(loss: EmbeddingLoss, x: Tensor, labels: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Loss () and gradient (n, D), added over ranks; each computes its shares alone."""
    everything, padded, real, parts, places = gathered(x, labels, sizes)
    answers = [
        evaluate([term(loss, rank, len(sizes), x.dtype)], everything, padded, real, own)
        for rank, own in enumerate(parts)
    ]
    for (shares, gradient), own in zip(answers, parts, strict=True):
        assert shares.dtype == torch.float64 and gradient.dtype == x.dtype
        if not isinstance(loss, CenterLoss):
            others = torch.ones(len(everything), dtype=torch.bool)
            others[own] = False
            assert not shares[others].any()
    shares, gradient = (sum(part) for part in zip(*answers, strict=True))
    assert not shares[~real].any() and not gradient[~real].any()
    return shares.sum(), gradient[places]


def batch(count: int = 14, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Identities that overlap: some triplets are satisfied, some pairs of other identities near."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.8 * torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    return x + torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)[labels], labels


CENTERS = term(CenterLoss()).value
SIZES = [[14], [7, 7], [5, 0, 9], [3, 3, 3, 3, 2], [0, 1, 12, 1], [0, 0, 0, 14, *[0] * 9]]


@pytest.mark.parametrize("classes", [2, 4, CLASSES])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_formula_of_the_paper_at_any_number_of_ranks(loss, classes):
    """13 ranks for 11 classes: some own none."""
    loss = LOSSES[loss]
    x, labels = batch(classes=classes, seed=classes)
    wanted = naive(loss, x, labels, CENTERS)
    assert wanted[0] > 0.01 and wanted[1].abs().max() > 1e-3
    for sizes in SIZES:
        for got, reference in zip(on_ranks(loss, x, labels, sizes), wanted, strict=True):
            assert error(got, reference) < EXACT, sizes


def test_the_loss_of_the_readme_by_its_module(tmp_path, monkeypatch):
    """Its mean at any number of ranks; as a config names it; its file counts in a study; it compares no samples."""
    section = (REPOSITORY / "README.md").read_text().partition("\n## Margins")[2].partition("\n## ")[0]
    program = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[1]
    (tmp_path / "readme_ring.py").write_text(program + "\n\nclass Plain(EmbeddingLoss):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = "readme_ring.Ring"
    with pytest.raises(ValueError, match="embedding_losses.readme_ring.Ring: .*only with --trust-code"):
        build_embedding_loss(name, {"weight": 0.3, "radius": 2})
    loss = build_embedding_loss(name, {"weight": 0.3, "radius": 2}, trust_code=True)
    x, labels = batch()
    wanted = 0.3 * (x.norm(dim=1) - 2).square().mean() / 2
    slope = 0.3 * ((1 - 2 / x.norm(dim=1, keepdim=True)) * x) / len(x)
    for sizes in SIZES:
        got, gradient = on_ranks(loss, x, labels, sizes)
        assert error(got, wanted) < EXACT and error(gradient, slope) < EXACT, sizes

    given = "head.embedding_losses={readme_ring.Ring: {weight: 0.3, radius: 2}}"
    assert build_losses(load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", [given]))[1] == [loss]
    values = {"data": {"train": "", "global_batch_size": 8}, "head": {"embedding_losses": {name: {"radius": 2}}}}
    before = digest(values, str)
    assert before == digest(values, str)
    (tmp_path / "readme_ring.py").write_text(program + "\n")
    assert before != digest(values, str)

    with pytest.raises(
        ValueError, match="embedding_losses.readme_ring.Plain: .*wanted a subclass of EmbeddingLoss, below"
    ):
        build_embedding_loss("readme_ring.Plain", {}, trust_code=True)
    (tmp_path / "needs_losses.py").write_text(program.replace("radius: float = 20.0", "radius: float"))
    with pytest.raises(ValueError, match="embedding_losses.needs_losses.Ring.radius: needs_losses.Ring has no default"):
        build_embedding_loss("needs_losses.Ring", {"weight": 2}, trust_code=True)
    with pytest.raises(ValueError, match="cannot be imported .*give module.Class"):
        build_embedding_loss("nowhere.Ring", {}, trust_code=True)
    assert not loss.compares and TripletLoss().compares and ContrastiveLoss().compares and not CenterLoss().compares


@dataclass(frozen=True, kw_only=True)
class Own(EmbeddingLoss):
    """What of_anchors gives is `form` of these: the cosine of each sample with the batch's mean direction."""

    form: str = "right"

    def of_anchors(self, x, batch):
        unit = x / x.square().sum(dim=1, keepdim=True).sqrt()
        mean = (unit * batch.real.unsqueeze(1)).sum(dim=0) / batch.count
        cosine = unit @ mean / batch.count
        forms = {"right": cosine[batch.own], "mean": cosine[batch.own].mean(), "all": cosine, "column": cosine[:, None]}
        return forms[self.form]


def test_a_loss_that_normalizes_beside_padding():
    """Zeros in its rows would be NaN in the gradient of all."""
    x, labels = batch()
    reference = x.clone().requires_grad_()
    unit = reference / reference.norm(dim=1, keepdim=True)
    wanted = (unit @ unit.mean(dim=0)).mean()
    (slope,) = torch.autograd.grad(wanted, reference)
    for sizes in SIZES:
        got, gradient = on_ranks(Own(), x, labels, sizes)
        assert error(got, wanted.detach()) < EXACT and error(gradient, slope) < EXACT, sizes


@pytest.mark.parametrize("form, shape", [("mean", r"\(\)"), ("all", r"\(16,\)"), ("column", r"\(16, 1\)")])
def test_a_loss_of_another_shape_is_an_error(form, shape):
    with pytest.raises(ValueError, match=rf"Own.of_anchors gave {shape}, wanted \(8,\): what each of this rank's rows"):
        on_ranks(Own(form=form), *batch(), [7, 7])


def test_a_loss_without_its_function_says_so():
    with pytest.raises(NotImplementedError, match="EmbeddingLoss has no of_anchors"):
        on_ranks(EmbeddingLoss(), *batch(), [14])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    x, labels = batch(9, classes=4, seed=1)
    everything, padded, real, parts, _ = gathered(x, labels, [4, 5])
    for rank, own in enumerate(parts):
        shares = partial(term(LOSSES[loss], rank, 2).shares, batch=Batch.of(padded, real, own))
        assert torch.autograd.gradcheck(shares, everything.requires_grad_())


def test_several_losses_add_up_and_evaluation_needs_no_gradient():
    x, labels = batch()
    real, own = torch.ones(14, dtype=torch.bool), slice(0, 14)
    terms = [term(loss) for loss in LOSSES.values()]
    shares, gradient = evaluate(terms, x, labels, real, own)
    wanted = [naive(loss, x, labels, CENTERS) for loss in LOSSES.values()]
    assert error(shares.sum(), sum(value for value, _ in wanted)) < EXACT
    assert error(gradient, sum(slope for _, slope in wanted)) < EXACT
    with torch.no_grad():
        again, none = evaluate(terms, x, labels, real, own, training=False)
    assert none is None and torch.equal(again, shares) and not again.requires_grad
    shares, gradient = evaluate([], x, labels, real, own)
    assert not shares.any() and not gradient.any() and gradient.shape == x.shape


# ---- feature centers


def naive_updates(centers: Tensor, alpha: float, steps: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """The centers after steps of micro-batches, one class at a time."""
    centers = centers.clone()
    for forwards in steps:
        before = centers.clone()
        for j in range(len(centers)):
            mine = [x for xs, labels in forwards for x, label in zip(xs, labels.tolist(), strict=True) if label == j]
            delta = sum((before[j] - x for x in mine), torch.zeros(DIM, dtype=centers.dtype)) / (1 + len(mine))
            centers[j] = before[j] - alpha * delta
    return centers


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_feature_centers_equal_a_loop_and_are_the_same_at_any_number_of_ranks(alpha):
    loss = CenterLoss(weight=0.1, alpha=alpha)
    # micro-batches that share identities, duplicates within one, one empty; the last step has a single identity
    steps = [[batch(7, 4, seed=s), batch(5, CLASSES, seed=s + 50), batch(0)] for s in range(6)]
    steps.append([(batch(6)[0], torch.full((6,), CLASSES - 1))])
    wanted = naive_updates(CENTERS, alpha, steps)
    moved = (wanted - CENTERS).abs().amax(dim=1)
    assert alpha == 0 or (moved > 0.05).sum() == CLASSES - 1 and (moved == 0).sum() == 1
    results = []
    for world_size in (1, 2, 3, 5, 13):
        ranks = [term(loss, rank, world_size) for rank in range(world_size)]
        for forwards in steps:
            parts = []
            for x, labels in forwards:
                sizes = [len(part) for part in torch.arange(len(x)).tensor_split(world_size)]
                parts.append(gathered(x, labels, sizes)[:3])
            x, labels, real = (torch.cat(part) for part in zip(*parts, strict=True))
            for one in ranks:
                one.update(x, labels, real)
        assert all(len(one.state()["feature_center"]) == len(one.classes) for one in ranks)
        results.append(torch.cat([one.value for one in ranks]))
        assert error(results[-1], wanted) < EXACT
        assert torch.equal(results[-1], results[0])


def test_feature_centers_start_as_functions_of_seed_and_class():
    whole = FeatureCenters(CenterLoss(), range(3000), 8, seed=1, dtype=torch.float32, device="cpu").value
    part = FeatureCenters(CenterLoss(), range(1000, 2500), 8, seed=1, dtype=torch.float32, device="cpu").value
    assert torch.equal(part, whole[1000:2500]) and whole.square().sum(dim=1).mean().sqrt().item() == pytest.approx(
        1, rel=0.02
    )
    other = FeatureCenters(CenterLoss(), range(3000), 8, seed=2, dtype=torch.float32, device="cpu").value
    head = initial_centers_of_the_head()
    for not_equal in (other, head):
        assert torch.corrcoef(torch.stack([whole.flatten(), not_equal.flatten()]))[0, 1].abs() < 0.03


def initial_centers_of_the_head() -> Tensor:
    out = torch.empty(3000, 8)
    initial_centers(range(3000), 8, 1, 8**-0.5, out)
    return out


def test_loss_and_update_use_the_same_difference():
    """d loss / d x = weight / n (x - c), and a step moves c along it."""
    x, labels = batch(1)
    one = term(CenterLoss(weight=1.0, alpha=1.0))
    before = one.value.clone()
    _, gradient = evaluate([one], x, labels, torch.ones(1, dtype=torch.bool), slice(0, 1))
    one.update(x, labels, torch.ones(1, dtype=torch.bool))
    torch.testing.assert_close(one.value[labels] - before[labels], gradient / 2)
    others = torch.arange(CLASSES) != labels
    assert torch.equal(one.value[others], before[others])


# ---- on the head


HEADS = {
    "plain": Case("cosface"),
    "more": Case("softmax", sample_rate=0.3, forwards=2, dropout=0.5, loss_scale=8.0),
}


@pairwise(
    "dense",
    losses=[*[(name,) for name in EMBEDDING_LOSSES], tuple(EMBEDDING_LOSSES)],
    world_size=[1, 2, 3, 4],
    head=HEADS,
)
def test_on_the_head_equals_dense(losses, world_size, head):
    """Loss, gradients, class and feature centers of several steps; micro-batches, dropout for the head alone."""
    sizes = {1: (9,), 2: (4, 5), 3: (5, 0, 4), 4: (2, 3, 3, 1)}[world_size]
    assert_equals_dense(replace(HEADS[head], sizes=sizes, num_classes=5, embedding_losses=losses, steps=3))


def test_a_skipped_step_leaves_the_feature_centers():
    head = PartialFC(50, 4, embedding_losses=[CenterLoss()])
    before = head.feature_centers.value.clone()
    for step in range(2):
        head(torch.randn(6, 4, requires_grad=True), torch.arange(6)).backward()
        head.skip_step() if step == 0 else head.step(0.1)
        assert torch.equal(head.feature_centers.value, before) == (step == 0)


def test_the_loss_says_what_the_embedding_losses_are():
    x, labels = torch.randn(6, 4), torch.arange(6) // 2
    with torch.no_grad():
        head = PartialFC(50, 4, embedding_losses=[TripletLoss()])
        both, alone = head(x, labels), PartialFC(50, 4)(x, labels)
    assert head.changing() == {"embedding_loss": pytest.approx((both - alone).item(), rel=1e-5)}


# ---- edges


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], [3], [1, 2]])
@pytest.mark.parametrize("loss", LOSSES)
def test_empty_batches_and_batches_of_one_identity(loss, sizes):
    loss = LOSSES[loss]
    x, _ = batch(sum(sizes))
    labels = torch.full((len(x),), 4)
    got, wanted = on_ranks(loss, x, labels, sizes), naive(loss, x, labels, CENTERS)
    for some, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(some, other, rtol=EXACT, atol=EXACT)
    assert (got[0] == 0) == (len(x) == 0 or isinstance(loss, TripletLoss))  # no negatives


def test_no_rows_at_all():
    nothing = torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    for loss in LOSSES.values():
        shares, gradient = evaluate([term(loss)], *nothing, slice(0, 0))
        assert shares.shape == (0,) and gradient.shape == (0, DIM)
        term(loss).update(*nothing) if isinstance(loss, CenterLoss) else None


@pytest.mark.parametrize("loss", PAIRS)
def test_every_identity_once(loss):
    x, labels = batch(6)[0], torch.arange(6)
    value, gradient = on_ranks(PAIRS[loss], x, labels, [2, 4])
    wanted = naive(PAIRS[loss], x, labels)
    assert error(value, wanted[0]) < EXACT and error(gradient, wanted[1]) < EXACT
    if isinstance(PAIRS[loss], TripletLoss):
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("loss", PAIRS)
def test_identical_embeddings_have_a_loss_and_no_gradient(loss):
    loss = PAIRS[loss]
    x = torch.ones(6, DIM, dtype=torch.float64)
    value, gradient = on_ranks(loss, x, torch.tensor([0, 0, 1, 1, 2, 3]), [4, 2])
    assert not gradient.any()
    if isinstance(loss, ContrastiveLoss):
        expected = loss.margin**2 / 2
    else:
        expected = math.log(2) if loss.margin == "soft" else loss.margin
    assert value.item() == pytest.approx(loss.weight * expected, rel=1e-14)


@pytest.mark.parametrize("loss", [name for name in PAIRS if name.startswith("triplet")])
def test_of_equally_hard_pairs_the_first_counts(loss):
    """Duplicated embeddings tie exactly; rows that are one vector with its numbers rearranged tie up to rounding."""
    loss = PAIRS[loss]
    x, labels = batch(6, 3, seed=5)
    twice, both = torch.cat([x, x]), torch.cat([labels, labels])
    for got, wanted in zip(on_ranks(loss, twice, both, [5, 7]), naive(loss, twice, both), strict=True):
        assert error(got, wanted) < EXACT
    generator = torch.Generator().manual_seed(6)
    vector = torch.randn(40, generator=generator, dtype=torch.float64)
    x = torch.stack([vector[torch.randperm(40, generator=generator)] for _ in range(12)])
    x[0] = 1.0  # equally far from all others, and an anchor
    labels = torch.tensor([0, 1] * 6)
    assert len({naive_distance(x[0], row).item() for row in x[1:]}) > 1
    one, slope = on_ranks(loss, x, labels, [12])
    for sizes in ([6, 6], [5, 0, 7], [1] * 12):
        value, gradient = on_ranks(loss, x, labels, sizes)
        assert error(value, one) < EXACT and error(gradient, slope) < EXACT


def test_small_distances_keep_their_digits():
    """Embeddings of length 20 that are 1e-7 apart, where a product form has no digit left."""
    x, labels = batch(6, 3)
    x = 20 * x[:1] / x[:1].norm() + 1e-7 * x
    for loss in (ContrastiveLoss(margin=3e-7), TripletLoss(margin=2e-7)):
        for got, wanted in zip(on_ranks(loss, x, labels, [4, 2]), naive(loss, x, labels), strict=True):
            assert error(got, wanted) < EXACT


# ---- float32, memory


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_float32_embeddings_lose_nothing(loss, near):
    """The loss is that of float64, the gradient is rounded once; naive float32 does worse where embeddings are near."""
    loss = LOSSES[loss]
    x, labels = batch(12, 4, seed=2)
    x = (x[:1] * 8 + x * 0.01 if near else x).float()
    centers = term(loss, dtype=torch.float32).value if isinstance(loss, CenterLoss) else None
    truth = naive(loss, x.double(), labels, None if centers is None else centers.double())
    value, gradient = on_ranks(loss, x, labels, [5, 7])
    assert error(value, truth[0]) < EXACT
    assert error(gradient.double(), truth[1]) < 1e-7
    if near and not isinstance(loss, CenterLoss):
        assert error(naive(loss, x, labels)[0].double(), truth[0]) > EXACT


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_has_a_number_per_pair_and_dimension(loss):
    x = torch.randn(32, 16)
    labels = torch.randint(4, (32,))
    one = LOSSES[loss]
    if isinstance(one, CenterLoss):
        one = FeatureCenters(one, range(4), 16, seed=0, dtype=torch.float32, device="cpu")
    with Largest() as seen:
        evaluate([one], x, labels, torch.ones(32, dtype=torch.bool), slice(0, 32))
    assert 32 * 16 <= seen.numbers <= 32 * 32


@pytest.mark.parametrize("loss", PAIRS)
def test_chunks_of_anchors_change_nothing(loss, monkeypatch):
    x, labels = batch()
    whole = on_ranks(PAIRS[loss], x, labels, [9, 5])
    sizes = []
    plain = embedding_losses._distances
    monkeypatch.setattr(embedding_losses, "PAIR_NUMBERS", 3 * 20 * DIM)
    monkeypatch.setattr(embedding_losses, "_distances", lambda a, x: sizes.append(len(a)) or plain(a, x))
    for got, wanted in zip(on_ranks(PAIRS[loss], x, labels, [9, 5]), whole, strict=True):
        assert error(got, wanted) < EXACT
    assert sizes == 2 * [3, 3, 3, 1]


# ---- beside pytorch-metric-learning, whose 2.9.0 has no center loss


def beside(ours: EmbeddingLoss, theirs, seed: int = 3) -> None:
    """Loss and gradient to 1e-11; `theirs` takes x (n, D) and labels (n,)."""
    x, labels = batch(20, 5, seed)
    got = on_ranks(ours, x, labels, [12, 8])
    x.requires_grad_()
    value = theirs(x, labels)
    (gradient,) = torch.autograd.grad(value, x)
    assert value > 0.05
    assert error(got[0], value.detach()) < EXACT and error(got[1], gradient) < EXACT


@pytest.mark.parametrize("loss", [name for name in PAIRS if name.startswith("triplet")])
def test_triplets_equal_pytorch_metric_learning(loss):
    """BatchHardMiner and TripletMarginLoss with MeanReducer. Theirs by default: normalized embeddings, a margin of .05,
    and the mean over the triplets that are not satisfied, of which there are fewer here."""
    from pytorch_metric_learning import distances, losses, miners, reducers

    ours = PAIRS[loss]
    distance = distances.LpDistance(normalize_embeddings=ours.normalize, p=2, power=2 if ours.squared else 1)
    miner = miners.BatchHardMiner(distance=distance)
    soft = ours.margin == "soft"
    margin = 0.0 if soft else ours.margin
    options = dict(margin=margin, smooth_loss=soft, distance=distance)
    mean = losses.TripletMarginLoss(**options, reducer=reducers.MeanReducer())
    beside(ours, lambda x, labels: ours.weight * mean(x, labels, miner(x, labels)))
    if not soft:
        violated = losses.TripletMarginLoss(**options)
        x, labels = batch(20, 5, seed=3)
        triplets = miner(x, labels)
        share = (mean(x, labels, triplets) / violated(x, labels, triplets)).item()
        assert share in (pytest.approx(count / len(triplets[0])) for count in range(1, len(triplets[0])))


@pytest.mark.parametrize("loss", ["contrastive", "contrastive-normalized"])
def test_contrastive_equals_pytorch_metric_learning(loss):
    """Theirs is d + max(0, margin - d), not squared, the mean of nonzero terms; ours is made of its pairs' terms."""
    from pytorch_metric_learning import distances, losses, reducers

    ours = PAIRS[loss]
    distance = distances.LpDistance(normalize_embeddings=ours.normalize, p=2, power=1)
    terms = losses.ContrastiveLoss(neg_margin=ours.margin, distance=distance, reducer=reducers.DoNothingReducer())

    def theirs(x, labels):
        found = terms(x, labels)
        pull, push = found["pos_loss"]["losses"], found["neg_loss"]["losses"]
        assert 0 < (push == 0).sum() < len(push)
        return ours.weight / 2 * (pull.square().mean() + push.square().mean())

    beside(ours, theirs)


# ---- parameters


@pytest.mark.parametrize(
    "build, wanted",
    [
        (lambda: TripletLoss(margin=-1), 'TripletLoss: margin is -1; give a number of 0 or more, or "soft"'),
        (lambda: TripletLoss(margin="hard"), "margin is hard"),
        (lambda: TripletLoss(margin=math.nan), "margin is nan"),
        (lambda: TripletLoss(weight=0), "weight is 0; give a positive number"),
        (lambda: ContrastiveLoss(margin=0), "ContrastiveLoss: margin is 0; give a positive number"),
        (lambda: ContrastiveLoss(weight=math.inf), "weight is inf"),
        (lambda: CenterLoss(alpha=1.5), r"alpha is 1.5; give one in \[0, 1\], the paper's is 0.5"),
        (lambda: CenterLoss(weight=-1), "CenterLoss: weight is -1"),
        (lambda: build_embedding_loss("centre", {}), "head.embedding_losses.centre: no embedding loss .*mean center"),
        (lambda: build_embedding_loss("lda", {}), "'lda'; there are center, triplet, contrastive"),
        (lambda: build_embedding_loss("center", {"margin": 1}), "center.margin: center has no such .*weight, alpha"),
        (lambda: build_embedding_loss("triplet", {"margin": "hard"}), "triplet.margin: got 'hard'; .*number or soft"),
        (lambda: build_embedding_loss("triplet", {"normalize": 1}), "triplet.normalize: got 1; wanted true or false"),
        (lambda: build_embedding_loss("contrastive", {"margin": None}), "margin: got None; wanted a number"),
        (lambda: build_embedding_loss("contrastive", {"margin": True}), "margin: got True; wanted a number"),
    ],
)
def test_errors_name_the_parameter_and_what_is_wanted(build, wanted):
    with pytest.raises(ValueError, match=wanted):
        build()


def test_built_by_name():
    assert all(build_embedding_loss(name, {}) == loss() for name, loss in BY_NAME.items())
    assert build_embedding_loss("triplet", {"margin": "2e-1", "squared": True}) == TripletLoss(margin=0.2, squared=True)
    assert build_embedding_loss("triplet", {"margin": "soft"}) == TripletLoss()
    assert build_embedding_loss("center", {"weight": 3e-3, "alpha": 1}) == replace(CenterLoss(), alpha=1.0)
    assert CenterLoss() == CenterLoss(weight=0.003, alpha=0.5)
