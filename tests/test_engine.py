"""The data-parallel engine: precision, accumulation, clipping, and what may change speed or memory but no result."""

import copy

import pytest
import torch
from torch import Tensor, nn

from partial_fc import CosFace, NormSoftmax, PartialFC, backbone
from partial_fc.backbone.net import EmbeddingNet
from partial_fc.config import Engine, Optim
from partial_fc.optim import build_optimizer
from partial_fc.parallel import distributed, precision
from partial_fc.parallel.engine import DDPEngine
from partial_fc.parallel.precision import LossScale
from tests.conftest import run_ranks

CPU = torch.device("cpu")
SIZE = (32, 32)
SMALL = (16, 16)  # for float16: a CPU has no units for it, and a backward of smallnet is 0.1 s a sample at 32


def engine_of(
    name: str = "smallnet",
    optim: Optim | None = None,
    device: torch.device = CPU,
    size: tuple[int, int] = SIZE,
    dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    clip: float | None = None,
    **settings,
) -> DDPEngine:
    net = backbone.build_seeded(name, 8, size, seed=0).to(device, dtype).train()
    optimizer = build_optimizer(net, optim or Optim())
    engine = DDPEngine(net, optimizer, device, Engine(**settings), accumulate=accumulate, clip=clip)
    engine.warm_up(torch.zeros(2, 3, *size, device=device, dtype=dtype))
    return engine


def images(count: int, seed: int = 0, size=SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def objective(embeddings: torch.Tensor) -> torch.Tensor:
    direction = torch.linspace(-1, 1, embeddings.shape[1], device=embeddings.device)
    return ((nn.functional.normalize(embeddings) * direction).sum(dim=1) - 0.3).square().mean()


def train(
    engine: DDPEngine,
    steps: int = 3,
    device: torch.device = CPU,
    size=SIZE,
    dtype: torch.dtype = torch.float32,
    count: int = 6,
) -> list[float]:
    losses = []
    for step in range(steps):
        loss = objective(engine(images(count, step, size).to(device, dtype)))
        engine.backward(loss)
        if engine.finite():
            engine.clip()
            engine.step(0.05)
        else:
            engine.skip()
        losses.append(loss.item())
    return losses


def difference(a: DDPEngine, b: DDPEngine) -> float:
    """The largest over the parameters, relative to the largest entry of each."""
    pairs = zip(a.backbone.state_dict().values(), b.backbone.state_dict().values(), strict=True)
    return max(
        ((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-12)).item() for x, y in pairs
    )


# ---- precision


@pytest.mark.parametrize("kind, tolerance", [("bf16", 0.15), ("fp16", 0.08)])
def test_sixteen_bits_follow_float32(kind, tolerance):
    """Products are in 16 bits, parameters, gradients and embeddings in float32.

    PReLU's kink, which rounding sends some activations across, makes most of the gradients' difference.
    """
    wanted, engine = engine_of(), engine_of(precision=kind)
    seen = []
    convolution = next(m for m in engine.backbone.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_hook(lambda module, _, out: seen.append(out.dtype))
    embeddings, exact = engine(images(6)), wanted(images(6))
    assert set(seen) == {precision.AUTOCAST[kind]} and embeddings.dtype == torch.float32
    engine.backward(objective(embeddings))
    wanted.backward(objective(exact))
    assert engine.finite()
    pairs = [(embeddings, exact)]
    for ours, theirs in zip(engine.backbone.parameters(), wanted.backbone.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        pairs.append((ours.grad, theirs.grad))
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    print(f"{kind}: embeddings {errors[0]:.1e}, gradients up to {max(errors[1:]):.1e} off")
    assert 1e-5 < max(errors) < tolerance


def test_float32_products_are_what_is_asked_for():
    """The backend's setting inside forward and backward, and after them as it was."""
    before = torch.backends.cudnn.conv.fp32_precision
    for kind, wanted in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        with precision.products(kind):
            assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == wanted
        assert torch.backends.cudnn.conv.fp32_precision == before


def test_what_a_cpu_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="engine.precision tf32 is something that CUDA devices do.* on cpu: give fp32"):
        engine_of(precision="tf32")
    with pytest.raises(
        ValueError, match="engine.sync_batchnorm is for CUDA devices.* give engine.sync_batchnorm=false"
    ):
        engine_of(sync_batchnorm=True)


def test_the_loss_scale_is_gradscalers(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    ours = LossScale(1024.0)
    for finite in [True] * 4 + [False, True, True, False, False] + [True] * 7:
        theirs.scale(parameter.sum() * (1.0 if finite else torch.inf)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(finite)
        assert ours.value == theirs.get_scale() and ours.finite_steps == theirs.state_dict()["_growth_tracker"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [1024.0, 2.0**40])
def test_float16_is_torchs_autocast_and_gradscaler(start):
    """Bit for bit, from a scale that fits and from one that overflows, clipped too."""
    build = engine_of if start == 1024 else tiny_engine  # of 26 steps
    engine = build(precision="fp16", loss_scale=start, clip=0.1)
    assert engine.loss_scale.value == start  # the warm-up is no step
    net = copy.deepcopy(engine.backbone)
    optimizer = build_optimizer(net, Optim())
    optimizer.param_groups[0]["lr"] = 0.05
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    steps = 3 if start == 1024 else 26
    losses = []
    for step in range(steps):
        with torch.autocast("cpu", torch.float16):
            embeddings = net(images(2, step))
        loss = objective(embeddings)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert train(engine, steps, count=2) == losses
    assert engine.loss_scale.value == scaler.get_scale() and (start == 1024 or scaler.get_scale() < start / 2**9)
    for ours, theirs in zip(engine.backbone.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def overflow_on(broken: int) -> tuple[bool, float, bool, bool]:
    engine = tiny_engine(precision="fp16", loss_scale=64.0)
    before = [p.clone() for p in engine.backbone.parameters()]
    engine.backward(objective(engine(images(4, distributed.rank()))))
    if distributed.rank() == broken:  # after the ranks' gradients were joined: this rank alone sees it
        next(engine.backbone.parameters()).grad[0] = torch.inf
    finite = engine.finite()
    engine.step(0.1) if finite else engine.skip()
    moved = any(not torch.equal(p, b) for p, b in zip(engine.backbone.parameters(), before, strict=True))
    return finite, engine.loss_scale.value, moved, any(p.grad.any() for p in engine.backbone.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1, 2, None])
def test_all_ranks_agree_on_an_overflow(broken):
    answers = run_ranks(overflow_on, 3, broken)
    assert answers == [(True, 64.0, True, False) if broken is None else (False, 32.0, False, False)] * 3


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def warm_up_unused() -> str:
    net = Unused()
    try:
        DDPEngine(net, build_optimizer(net, Optim()), CPU).warm_up(torch.zeros(2, 3))
    except distributed.RunError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_without_a_gradient_are_an_error(world_size):
    wanted = "no embedding depends on 2 of the backbone's parameters, idle.weight the first of them"
    assert all(wanted in message for message in run_ranks(warm_up_unused, world_size))


# ---- accumulation and clipping


def accumulated(pieces: int) -> tuple[list[torch.Tensor], int]:
    """Parameters after two steps of 12 samples, in `pieces`; how often the ranks joined their gradients in a step."""
    engine = engine_of(accumulate=pieces)
    joins = []
    if distributed.world_size() > 1:
        engine.model.register_comm_hook(None, counted(joins))
        engine.warm_up(torch.zeros(2, 3, *SIZE))
        joins.clear()
    for step in range(2):
        mine = distributed.part(12, distributed.rank(), distributed.world_size())
        for cut in images(12, step)[mine.start : mine.stop].chunk(pieces):
            engine.backward(objective(engine(cut)) * len(cut) / len(mine))
        engine.step(0.05)
    return [p.detach().clone() for p in engine.backbone.parameters()], len(joins)


def counted(joins: list):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(state, bucket):
        joins.append(bucket.index())
        return allreduce_hook(state, bucket)

    return hook


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_equal_one_batch_and_join_once(world_size):
    whole, joins = run_ranks(accumulated, world_size, 1)[0]
    parts, joins_of_parts = run_ranks(accumulated, world_size, 2)[0]
    assert joins_of_parts == joins and (joins > 0) == (world_size > 1)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_arcface_torchs_gradient_acc(name):
    """docs/arcface_torch.md: it adds up the gradients of A micro-batches, the mean is taken here. Head and backbone."""
    pieces, lr, decay, eps, largest, steps = 4, 0.3, 0.02, 1e-3, 2.0, 5
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, pieces, 6, 10, generator=random, dtype=torch.float64)
    labels = torch.randint(9, (steps, pieces, 6), generator=random)

    def ours(**mapped: float) -> tuple[Tensor, Tensor, list[bool]]:
        values = dict(lr=lr, weight_decay=decay, eps=eps, clip=largest) | mapped
        optim = Optim(name=name, weight_decay=values["weight_decay"], eps=values["eps"])
        net, head = start_of_both(name, values["weight_decay"], values["eps"])
        engine = DDPEngine(net, build_optimizer(net, optim), CPU, accumulate=pieces, clip=values["clip"])
        clipped = []
        for step in range(steps):
            head.begin_step(step, labels[step].flatten())
            for piece in range(pieces):
                engine.backward(head(engine(inputs[step, piece]), labels[step, piece]) / pieces)
            engine.clip()
            clipped.append(engine.gradient_norm.item() > values["clip"])
            head.step(values["lr"])
            engine.step(values["lr"])
        return net.weight.detach(), head.full_weight(), clipped

    net, head = start_of_both(name, decay, eps)
    centers = nn.Parameter(head.full_weight())
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    own = {"sgd": {"momentum": 0.9}, "adamw": {"eps": eps}}[name]
    optimizer = kind([*net.parameters(), centers], lr=lr, weight_decay=decay, **own)
    for step in range(steps):  # as arcface_torch/train_v2.py does: nothing divides by the number of micro-batches
        for piece in range(pieces):
            cosine = nn.functional.normalize(net(inputs[step, piece])) @ nn.functional.normalize(centers).T
            nn.functional.cross_entropy(8 * cosine, labels[step, piece]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad()

    mapping = {"clip": largest / pieces}
    mapping |= {"lr": lr * pieces, "weight_decay": decay / pieces} if name == "sgd" else {"eps": eps / pieces}
    weight, rows, clipped = ours(**mapping)
    assert any(clipped)
    torch.testing.assert_close(weight, net.weight.detach(), rtol=1e-5, atol=1e-7)  # clip_grad_norm_ adds 1e-6 to a norm
    torch.testing.assert_close(rows, centers.detach(), rtol=1e-5, atol=1e-7)
    for left_out in mapping:  # each of them is needed
        weight, rows, _ = ours(**{key: value for key, value in mapping.items() if key != left_out})
        assert max((weight - net.weight).abs().max(), (rows - centers).abs().max()) > 1e-3, left_out


def start_of_both(name: str, decay: float, eps: float) -> tuple[nn.Linear, PartialFC]:
    torch.manual_seed(0)
    net = nn.Linear(10, 5, bias=False, dtype=torch.float64)
    head = PartialFC(
        9, 5, NormSoftmax(scale=8.0), optimizer=name, weight_decay=decay, eps=eps, init_std=0.3, dtype=torch.float64
    )
    return net, head


def test_a_step_wants_all_its_micro_batches():
    engine = engine_of(accumulate=3)
    engine.backward(objective(engine(images(4))))
    with pytest.raises(RuntimeError, match="step after 1 of 3 micro-batches"):
        engine.step(0.1)
    engine.skip()
    assert not any(p.grad.any() for p in engine.backbone.parameters())


@pytest.mark.parametrize("largest", [0.01, 1e6])
def test_clipping_is_torchs(largest):
    clipped, plain = engine_of(clip=largest), engine_of()
    for engine in (clipped, plain):
        engine.backward(objective(engine(images(6))))
    norm = nn.utils.clip_grad_norm_(plain.backbone.parameters(), largest)
    assert clipped.clip() == 1.0 and torch.equal(clipped.gradient_norm, norm) and (norm > largest) == (largest < 1)
    for one, other in zip(clipped.backbone.parameters(), plain.backbone.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert clipped.changing() == {"gradient_norm": norm.item()}
    free = engine_of()
    free.backward(objective(free(images(6))))
    assert free.clip() == 1.0 and free.changing() == {"gradient_norm": norm.item()}  # noted, and left as it is


# ---- what changes speed or memory, and no result


def tiny_engine(clip: float | None = None, batch_sizes: tuple[int, ...] = (), **settings) -> DDPEngine:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, 16, padding=1), nn.BatchNorm2d(4), nn.PReLU(4))
    net = EmbeddingNet(features, 4, 8, SIZE)
    optimizer = build_optimizer(net, Optim())
    engine = DDPEngine(net, optimizer, CPU, Engine(**settings), clip=clip, batch_sizes=batch_sizes)
    engine.warm_up(torch.zeros(6, 3, *SIZE))
    return engine


def test_an_optimizer_that_checkpoints_do_not_know_is_an_error():
    net = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="the optimizer is a Adam; wanted torch.optim.SGD or AdamW"):
        DDPEngine(net, torch.optim.Adam(net.parameters()), CPU)


@pytest.mark.slow
def test_a_compiled_backbone_is_one_graph_and_gives_the_same():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, plain = tiny_engine(compile=True, batch_sizes=(6,)), tiny_engine()
    assert train(compiled) == pytest.approx(train(plain), rel=1e-4)
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] == 1 and not stats["graph_break"], stats
    assert difference(compiled, plain) < 1e-3
    assert list(compiled.state()["backbone"]) == list(plain.state()["backbone"])

    # damaged samples, two and all: no graph more. Batch norm sees the two that are left three times each
    for left, filled in ((2, images(2).repeat(3, 1, 1, 1)), (0, images(0))):
        embeddings, wanted = compiled(images(left)), plain(filled)[:left]
        torch.testing.assert_close(embeddings, wanted, rtol=1e-3, atol=1e-4)
        for engine, out in ((compiled, embeddings), (plain, wanted)):
            engine.backward(objective(out) if left else out.sum())
        pairs = zip(compiled.backbone.parameters(), plain.backbone.parameters(), strict=True)
        assert all(torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-4) for one, other in pairs)
        assert not left or max(p.grad.abs().max() for p in plain.backbone.parameters()) > 1e-2
        compiled.step(0.1), plain.step(0.1)
    assert stats["stats"]["unique_graphs"] == 1, stats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smallnet", "iresnet18"])
def test_channels_last_is_another_order_in_memory_and_the_same_result(name):
    other, plain = (engine_of(name, channels_last=on, dtype=torch.float64) for on in (True, False))
    formats = []
    for module in other.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, out: formats.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                    and out.is_contiguous(memory_format=torch.channels_last)
                )
            )
    found, wanted = (train(engine, 2, dtype=torch.float64, count=2) for engine in (other, plain))
    assert found == pytest.approx(wanted, rel=1e-10)
    assert len(formats) > 3 and all(formats)
    for name, value in other.backbone.state_dict().items():
        torch.testing.assert_close(value, plain.backbone.state_dict()[name], rtol=1e-8, atol=1e-9)


class Kept:
    """Bytes of distinct tensors that autograd keeps of a forward, parameters left out."""

    def __init__(self, parameters):
        self.seen, self.own = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, or its place would be used again
        return tensor

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.seen.values())


CHECKPOINTED = ["smallnet", "spherenet20", "iresnet18", "mobilefacenet", "timm/test_vit", "timm/resnet10t"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_activations_take_less_memory_and_give_the_same(name):
    """Bit for bit, running statistics of batch norms too, though recomputing moves them again."""
    less, plain = (engine_of(name, checkpoint_activations=on, size=(64, 64)) for on in (True, False))
    sizes = []
    for engine in (less, plain):
        kept = Kept(engine.backbone.parameters())
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            engine.backward(objective(engine(images(2, size=(64, 64)))))
        engine.skip()
        sizes.append(kept.bytes)
    print(f"{name}: kept {sizes[0]:,} bytes instead of {sizes[1]:,}")
    assert sizes[0] < 0.8 * sizes[1]
    found, wanted = (train(engine, 2, size=(64, 64), count=2) for engine in (less, plain))
    assert found == wanted
    states = [engine.backbone.state_dict() for engine in (less, plain)]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_model_without_checkpointing_is_an_error():
    with pytest.raises(distributed.RunError, match="engine.checkpoint_activations: this backbone cannot"):
        engine_of("timm/dla34", checkpoint_activations=True, size=(64, 64))


def test_the_average_is_the_formula_and_leaves_training_alone():
    """Of a net with batch norm: running statistics, and a count that is no average."""
    averaged, plain = tiny_engine(ema=0.9), tiny_engine()
    wanted = {name: value.clone() for name, value in plain.backbone.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in averaged.average.items())
    for step in range(3):
        for engine in (averaged, plain):
            engine.backward(objective(engine(images(6, step))))
            engine.step(0.05)
        for name, value in plain.backbone.state_dict().items():
            wanted[name] = 0.9 * wanted[name] + 0.1 * value if value.is_floating_point() else value.clone()
    assert difference(averaged, plain) == 0
    for name, value in averaged.average.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-7)
    averaged.backward(objective(averaged(images(6))))
    before = {name: value.clone() for name, value in averaged.average.items()}
    averaged.skip()
    assert all(torch.equal(value, before[name]) for name, value in averaged.average.items())


# ---- parameter groups, and a backbone without trained parameters


@pytest.mark.parametrize(
    "rates, own, given",
    [
        ((None, 0.01), 0.1, (0.05, 0.005)),  # relative to the optimizer's own rate, which is the first's
        ((None, 0.5), 0.1, (0.05, 0.25)),
        ((0.02, 0.01), 0.1, (0.05, 0.025)),  # no group has it: relative to the largest
        ((None, 0.0), 0.1, (0.05, 0.0)),
        ((None, None), 0.0, (0.05, 0.05)),
    ],
)
def test_groups_keep_the_ratio_of_their_rates(rates, own, given):
    """Parameters move as under torch alone with these rates, also with a second engine on the same optimizer."""
    net, alone = (backbone.build_seeded("smallnet", 8, SMALL, seed=0) for _ in range(2))

    def groups(net: nn.Module, rates: tuple) -> list[dict]:
        parts = (net.features, net.linear)
        return [
            {"params": [*part.parameters()]} | ({} if rate is None else {"lr": rate})
            for part, rate in zip(parts, rates, strict=True)
        ]

    optimizer = torch.optim.SGD(groups(net, rates), lr=own, momentum=0.9)
    wanted = torch.optim.SGD(groups(alone, given), momentum=0.9)
    for step in range(2):
        engine = DDPEngine(net, optimizer, CPU)
        engine.backward(objective(engine(images(4, step, SMALL))))
        engine.step(0.05)
        wanted.zero_grad()
        objective(alone(images(4, step, SMALL))).backward()
        wanted.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), alone.parameters(), strict=True))


def frozen(precision: str) -> tuple:
    """Three steps of a head over a backbone whose parameters are all frozen, and differ between the ranks at first."""
    net = backbone.build_seeded("smallnet", 8, SMALL, seed=distributed.rank())
    engine = DDPEngine(
        net.requires_grad_(False), build_optimizer(net, Optim()), CPU, Engine(precision=precision), clip=1.0
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    engine.warm_up(torch.zeros(2, 3, *SMALL))
    head, losses = PartialFC(5, 8, CosFace(scale=8.0, margin=0.1)), []
    mine = distributed.part(4, distributed.rank(), distributed.world_size())
    for _ in range(3):
        embeddings = engine(images(4, size=SMALL)[mine.start : mine.stop])
        loss = head(embeddings, torch.arange(4)[mine.start : mine.stop])
        engine.backward(loss)
        assert engine.finite()
        head.step(0.1, engine.clip(head.gradient_norm(engine.grad_scale)))
        engine.step(0.1)
        losses.append(loss.item())
    engine.load(copy.deepcopy(engine.state()))
    assert engine.state()["optimizer"] == {}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return losses, sum(value.double().sum().item() for value in net.state_dict().values())


@pytest.mark.parametrize("world_size, precision", [(1, "fp32"), (1, "fp16"), (2, "fp32")])
def test_a_frozen_backbone_trains_the_head(world_size, precision):
    found = run_ranks(frozen, world_size, precision)
    (losses, weights), *others = found
    assert losses[0] > losses[1] > losses[2] and all(other == found[0] for other in others)
    assert weights == pytest.approx(
        sum(v.double().sum().item() for v in engine_of(size=SMALL).backbone.state_dict().values())
    )


# ---- checkpoints

OPTIONS = {
    "adamw": (Optim(name="adamw"), {}),
    "adamw, channels last": (Optim(name="adamw"), dict(channels_last=True)),
    "fp16": (Optim(), dict(precision="fp16", loss_scale=2.0**36)),
    "ema": (Optim(), dict(ema=0.9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_state_goes_on_bit_for_bit(kind):
    optim, options = OPTIONS[kind]
    whole, resumed = (engine_of(optim=optim, size=SMALL, **options) for _ in range(2))
    train(whole, 4, size=SMALL, count=2)
    state = {file: {k: v.clone() for k, v in tensors.items()} for file, tensors in whole.state().items()}
    resumed.load(state)
    found, wanted = (train(engine, 3, size=SMALL, count=2) for engine in (resumed, whole))
    assert found == wanted
    for file, tensors in whole.state().items():
        for name, value in resumed.state()[file].items():
            assert torch.equal(value, tensors[name]), (file, name)


def test_another_optimizer_is_an_error():
    sgd, adamw = engine_of(), engine_of(optim=Optim(name="adamw"))
    train(sgd, 1)
    train(adamw, 1)
    with pytest.raises(
        ValueError, match="was written with momentum_buffer, this run's keeps exp_avg, exp_avg_sq, step"
    ):
        adamw.load(sgd.state())
    with pytest.raises(ValueError, match="was written with exp_avg, .* put optim.name back"):
        sgd.load(adamw.state())


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-4), ("tf32", 5e-3), ("bf16", 0.05), ("fp16", 0.01)])
def test_cuda_equals_cpu(kind, tolerance):
    cuda = torch.device("cuda")
    engine = engine_of(precision=kind, device=cuda, channels_last=True, ema=0.9, clip=1.0)
    assert train(engine, device=cuda) == pytest.approx(train(engine_of(clip=1.0)), rel=tolerance)


@pytest.mark.gpu
def test_adamw_goes_on_on_cuda():
    cuda, optim = torch.device("cuda"), Optim(name="adamw")
    whole, resumed = (engine_of(optim=optim, device=cuda, precision="fp16") for _ in range(2))
    train(whole, 3, device=cuda)
    resumed.load(copy.deepcopy(whole.state()))
    assert train(resumed, 3, device=cuda) == pytest.approx(train(whole, 3, device=cuda), rel=1e-3)


def synchronized(world_size: int) -> dict[str, torch.Tensor]:
    """An IResNet after two steps of 12 images in all, its batch norms over all ranks; gloo moves CUDA tensors too."""
    cuda = torch.device("cuda", 0)
    engine = engine_of("iresnet18", device=cuda, sync_batchnorm=True)
    assert isinstance(engine.backbone, EmbeddingNet)
    mine = distributed.part(12, distributed.rank(), world_size)
    for step in range(2):
        engine.backward(objective(engine(images(12, step)[mine.start : mine.stop].to(cuda))))
        engine.step(0.01)
    return {name: value.cpu() for name, value in engine.backbone.state_dict().items()}


@pytest.mark.gpu
def test_synchronized_batch_norm_sees_the_whole_batch():
    one, two = run_ranks(synchronized, 1, 1)[0], run_ranks(synchronized, 2, 2)[0]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
