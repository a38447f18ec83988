"""The partitioned head equals the dense one: losses, gradients, centers, for every margin at any number of ranks."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from partial_fc import ArcFace, CenterLoss, ContrastiveLoss, CosFace, Margin, PartialFC, TripletLoss
from partial_fc.head.exchange import gather_batch
from partial_fc.head.forward import _bounded
from partial_fc.parallel import distributed
from tests.conftest import run_ranks
from tests.dense import ALL_MARGINS, EXACT, MARGINS, Case, HeadLoss, assert_equals_dense, dense_logits, error
from tests.pairwise import pairwise

SIZES = {1: (6,), 2: (2, 5), 3: (3, 1, 2), 4: (1, 2, 2, 3)}


@pairwise("dense", margin=MARGINS, rate=[1.0, 0.1], world_size=[1, 2, 3, 4])
def test_equals_dense(margin, rate, world_size):
    """Uneven classes (23 over 2, 3, 4 ranks), uneven batches; at rate 0.1 against dense SGD over all rows."""
    assert_equals_dense(Case(margin, sample_rate=rate, sizes=SIZES[world_size], steps=6 if rate < 1 else 3))


@pytest.mark.slow
@pairwise(
    "dense",
    rate=[1.0, 0.3],
    margin=["softmax", "arcface"],
    changes=[
        dict(num_classes=2, sizes=(1, 2, 2, 3)),  # C < W: two ranks own nothing
        dict(num_classes=1, sizes=(2, 1)),  # no negatives at all
        dict(labels="one_rank"),
        dict(labels="duplicates"),
        dict(sizes=(5, 0, 2)),  # a rank without samples
        dict(num_classes=24, chunk=6, sizes=(3, 3, 3, 3)),  # everything divides
        dict(num_classes=24, chunk=1),
        dict(chunk=1000),
        dict(loss_scale=1024.0),
        dict(loss_factor=0.5, auxiliary=True),
        dict(forwards=2),
        dict(forwards=3, loss_scale=8.0, loss_factor=0.5, auxiliary=True),
    ],
)
def test_equals_dense_in_awkward_cases(changes, margin, rate):
    case = replace(Case(margin, sample_rate=rate, sizes=(3, 1, 2)), **changes)
    assert_equals_dense(case)


@pytest.mark.slow
def test_many_steps_of_catch_up_equal_dense():
    """40 updates at rate 0.1 with a changing learning rate: a catch-up applied twice is off by 35 % here."""
    assert_equals_dense(Case("cosface", num_classes=101, sample_rate=0.1, sizes=(4, 4), steps=40))


# ---- float32: at most twice the naive dense float32 computation's own error


def trained_inputs(dim: int, num_classes: int, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings whose cosines with their centers lie between .99 and .9999."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    noise = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    spread = torch.logspace(-2, -0.85, batch, dtype=torch.float64)[:, None]
    x = weight[labels] + spread * noise
    cosine = nn.functional.cosine_similarity(x, weight[labels])
    assert cosine.min() > 0.985 and cosine.max() > 0.9999
    return x, weight, labels


def set_centers(head: PartialFC, weight: Tensor) -> None:
    """Loads centers (C, D) the way a checkpoint does, the optimizer's state zero."""

    def read(name: str, out: Tensor) -> bool:
        out.copy_(weight.view(out.shape)) if name == "weight" else out.zero_()
        return name in head.centers.state()

    head.centers.load(read, torch.zeros(0, 3))


def dense_once(margin, x, weight, labels, dtype):
    x, weight = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (x, weight))
    bias = torch.zeros(len(weight), dtype=dtype)
    if isinstance(margin, ArcFace) and not (
        margin.reweights or margin.sub_centers > 1
    ):  # vectorized: the per-element formula would be measured instead
        cosine = nn.functional.normalize(x) @ nn.functional.normalize(weight).T
        target = cosine.gather(1, labels[:, None])
        shifted = torch.cos(torch.acos(target.clamp(-1, 1)) + margin.margin)
        logits = margin.scale * cosine.scatter(1, labels[:, None], shifted)  # the bias of "biased" is 0
    else:
        logits = dense_logits(margin, x, weight, bias, labels)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


@pairwise("float32", margin=MARGINS, inputs=["random", "trained"], chunk=[128, 2048])
def test_float32_is_as_good_as_naive_float32(margin, inputs, chunk):
    assert_as_good_as_naive(MARGINS[margin], inputs, chunk=chunk)


@pytest.mark.parametrize("inputs", ["random", "trained"])
@pytest.mark.parametrize("margin", MARGINS)
def test_float32_cache_is_as_good_as_naive_float32(margin, inputs):
    assert_as_good_as_naive(MARGINS[margin], inputs, cache_bytes=1 << 20)


def assert_as_good_as_naive(margin: Margin, inputs: str | list, **options) -> None:
    """The largest error, in the mean over five draws: of a single draw it is a matter of luck for both."""
    if isinstance(inputs, str):
        inputs = [drawn_inputs(inputs, seed) for seed in range(5)]
    errors = [float32_errors(margin, *some, **options) for some in inputs]
    ours, naive = (torch.tensor(some).mean(dim=0) for some in zip(*errors, strict=True))
    floor = 2e-7  # a few roundings: where the naive error is luckily smaller
    assert (ours <= 2 * naive.clamp_min(floor)).all(), (ours, naive)


def drawn_inputs(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    if kind == "trained":
        return trained_inputs(64, 1000, 48, seed)
    return extreme_inputs(kind, 48, 1000, 64, seed)


def float32_errors(margin, x: Tensor, weight: Tensor, labels: Tensor, **options) -> tuple[list[float], list[float]]:
    """Errors of loss, embedding gradient and centers' gradient against float64: ours and the naive computation's."""
    num_classes, dim = len(weight) // margin.sub_centers, weight.shape[1]
    labels = labels // margin.sub_centers
    x, weight = x.float().double(), weight.float().double()  # the same numbers for all three
    exact = dense_once(margin, x, weight, labels, torch.float64)
    naive = dense_once(margin, x, weight, labels, torch.float32)
    options = dict(chunk=128) | options
    head = PartialFC(num_classes, dim, margin, momentum=0.0, weight_decay=0.0, **options)
    set_centers(head, weight)
    embeddings = x.float().detach().requires_grad_()
    loss = head(embeddings, labels)
    loss.backward()
    before = head.full_weight().clone()
    lr = 2.0**20  # so large that the update's own rounding does not hide the gradient's
    head.step(lr)
    ours = (loss.detach(), embeddings.grad, (before.double() - head.full_weight().double()) / lr)
    return tuple(
        [error(got.double(), wanted) for got, wanted in zip(some, exact, strict=True)] for some in (ours, naive)
    )


def extreme_inputs(kind: str, batch: int, num_classes: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (num_classes, batch))
    labels = torch.randint(num_classes, (batch,), generator=generator)
    if kind == "collapsed":  # all cosines near 1
        weight, x = 1 + 0.01 * weight, 1 + 0.01 * x
    elif kind == "opposite":  # all near -1
        weight, x = 1 + 0.01 * weight, -1 + 0.01 * x
    elif kind.startswith("short"):  # half of the centers
        weight[::2] *= float(kind.split()[1]) / weight[::2].norm(dim=1, keepdim=True)
    return x, weight, labels


@pairwise(
    "float32",
    kind=["collapsed", "opposite", "short 1e-4", "short 1e-8"],
    scale=[64.0, 68.0, 70.0, 80.0],  # the first two are bounded, the others not
    cache_bytes=[0, 1 << 20],
)
def test_float32_at_the_ends_of_its_range(kind, scale, cache_bytes):
    margin = CosFace(scale=scale, margin=0.35)
    assert _bounded(PartialFC(1000, 64, margin)) == (scale <= 68)
    inputs = [extreme_inputs(kind, 48, 1000, 64, seed) for seed in range(5)]
    assert_as_good_as_naive(margin, inputs, cache_bytes=cache_bytes)


def test_all_ranks_round_log_z_alike_and_undo_it():
    """log2 Z = 92 in float32 is off by up to 4e-6, for all classes of a sample alike: 2.6e-6 of its whole gradient."""
    shifts = []
    for seed in range(8):
        x, weight, labels = extreme_inputs("collapsed", 1, 2000, 64, seed)
        gradients = []
        for dtype in (torch.float32, torch.float64):
            options = dict(momentum=0.0, weight_decay=0.0, dtype=dtype)
            head = PartialFC(2000, 64, CosFace(scale=64.0, margin=0.35), **options)
            set_centers(head, weight)
            head(x.to(dtype), labels).backward()
            head.step(2.0**20)
            moved = (weight.to(dtype).double() - head.full_weight().double()) / 2.0**20
            gradients.append(moved[torch.arange(2000) != labels])
        ours, exact = gradients
        shifts.append(abs(float((ours * exact).sum() / (exact * exact).sum()) - 1))
    assert sum(shifts) / len(shifts) < 9e-7


def test_small_losses_keep_their_digits():
    """log Z - t has lost 8 % of a loss of 1e-5; logaddexp(0, log Z_neg - t) keeps it."""
    head = PartialFC(100, 64, CosFace(scale=32.0, margin=0.1), dtype=torch.float32)
    exact = PartialFC(100, 64, CosFace(scale=32.0, margin=0.1), dtype=torch.float64)
    weight = exact.full_weight().clone()
    x = nn.functional.normalize(weight[:4])
    with torch.no_grad():
        small, wanted = head(x.float(), torch.arange(4)), exact(x, torch.arange(4))
    assert 1e-9 < wanted < 1e-4
    assert abs(small - wanted) / wanted < 2e-5


# ---- the contract of a step


def test_centers_wait_for_step():
    head = PartialFC(10, 4)
    before = head.full_weight().clone()
    embeddings = torch.randn(3, 4, requires_grad=True)
    head(embeddings, torch.tensor([0, 3, 9])).backward()
    assert embeddings.grad.abs().sum() > 0
    assert torch.equal(head.full_weight(), before)
    head.step(0.1)
    assert not torch.equal(head.full_weight(), before)


def test_frozen_embeddings_still_train_the_centers():
    head = PartialFC(10, 4)
    before = head.full_weight().clone()
    head(torch.randn(3, 4), torch.tensor([0, 3, 9])).backward()
    head.step(0.1)
    assert not torch.equal(head.full_weight(), before)


def test_evaluation_leaves_no_trace():
    head = PartialFC(50, 4, sample_rate=0.3)
    embeddings, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, 9])
    loss = head(embeddings, labels)
    with torch.no_grad():
        other = head(torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4]))
    assert other.grad_fn is None
    loss.backward()
    head.step(0.1)
    alone = PartialFC(50, 4, sample_rate=0.3)
    alone(embeddings.detach().requires_grad_(), labels).backward()
    alone.step(0.1)
    assert torch.equal(head.full_weight(), alone.full_weight())


def accumulated(parts: int, rate: float, margin: str, optimizer: str) -> tuple:
    """Three steps on the same 12 samples, in `parts` micro-batches; through DDP where there are several ranks."""
    rank, world_size = distributed.rank(), distributed.world_size()
    options = dict(dtype=torch.float64, init_std=0.5, weight_decay=5e-3, chunk=4, optimizer=optimizer)
    head = PartialFC(23, 5, MARGINS[margin], rate, **options)
    torch.manual_seed(0)
    backbone = nn.Linear(7, 5, dtype=torch.float64)
    model = nn.parallel.DistributedDataParallel(backbone) if world_size > 1 else backbone
    losses, gradients = [], []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(12, 7, generator=generator, dtype=torch.float64)
        labels = torch.randint(23, (12,), generator=generator)
        head.begin_step(step, labels)
        backbone.zero_grad()
        total = 0.0
        for number, (some, their) in enumerate(zip(inputs.chunk(parts), labels.chunk(parts), strict=True)):
            mine = distributed.part(len(some), rank, world_size)
            mine = slice(mine.start, mine.stop)
            last = number == parts - 1
            with nullcontext() if last or world_size == 1 else model.no_sync():
                loss = head(model(some[mine]), their[mine]) / parts
                loss.backward()
            total += loss.item()
        head.step(0.1)
        losses.append(total)
        gradients.append(backbone.weight.grad.clone())
    return torch.tensor(losses), torch.stack(gradients), head.full_weight()


@pairwise(
    "dense",
    margin_and_rate=[("arcface", 1.0), ("cosface-s200", 0.3), ("softmax", 0.3)],
    optimizer=["sgd", "adamw"],
    world_size=[1, 2, 3],
)
def test_micro_batches_equal_one_batch(margin_and_rate, optimizer, world_size):
    """Four micro-batches of 3 samples and one batch of 12, at W ranks: three samples do not fit two ranks evenly."""
    margin, rate = margin_and_rate
    (wanted,) = run_ranks(accumulated, 1, 1, rate, margin, optimizer)
    for got in run_ranks(accumulated, world_size, 4, rate, margin, optimizer):
        assert all(error(ours, theirs) < EXACT for ours, theirs in zip(got, wanted, strict=True))


def test_skipped_step_did_not_happen():
    one, other = PartialFC(50, 4, sample_rate=0.3), PartialFC(50, 4, sample_rate=0.3)
    x, labels = torch.randn(3, 4), torch.tensor([0, 3, 9])
    for head, skips in ((one, False), (other, True)):
        for step in (0, 1, 2):
            head.begin_step(step, labels)
            loss = head(x.clone().requires_grad_(), labels)
            if step == 1 and skips:
                head.skip_step()
            elif step != 1:
                loss.backward()
                head.step(0.1)
            else:
                head.skip_step()
    assert torch.equal(one.full_weight(), other.full_weight())
    assert one.centers.missed.updates == 2


def test_errors_name_what_to_do():
    head = PartialFC(10, 4)
    x, labels = torch.randn(2, 4, requires_grad=True), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="step without a training forward"):
        head.step(0.1)
    loss = head(x, labels)
    with pytest.raises(RuntimeError, match="1 of 1 forwards had no backward"):
        head.step(0.1)
    with pytest.raises(RuntimeError, match=r"second training forward before step.*begin_step"):
        head(x, labels)
    with pytest.raises(RuntimeError, match="begin_step while a forward waits"):
        head.begin_step(1, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward of the same"):
        loss.backward()
    head = PartialFC(10, 4)
    with pytest.raises(ValueError, match=r"embeddings are \(2, 3\); wanted \(b, 4\)"):
        head(torch.randn(2, 3), labels)
    with pytest.raises(ValueError, match=r"labels are torch.float32 \(2,\); wanted int64"):
        head(torch.randn(2, 4), labels.float())
    with pytest.raises(ValueError, match="this rank has 2 rows, more than padded_size 1"):
        head(torch.randn(2, 4), labels, padded_size=1)
    for arguments, message in [
        (dict(num_classes=0, embedding_dim=4), "both must be positive"),
        (dict(num_classes=4, embedding_dim=4, sample_rate=0.0), "sample_rate is 0.0"),
        (dict(num_classes=4, embedding_dim=4, sample_rate=1.5), "sample_rate is 1.5"),
        (dict(num_classes=4, embedding_dim=4, dtype=torch.float16), "dtype is torch.float16"),
        (dict(num_classes=4, embedding_dim=4, chunk=0), "chunk is 0"),
        (dict(num_classes=4, embedding_dim=4, init_std=float("nan")), "init_std is nan"),
        (dict(num_classes=4, embedding_dim=4, sampler="random"), "sampler is 'random'; give f"),
        (dict(num_classes=4, embedding_dim=4, compile="no"), "compile is 'no'; give True, False, or None"),
        (dict(num_classes=4, embedding_dim=4, weight_decay=float("nan")), "momentum and weight_decay are 0.9 and nan"),
        (dict(num_classes=4, embedding_dim=4, margin="cosface"), "margin is 'cosface'; give an object"),
        (dict(num_classes=4, embedding_dim=4, momentum=3), "momentum and weight_decay are 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            PartialFC(**arguments)


def unknown_label() -> float:
    head = PartialFC(1000, 4, sample_rate=0.01, check_labels=False)
    head.begin_step(0, torch.tensor([1, 2, 3]))
    labels = torch.tensor([1, 999 if distributed.rank() == 1 else 2])
    loss = head(torch.randn(2, 4), labels)
    loss.backward()
    head.step(0.1)
    return loss.item()


@pytest.mark.slow
def test_an_unchecked_label_that_begin_step_was_not_given_hangs_nobody():
    """check_labels=False says that the loss is wrong then; it is wrong everywhere alike."""
    losses = run_ranks(unknown_label, 2)
    assert losses[0] == losses[1]


def test_begin_step_must_know_every_label():
    head = PartialFC(1000, 4, sample_rate=0.01)
    head.begin_step(0, torch.tensor([1, 2, 3]))
    with pytest.raises(
        ValueError, match="label 500 of rank 0, row 1 is not among the labels that begin_step was given"
    ):
        head(torch.randn(2, 4), torch.tensor([1, 500]))
    with torch.no_grad():  # an evaluation in between has rows of its own
        assert head(torch.randn(2, 4), torch.tensor([1, 500])).isfinite()


ON_CUDA = {
    "plain": {},
    "adamw": dict(optimizer="adamw"),
    "cached": dict(cache_bytes=1 << 20, cache_dtype=torch.float64),
    "compiled": dict(compile=True),
    "dropout": dict(dropout=0.5),
    "embedding losses": dict(embedding_losses=[TripletLoss(), ContrastiveLoss(margin=3.0), CenterLoss(weight=0.5)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("options", ON_CUDA)
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("margin", ALL_MARGINS)
def test_cuda_equals_cpu(margin, rate, options):
    same = dict(dtype=torch.float64, chunk=16, init_std=0.5, **ON_CUDA[options])
    cpu = PartialFC(101, 8, ALL_MARGINS[margin], rate, device="cpu", **{**same, "compile": False})
    cuda = PartialFC(101, 8, ALL_MARGINS[margin], rate, device="cuda", **same)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(101, (12,), generator=generator)
        results = []
        for head in (cuda, cpu):
            embeddings = x.to(head.device).requires_grad_()
            loss = head(embeddings, labels.to(head.device))
            loss.backward()
            head.step(0.1)
            results.append((loss.detach().cpu(), embeddings.grad.cpu(), head.full_weight().cpu()))
        for got, wanted in zip(*results, strict=True):
            assert error(got, wanted) < EXACT


def train_on_cuda(pause: bool) -> Tensor:
    """Ten steps behind a slow backbone; `pause`: the device is idle before and after every update."""
    torch.manual_seed(0)
    backbone = nn.Sequential(*[nn.Linear(512, 512, dtype=torch.float64) for _ in range(8)]).cuda()
    head = PartialFC(4000, 512, CosFace(), 0.5, dtype=torch.float64, chunk=512, device="cuda")
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 512, generator=generator, dtype=torch.float64).cuda()
        labels = torch.randint(4000, (64,), generator=generator)
        head.begin_step(step, labels)
        head(backbone(x), labels.cuda(), padded_size=64).backward()
        if pause:
            torch.cuda.synchronize()
        head.step(0.1)
        if pause:
            torch.cuda.synchronize()
    return head.full_weight().cpu()


@pytest.mark.gpu
def test_the_update_waits_for_who_reads_the_centers():
    """Backward, evaluation, step: the evaluation must not see the update."""
    results = []
    for pause in (True, False):
        torch.manual_seed(0)
        head = PartialFC(200_000, 256, CosFace(), device="cuda")
        labels = torch.arange(64, device="cuda")
        head(torch.randn(64, 256, device="cuda"), labels).backward()
        with torch.no_grad():
            seen = head(torch.ones(64, 256, device="cuda"), labels)
        weight = head.full_weight()
        if pause:
            torch.cuda.synchronize()
        head.step(10.0)
        results.append((seen.cpu(), weight.cpu()))
    assert all(map(torch.equal, *results))


def test_what_an_update_beside_the_backward_reads_stays_alive():
    """Statistics, too: on CUDA the memory of a learned scale was given away while the update still read it."""
    head = PartialFC(50, 4, CosFace(scale=8, learn_scale=True))
    held = []
    run = head._side_stream.run
    head._side_stream.run = lambda after, keep: (held.extend(keep), run(after, keep))[1]
    head(torch.randn(6, 4, requires_grad=True), torch.arange(6)).backward()
    forwards, statistics = head._forwards, head.statistics
    head.step(0.1)
    assert any(one is forwards for one in held) and any(one is statistics for one in held)
    assert head.statistics is not statistics


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_host_does_not_wait_in_a_step(rate):
    head = PartialFC(4000, 64, CosFace(), rate, device="cuda", check_labels=False)
    labels = torch.arange(32)
    for step in range(4):
        embeddings = torch.randn(32, 64, device="cuda", requires_grad=True)
        on_device = labels.cuda()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            head.begin_step(step, labels)
            head(embeddings, on_device, padded_size=32).backward()
            head.step(0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_update_beside_the_backward_reads_and_writes_in_order():
    """On its own stream it must not see memory that was given away, nor the next step see it half done."""
    wanted = train_on_cuda(pause=True)
    for _ in range(3):
        assert error(train_on_cuda(pause=False), wanted) < EXACT


def wrong_label(label: int) -> str:
    head = PartialFC(10, 4)
    labels = torch.tensor([1, label if distributed.rank() == 1 else 2])
    try:
        head(torch.randn(2, 4), labels)
    except ValueError as caught:
        return str(caught)
    return "no error"


def built_too_early() -> str:
    head = PartialFC(10, 4)
    head.world_size = 1  # what it would be without a process group
    try:
        head(torch.randn(2, 4), torch.tensor([1, 2]))
    except RuntimeError as caught:
        return str(caught)
    return "no error"


@pytest.mark.slow
def test_a_head_that_was_built_before_the_group_is_an_error():
    wanted = "this head was built for 1 ranks, now there are 2: build it after torch.distributed.init_process_group"
    assert run_ranks(built_too_early, 2) == [wanted] * 2


def wrong_dtype() -> str:
    labels = torch.tensor([1, 2], dtype=torch.int32 if distributed.rank() == 1 else torch.int64)
    try:
        PartialFC(10, 4)(torch.randn(2, 4), labels)
    except ValueError as caught:
        return str(caught)
    return "no error"


@pytest.mark.slow
def test_a_wrong_call_on_one_rank_stops_all_ranks():
    messages = run_ranks(wrong_dtype, 3)
    assert "labels are torch.int32 (2,); wanted int64" in messages[1]
    assert messages[0] == messages[2] == "the head was called wrongly on rank 1; its own error says how"


@pytest.mark.slow
@pytest.mark.parametrize("label", [10, -1, 2**40])
def test_label_out_of_range_stops_all_ranks_with_one_message(label):
    messages = run_ranks(wrong_label, 3, label)
    assert len(set(messages)) == 1
    assert f"label {label} of rank 1, row 1 is out of range: this head has 10 classes" in messages[0]


def test_the_smallest_label_is_no_padding_and_a_class_id_has_31_bits():
    head = PartialFC(10, 4)
    with pytest.raises(ValueError, match="of rank 0, row 1 is out of range: this head has 10 classes"):
        head(torch.randn(2, 4), torch.tensor([3, torch.iinfo(torch.int64).min]))
    with pytest.raises(ValueError, match="num_classes is 2147483648; a class id has 31 bits here: give 2147483647"):
        PartialFC(2**31, 4)


def test_large_labels_travel_exactly():
    """As float32 values labels are exact only to 2^24; they travel as bit patterns."""
    labels = torch.tensor([2**24 + 1, 2**25 + 3])
    x = torch.randn(2, 4)
    for dtype in (torch.float32, torch.float64):
        embeddings, gathered = gather_batch(x, labels, 3, dtype, torch.device("cpu"))
        assert torch.equal(gathered[:2], labels) and torch.equal(embeddings[:2], x.to(dtype))


def test_gradcheck_through_the_head():
    """Numerical derivatives of the loss by the embeddings, through forward and backward as a user runs them."""

    labels = torch.tensor([0, 5, 5, 11])
    for margin in MARGINS.values():
        head = PartialFC(12, 3, margin, dtype=torch.float64, init_std=1.0, chunk=5)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, head=head: HeadLoss.apply(x, head, labels), (x,))


def peak_case(margin: Margin, rate: float, forwards: int, **options) -> tuple[int, int]:
    """Peak of live tensor bytes in a step beyond the state; bytes of one state tensor."""
    num_classes, dim, batch, chunk = 40_000, 64, 128, 512
    head = PartialFC(num_classes, dim, margin, rate, chunk=chunk, **options)
    labels = torch.arange(batch)

    def step(number: int):
        head.begin_step(number, labels)
        for _ in range(forwards):
            head(torch.randn(batch, dim, requires_grad=True), labels).backward()
        head.step(0.1)

    for number in range(3):
        step(number)
    kept = sum(flat.nbytes for flat in (*head._buffers._flat.values(), head._cache._flat))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(3)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + kept, num_classes * dim * 4


@pairwise(
    "dense",
    margin=["softmax", "cosface", "cosface-unnormalized", "arcface"],
    bound_at_rate=[(0.25, 1.0), (0.3, 0.1)],  # rows in use are caught up chunk by chunk, twice
    forwards=[1, 2],
)
def test_memory_of_a_step_does_not_grow_with_the_classes(margin, bound_at_rate, forwards):
    """Neither a (B, U) nor a (C_r, D) tensor: 20 MB and 10 MB here, against about 1 MB of chunks and (B, D) vectors."""
    bound, rate = bound_at_rate
    peak, state = peak_case(MARGINS[margin], rate, forwards)
    assert 0 < peak < bound * state


@pytest.mark.parametrize("options", [dict(optimizer="adamw"), dict(matmul_precision="bfloat16")], ids=str)
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_memory_with_options_does_not_grow_with_the_classes(options, rate):
    peak, state = peak_case(MARGINS["arcface"], rate, 1, **options)
    assert 0 < peak < 0.3 * state


def test_memory_with_a_cache_stays_within_its_budget():
    margin, budget = MARGINS["arcface"], 5_000_000  # of 20 MB for everything
    without, _ = peak_case(margin, 1.0, 1)
    peak, _ = peak_case(margin, 1.0, 1, cache_bytes=budget)
    assert 0.9 * budget < peak - without < budget + 300_000  # and one transposed chunk
