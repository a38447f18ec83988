"""DeepSpeed's engine: equal to one dense float64 process at every ZeRO stage, with DDP's checkpoints."""

import copy
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from partial_fc import checkpoint
from partial_fc.backbone.net import EmbeddingNet
from partial_fc.config import Engine, Optim
from partial_fc.optim import build_optimizer
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine
from partial_fc.parallel.engine import build_engine, check_engine
from tests.conftest import run_ranks
from tests.test_train import (
    assert_follows,
    checksums,
    curve,
    damaged,
    finish,
    rows,
    start,
    train_and_catch,
    train_here,
    wait_for_step,
    workers,
)
from tests.test_train_options import with_tiny

pytestmark = pytest.mark.slow

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("not run: DeepSpeed is not installed", allow_module_level=True)

CPU = torch.device("cpu")
SIZE = (32, 32)
SAMPLES = (13, 7, 12, 2)  # of a step, over all ranks: uneven parts, in the last one of three ranks without any
# at stage 3 small parameters too, and in several flat tensors
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 200}}


def net(batch_norm: bool = False) -> EmbeddingNet:
    """413 parameters in tensors of odd sizes, so that no number of ranks divides them."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5) if batch_norm else nn.Identity()
    features = nn.Sequential(nn.Conv2d(3, 5, 3, 16, padding=1), norm, nn.PReLU(5))
    return EmbeddingNet(features, 5, 13, SIZE, batch_norm)


def images(step: int, count: int) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(step))


def loss_sum(embeddings: torch.Tensor) -> torch.Tensor:
    direction = torch.linspace(-1, 1, embeddings.shape[1], dtype=embeddings.dtype)
    return ((nn.functional.normalize(embeddings) * direction).sum(dim=1) - 0.3).square().sum()


def engine_of(
    stage: int | None, optim: Optim, accumulate: int = 1, clip: float | None = None, batch_norm=False, **settings
) -> BaseEngine:
    """stage: None is DDP."""
    if stage is not None:
        settings = dict(name="deepspeed", zero_stage=stage, deepspeed=PARTITIONED if stage == 3 else {}) | settings
    backbone = net(batch_norm).train()
    optimizer = build_optimizer(backbone, optim)
    engine = build_engine(backbone, optimizer, CPU, Engine(**settings), accumulate=accumulate, clip=clip)
    engine.warm_up(torch.zeros(2, 3, *SIZE))
    return engine


def train(
    engine: BaseEngine,
    first: int = 0,
    last: int = 4,
    of_the_head: float | None = None,
    samples: tuple[int, ...] = SAMPLES,
) -> list:
    """What `skip` undoes comes before each step, whole or in part; returns the factors that the head is told."""
    factors = []
    for step in range(first, last):
        count = samples[step % len(samples)]
        mine = distributed.part(count, distributed.rank(), distributed.world_size())
        batch = images(step, count)[mine.start : mine.stop]
        for wanted in (False, True):
            for piece in range(engine.accumulate):
                cut = distributed.part(len(batch), piece, engine.accumulate)
                share = distributed.world_size() / count  # ranks' gradients are averaged
                embeddings = engine(batch[cut.start : cut.stop])
                engine.backward(loss_sum(embeddings) * share * (1.0 if wanted else 7.0))
                if not wanted and step % 2:
                    break  # a step that is given up in the middle
            if wanted and engine.finite():
                factors.append(float(engine.clip(None if of_the_head is None else torch.tensor(of_the_head))))
                engine.step(0.05)
            else:
                engine.skip()
    return factors


def dense(optim: Optim, clip: float | None, of_the_head: float | None) -> tuple[dict, list]:
    """The same in float64 with torch alone: parameters and optimizer state by name; what the head is told."""
    backbone = net().double().train()
    optimizer = build_optimizer(backbone, optim)
    factors = []
    for step, count in enumerate(SAMPLES):
        (loss_sum(backbone(images(step, count).double())) / count).backward()
        factor = 1.0
        if clip is not None:
            norm = torch.hypot(
                nn.utils.get_total_norm(p.grad for p in backbone.parameters()),
                torch.tensor(of_the_head or 0.0, dtype=torch.float64),
            )
            factor = min(clip / (norm.item() + 1e-6), 1.0)
            assert factor < 1
        for parameter in backbone.parameters():
            parameter.grad *= factor
        factors.append(1.0 if of_the_head is None else 1 / factor)
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.step()
        optimizer.zero_grad()
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    state = {f"{names[p]}.{k}": v for p, kept in optimizer.state.items() for k, v in kept.items() if v is not None}
    return backbone.state_dict() | state, factors


OPTIMS = {
    "sgd": Optim(momentum=0.9, weight_decay=0.1),
    "plain sgd": Optim(momentum=0.0, weight_decay=0.1),
    "adamw": Optim(name="adamw", weight_decay=0.1),
}
CLIPS = {"": (None, None), "clipped": (0.05, None), "clipped jointly": (0.05, 0.3)}


def relative(value: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((value - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)).item()


def against_dense(stage: int | None, cases: list[tuple[str, str, int, dict]]) -> list[tuple[float, str]]:
    """The largest difference of parameters, optimizer state and what the head is told from `dense`, and where."""
    answers = []
    for optim, clip, accumulate, settings in cases:
        largest, of_the_head = CLIPS[clip]
        engine = engine_of(stage, OPTIMS[optim], accumulate, largest, **settings)
        factors = train(engine, of_the_head=of_the_head)
        state = engine.state()
        wanted, wanted_factors = dense(OPTIMS[optim], largest, of_the_head)
        assert factors == pytest.approx(wanted_factors, rel=1e-5)
        if distributed.rank() == 0:
            found = state["backbone"] | state["optimizer"]
            assert set(found) == set(wanted)
            answers.append(max((relative(found[name].double(), value), name) for name, value in wanted.items()))
    return answers


CASES = [
    ("sgd", "", 1, {}),
    ("sgd", "clipped jointly", 2, {}),
    ("adamw", "clipped", 2, {}),
    ("adamw", "", 1, {}),
    ("plain sgd", "clipped", 1, {}),
    ("sgd", "", 2, dict(offload=True)),
    ("adamw", "clipped jointly", 2, dict(offload=True)),
]


GRID = [(1, 2), (2, None), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)]


def cases_of(world_size: int, stage: int | None) -> list[tuple]:
    """Every case at every stage once, by turns at two ranks and at three; DDP at two, one rank for some."""
    possible = CASES if stage else CASES[:-2]  # without offload
    if stage is None:
        return possible
    turn = 0 if world_size == 2 else 1
    return possible[4:6] if world_size == 1 else possible[(turn + stage) % 2 :: 2]


@pytest.mark.parametrize("world_size, stage", GRID)
def test_equals_dense(world_size, stage):
    """Parameters, optimizer state and what the head is told, from uneven and empty batches, after skipped steps."""
    all_equal_dense(world_size, stage, cases_of(world_size, stage))


@pytest.mark.soak("deepspeed")
@pytest.mark.parametrize("world_size, stage", [place for place in GRID if place[1] is not None])
def test_other_cases_equal_dense(world_size, stage):
    tested = cases_of(world_size, stage)
    all_equal_dense(world_size, stage, [c for c in (CASES if stage else CASES[:-2]) if c not in tested])


def all_equal_dense(world_size: int, stage: int | None, cases: list[tuple]) -> None:
    for case, (error, where) in zip(cases, run_ranks(against_dense, world_size, stage, cases)[0], strict=True):
        print(f"{world_size} ranks, stage {stage}, {case}: {error:.1e} off at {where}")
        assert error < 1e-5


# ---- what DDP does too


def see_format(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, output))


def like_ddp(settings: dict, stages: list[int], batch_norm: bool) -> list[float]:
    """How far parameters, running statistics and averages are from DDP's after three steps, relative, at each stage."""
    wanted = engine_of(None, OPTIMS["sgd"], accumulate=2, clip=0.05, batch_norm=batch_norm, **settings)
    samples = (12, 17, 13) if batch_norm else SAMPLES  # it wants two or more
    train(wanted, 0, 3, samples=samples)
    answers = []
    for stage in stages:
        engine = engine_of(stage, OPTIMS["sgd"], accumulate=2, clip=0.05, batch_norm=batch_norm, **settings)
        if settings.get("channels_last"):
            next(m for m in engine.backbone.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(see_format)
        train(engine, 0, 3, samples=samples)
        found, theirs = engine.state(), wanted.state()
        if distributed.rank() > 0:
            continue
        assert list(found) == list(theirs) == engine.files
        answers.append(0.0)
        for file, tensors in theirs.items():
            assert [(n, v.shape, v.dtype) for n, v in found[file].items()] == [
                (n, v.shape, v.dtype) for n, v in tensors.items()
            ]
            answers[-1] = max(answers[-1], *(relative(found[file][name], value) for name, value in tensors.items()))
    return answers


OPTIONS = {
    "batch norm, a frozen parameter": (dict(), [0, 1, 2, 3], True),
    "checkpointed activations": (dict(checkpoint_activations=True), [0, 2, 3], True),
    "channels last": (dict(channels_last=True), [0, 2, 3], False),
    "average": (dict(ema=0.9), [0, 1, 2], True),
    "bf16": (dict(precision="bf16"), [0, 1, 2, 3], False),
    "fp16": (dict(precision="fp16", loss_scale=1024.0), [0, 1, 2, 3], False),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_do_what_they_do_with_ddp(kind):
    """To the rounding of float32: in 16 bits too, for the products are the same and what is joined is float32."""
    for stage, error in zip(OPTIONS[kind][1], run_ranks(like_ddp, 2, *OPTIONS[kind])[0], strict=True):
        print(f"{kind}, stage {stage}: {error:.1e} off DDP")
        assert error < 1e-5


def overflow_on(broken: int | None, settings: dict, stages: list[int]) -> list[tuple]:
    answers = []
    for stage in stages:
        engine = engine_of(stage, OPTIMS["sgd"], **settings)
        before = {name: value.clone() for name, value in engine.state()["backbone"].items()}
        for _ in range(2):
            engine.backward(loss_sum(engine(images(0, 4))))
            if distributed.rank() == broken:  # in its part alone
                engine._gradients()[-1].view(-1)[:1] = torch.inf
            finite = engine.finite()
            engine.step(0.1) if finite else engine.skip()
        after = engine.state()["backbone"]
        scale = engine.loss_scale.value if engine.loss_scale else None
        answers.append((finite, scale, any(not torch.equal(v, before[n]) for n, v in after.items())))
    return answers


@pytest.mark.parametrize("settings", [dict(), dict(precision="fp16", loss_scale=64.0), dict(offload=True)], ids=str)
def test_all_ranks_skip_what_is_not_finite(settings):
    """Also without float16: DeepSpeed would do so by itself, and the head must then skip too."""
    stages = [1, 2, 3] if settings.get("offload") else [0, 1, 2, 3]
    scales = (16.0, 64.0) if "precision" in settings else (None, None)
    for broken in (1, None):
        answers = run_ranks(overflow_on, 2, broken, settings, stages)
        wanted = (True, scales[1], True) if broken is None else (False, scales[0], False)
        assert answers[0] == [wanted] * len(stages)
        assert [answer[:2] for answer in answers[1]] == [answer[:2] for answer in answers[0]]


def warmed_up() -> list[bool]:
    """Whether an engine's first step is made after a warm-up whose gradients overflow."""
    answers = []
    for stage, offload in ((2, False), (1, True), (2, True), (3, True)):
        engine = engine_of(stage, Optim(), precision="fp16", loss_scale=2.0**40, offload=offload)
        engine.loss_scale.value = 1.0
        engine.backward(engine(torch.rand(2, 3, *SIZE)).square().mean())
        answers.append(engine.finite())
        engine.step(0.1)
    return answers


def test_a_warm_up_that_overflows_leaves_no_trace():
    """With offload DeepSpeed remembers an overflow until its next step, which makes the optimizer's state here."""
    assert run_ranks(warmed_up, 2) == [[True] * 4] * 2


# ---- checkpoints


def continued(
    stage: int | None, optim: str, state: dict | None, first: int, last: int, settings: dict, look: bool = False
) -> tuple[dict, dict | None]:
    """The state after steps first to last from `state`, and, to `look` at, what it was right after it was loaded."""
    engine = engine_of(stage, OPTIMS[optim], clip=0.05, **settings)
    if state is not None:
        train(engine, 0, 1)  # of which nothing may stay
        engine.load(copy.deepcopy(state))
    loaded = copy.deepcopy(engine.state()) if look else None  # gathering leaves parameters in parts
    train(engine, first, last)
    return engine.state(), loaded


def assert_same_state(state: dict, wanted: dict, tolerance: float = 0.0) -> None:
    assert {file: set(tensors) for file, tensors in state.items()} == {f: set(tensors) for f, tensors in wanted.items()}
    for file, tensors in wanted.items():
        for name, value in tensors.items():
            assert (state[file][name] - value).abs().max() <= tolerance * value.abs().max(), (file, name)


CHAIN = [(None, 2, {}), (1, 3, {}), (3, 2, {}), (2, 3, dict(offload=True)), (0, 2, {}), (3, 3, dict(offload=True))]


@pytest.mark.parametrize("optim", [pytest.param("sgd", marks=pytest.mark.soak("deepspeed")), "adamw"])
def test_a_state_goes_from_engine_to_engine(optim):
    """Each takes it over bit for bit, at another rank count; in the end it is where one engine would be.

    Ranks add gradients in another order: float32's 6e-8, some tens of roundings over the steps, which AdamW's division
    by the root of small second moments enlarges.
    """
    state = None
    for step, (stage, world_size, settings) in enumerate(CHAIN):
        before = state
        state, loaded = run_ranks(continued, world_size, stage, optim, state, step, step + 1, settings, True)[0]
        if before is not None:
            assert_same_state(loaded, before)
    whole, _ = run_ranks(continued, 2, None, optim, None, 0, len(CHAIN), {})[0]
    assert_same_state(state, whole, 1e-5)


def resumed(stage: int, optim: str, settings: dict) -> tuple[dict, dict]:
    middle, _ = continued(stage, optim, None, 0, 2, settings)
    files = distributed.gather_objects({f: {n: v.cpu() for n, v in t.items()} for f, t in middle.items()})[0]
    whole, _ = continued(stage, optim, None, 0, 4, settings)
    parts, _ = continued(stage, optim, files, 2, 4, settings)
    return parts, whole


RESUMED = [  # stage, optimizer, settings, world sizes: the first in `make test`
    (0, "adamw", {}, [2]),
    (1, "sgd", dict(offload=True), [2]),
    (2, "adamw", {}, [3, 2]),
    (3, "sgd", {}, [2, 3]),
    (3, "adamw", dict(deepspeed={}), [3, 2]),  # small parameters stay whole on every rank
]


@pytest.mark.parametrize(
    "stage, optim, settings, world_size",
    [
        pytest.param(*kind, size, marks=[pytest.mark.soak("deepspeed")] if place else [])
        for *kind, sizes in RESUMED
        for place, size in enumerate(sizes)
    ],
)
def test_the_same_engine_goes_on_bit_for_bit(stage, optim, settings, world_size):
    parts, whole = run_ranks(resumed, world_size, stage, optim, settings)[0]
    assert_same_state(parts, whole)


def load_another(stage: int) -> str:
    sgd, adamw = (engine_of(stage, OPTIMS[name]) for name in ("sgd", "adamw"))
    train(sgd, 0, 1)
    state = distributed.gather_objects(sgd.state())[0]
    try:
        adamw.load(state)
    except ValueError as error:
        return str(error)
    return "no error"


def test_another_optimizer_is_an_error():
    for message in run_ranks(load_another, 2, 3):
        assert "was written with momentum_buffer, this run's keeps exp_avg, exp_avg_sq, step: put optim.name" in message


def load_untrained(stage: int) -> bool:
    engine = engine_of(stage, OPTIMS["adamw"])
    train(engine, 0, 1)
    engine.load({"backbone": net().state_dict(), "optimizer": {}})
    state = engine.state()
    same = distributed.rank() > 0 or all(torch.equal(v, state["backbone"][n]) for n, v in net().state_dict().items())
    return same and not any(value.any() for value in state["optimizer"].values())


def test_the_state_of_a_run_without_an_update_loads():
    """DDP's optimizer has none then."""
    for stage in range(4):
        assert run_ranks(load_untrained, 2, stage) == [True, True]


def parts_held(stage: int) -> tuple[int, int]:
    """Numbers that this rank holds of the parameters and of the optimizer's state."""
    engine = engine_of(stage, OPTIMS["adamw"])
    train(engine, 0, 1)
    state = sum(t.numel() for kept in engine.optimizer.state.values() for t in kept.values() if t.dim())
    return sum(p.numel() for p in engine.backbone.parameters()), state


def test_ranks_hold_parts():
    """Half of it on two ranks, with some filling; at stage 3 no parameter is whole between steps."""
    whole = sum(p.numel() for p in net().parameters())
    for stage in range(4):
        for parameters, state in run_ranks(parts_held, 2, stage):
            assert parameters == (0 if stage == 3 else whole)
            assert whole <= state / 2 <= whole if stage == 0 else whole / 2 <= state / 2 <= whole / 2 + 10


# ---- the real train()

TRAINED = (
    "optim.schedule=constant",
    "checkpoint.every=4",
    "evaluate.sets={}",
    "data.accumulate=2",
    "data.global_batch_size=12",  # two samples in each of two micro-batches of three ranks
)
JOINTLY = ("optim.clip=0.5", "optim.clip_jointly=true")


def stage(number: int, *overrides: str) -> tuple[str, ...]:
    return ("engine.name=deepspeed", f"engine.zero_stage={number}", f"engine.deepspeed={PARTITIONED}", *overrides)


def changing_run(data: Path, folder: Path, *options: str) -> None:
    options = (*TRAINED, *JOINTLY, *options)
    chain = [(2, ()), (2, stage(2)), (3, stage(3)), (2, stage(1, "engine.offload=true")), (3, ())]
    for number, (world_size, engine) in enumerate(chain):
        steps = f"run.steps={number * 2 + 2}"
        run_ranks(train_here, world_size, folder / "run", data, *options, *engine, steps)
    run_ranks(train_here, 2, folder / "whole", data, *options, f"run.steps={len(chain) * 2}")
    assert_follows(folder / "run", folder / "whole")


def test_a_run_changes_engine_stage_and_ranks(glyphs_ci, tmp_path):
    """At each checkpoint; it follows a run that stays with DDP on two ranks."""
    changing_run(glyphs_ci / "train", tmp_path)


@pytest.mark.soak("deepspeed")
def test_a_run_with_adamw_changes_engine_stage_and_ranks(glyphs_ci, tmp_path):
    changing_run(glyphs_ci / "train", tmp_path, "optim.name=adamw", "optim.lr=0.001", "head.optim.name=sgd")


@pytest.mark.soak("deepspeed")
def test_undecodable_samples_count_as_with_ddp(glyphs_ci, tmp_path):
    """A sixth of all, so that ranks' parts and micro-batches differ in size."""
    data = damaged(glyphs_ci / "train", tmp_path / "data", range(0, 8000, 6))
    options = (*TRAINED, "run.steps=4", "checkpoint.every=2", "data.max_undecodable=0.5", "data.global_batch_size=8")
    run_ranks(train_here, 2, tmp_path / "ddp", data, *options)
    for number in (2, 3):
        run_ranks(train_here, 2, tmp_path / f"{number}", data, *options, *stage(number))
        assert rows(tmp_path / f"{number}")[-1]["undecodable"] > 0
        assert_follows(tmp_path / f"{number}", tmp_path / "ddp")


def test_head_and_backbone_skip_together(glyphs_ci, tmp_path):
    """With float16 and a scale that overflows until it has been halved often enough, as DDP does; then it resumes."""
    float16 = (
        "engine.precision=fp16",
        "data.global_batch_size=8",
        "backbone.name=tiny",
        "head.sample_rate=1",
        f"engine.loss_scale={2.0**20}",
    )
    options = (*TRAINED, *float16, "optim.name=adamw", "optim.lr=0.001")
    data = glyphs_ci / "train"
    run_ranks(with_tiny, 2, train_here, tmp_path / "ddp", data, *options, "run.steps=8")
    for steps in (4, 8):
        run_ranks(with_tiny, 2, train_here, tmp_path / "run", data, *options, *stage(2), f"run.steps={steps}")
    last, wanted = rows(tmp_path / "run")[-1], rows(tmp_path / "ddp")[-1]
    assert 2 < last["skipped_steps"] == wanted["skipped_steps"] < 8
    assert last["engine.loss_scale"] == wanted["engine.loss_scale"]
    state = load_file(checkpoint.find_latest(tmp_path / "run").path / "optimizer.safetensors")
    assert {v.item() for name, v in state.items() if name.endswith(".step")} == {8 - last["skipped_steps"]}
    assert curve(tmp_path / "run") == pytest.approx(curve(tmp_path / "ddp"), rel=2e-3)


@pytest.mark.soak("deepspeed")
def test_a_loss_that_is_not_finite_skips_the_step(glyphs_ci, tmp_path):
    options = (*TRAINED, *stage(3), "optim.lr=1e30", "optim.warmup_steps=0")
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", glyphs_ci / "train", *options)
    assert messages[0] == messages[1] and "was not finite in 10 successive steps" in messages[0]
    assert checkpoint.find_latest(tmp_path / "run") is None


def killed_and_resumed(data: Path, folder: Path, *overrides: str) -> None:
    """kill -9 of a rank between two checkpoints; the same command goes on to the same bits as a run without."""
    options = (*TRAINED, *JOINTLY, *overrides, "run.steps=12")
    process = start(2, folder / "run", *options)
    wait_for_step(folder / "run", 6, process)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    finish(process, code=1)
    assert 4 <= checkpoint.find_latest(folder / "run").step < 12
    output = finish(start(2, folder / "run", *options))
    assert "WARNING" not in output and "Warning" not in output, output
    run_ranks(train_here, 2, folder / "whole", data, *options)
    assert checksums(folder / "run") == checksums(folder / "whole")
    assert curve(folder / "run") == curve(folder / "whole")


@pytest.mark.soak("deepspeed")
def test_killed_and_resumed_is_the_same_run_bit_for_bit(glyphs_ci, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    killed_and_resumed(glyphs_ci / "train", tmp_path, *stage(2))
    assert not (tmp_path / "compiled").exists()  # see import_deepspeed


@pytest.mark.soak("deepspeed")
@pytest.mark.parametrize("engine", [stage(0), stage(1, "engine.offload=true"), stage(3), stage(3, "optim.name=adamw")])
def test_other_stages_resume_bit_for_bit(glyphs_ci, tmp_path, engine):
    killed_and_resumed(glyphs_ci / "train", tmp_path, *engine)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [stage(0), stage(2), stage(3), stage(2, "engine.offload=true")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_follows_ddp(glyphs_ci, tmp_path, engine, precision):
    """One process and NCCL."""
    options = (*TRAINED, *JOINTLY, "run.steps=8", f"engine.precision={precision}")
    for name, settings in (("ddp", ()), ("deepspeed", engine)):
        finish(start(1, tmp_path / name, *options, *settings))
    assert curve(tmp_path / "deepspeed") == pytest.approx(curve(tmp_path / "ddp"), rel=1e-3)


# ---- settings and surroundings


def unused_with(stage: int) -> str:
    backbone = net()
    backbone.idle = nn.Linear(3, 4)
    settings = Engine(name="deepspeed", zero_stage=stage)
    try:
        engine = build_engine(backbone, build_optimizer(backbone, Optim()), CPU, settings, accumulate=1, clip=None)
        engine.warm_up(torch.zeros(2, 3, *SIZE))
    except distributed.RunError as error:
        return str(error)
    return "no error"


def test_parameters_without_a_gradient_are_an_error():
    for stage in range(4):
        for message in run_ranks(unused_with, 2, stage):
            assert "no embedding depends on 2 of the backbone's parameters, idle.weight the first" in message


def with_groups(stage: int | None) -> dict[str, torch.Tensor]:
    """The backbone after two steps, its convolution at a tenth of the rate; a frozen one is refused by DeepSpeed."""
    backbone = net().train()
    slow, *fast = backbone.parameters()
    optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.01}, {"params": fast}], lr=0.1, momentum=0.9)
    settings = Engine() if stage is None else Engine(name="deepspeed", zero_stage=stage)
    engine = build_engine(backbone, optimizer, CPU, settings, accumulate=1, clip=None)
    engine.warm_up(torch.zeros(2, 3, *SIZE))
    train(engine, last=2)
    frozen = net().requires_grad_(False)
    if stage is not None:
        with pytest.raises(ValueError, match="no parameter of the backbone is trained.*engine.name=ddp"):
            build_engine(frozen, build_optimizer(frozen, Optim()), CPU, settings, accumulate=1, clip=None)
    return engine.backbone_state()


IN_SOAK = [pytest.param(stage, marks=pytest.mark.soak("deepspeed")) for stage in (0, 1, 3)]


@pytest.mark.parametrize("stage", [2, *IN_SOAK])
def test_groups_keep_the_ratio_of_their_rates(stage):
    found, wanted = (run_ranks(with_groups, 2, kind)[0] for kind in (stage, None))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def surroundings() -> tuple:
    linear = nn.functional.linear
    engine = engine_of(3, OPTIMS["sgd"])
    import deepspeed  # noqa: F401 - after the engine

    return deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], nn.functional.linear is linear, engine.stage


def test_nothing_is_compiled_and_torch_stays_as_it_is():
    """The switch is a private dict of DeepSpeed's: this holds the version that has it."""
    assert run_ranks(surroundings, 2) == [(False, True, 3)] * 2


def refused(deepspeed: dict) -> str:
    try:
        engine_of(1, Optim(), deepspeed=deepspeed)
    except distributed.RunError as error:
        return str(error)
    return "no error"


def test_what_deepspeed_does_not_take_is_an_error():
    for message in run_ranks(refused, 2, {"zero_optimization": {"reduce_bucket_siz": 5}}):
        assert "DeepSpeed does not take engine.deepspeed {'zero_optimization': {'reduce_bucket_siz': 5}}" in message


def test_it_needs_a_process_group():
    with pytest.raises(ValueError, match="engine.name deepspeed needs a process group.*torchrun --standalone --nproc"):
        check_engine(Engine(name="deepspeed"), CPU)


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"needs DeepSpeed, which .*: pip install 'deepspeed==0"):
        check_engine(Engine(name="deepspeed"), CPU)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(zero_stage=2), "engine.zero_stage is DeepSpeed's: give engine.name=deepspeed"),
        (dict(offload=True), "engine.offload is DeepSpeed's"),
        (dict(deepspeed={"wall_clock_breakdown": True}), "engine.deepspeed is DeepSpeed's"),
        (dict(name="deepspeed", offload=True), "engine.offload with engine.zero_stage 0"),
        (dict(name="deepspeed", zero_stage=3, ema=0.9), "engine.ema with engine.zero_stage 3"),
        (dict(name="deepspeed", compile=True), "engine.compile is for engine.name=ddp alone"),
        (dict(name="deepspeed", deepspeed={"fp16": {}}), "engine.deepspeed.fp16 is not for this section"),
        (dict(name="deepspeed", deepspeed={"zero_optimisation": {}}), "zero_optimisation .* or is unknown"),
        (
            dict(name="deepspeed", deepspeed={"zero_optimization": {"stage": 2}}),
            "engine.deepspeed.zero_optimization.stage is not for this section",
        ),
        (dict(name="deepspeed", deepspeed={"zero_optimization": 2}), "wanted a section"),
        (dict(name="deepspeed", zero_stage=4), "less than or equal to 3"),
    ],
)
def test_settings_that_do_not_go_together_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        check_engine(Engine(**settings), CPU)
