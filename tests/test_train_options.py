"""Options of the backbone's training through the real train(): accumulation, precision, clipping, AdamW, averages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from partial_fc import backbone, checkpoint
from partial_fc.backbone.net import EmbeddingNet
from partial_fc.build import build, micro_batch_sizes
from partial_fc.config_file import load_config
from partial_fc.data.reader import Batch, normalize
from partial_fc.evaluate.runs import evaluate_run
from partial_fc.parallel import distributed
from partial_fc.report.page import write_report
from partial_fc.train import micro_batches, share
from tests.conftest import run_ranks
from tests.test_train import (
    CONFIG,
    assert_follows,
    checksums,
    config_for,
    curve,
    damaged,
    rows,
    states,
    train_and_catch,
    train_here,
)

pytestmark = pytest.mark.slow

SHORT = ("run.steps=8", "checkpoint.every=4", "optim.schedule=constant", "optim.warmup_steps=2")


@pytest.fixture(scope="module")
def partly_damaged(glyphs_ci, tmp_path_factory) -> Path:
    return damaged(glyphs_ci / "train", tmp_path_factory.mktemp("damaged") / "data", range(0, 8000, 40))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak("train")), 2])
def test_micro_batches_equal_one_batch(partly_damaged, tmp_path, world_size):
    """48 samples in 5 pieces: no number of ranks cuts them evenly; some of them cannot be decoded."""
    options = (*SHORT, "data.max_undecodable=0.5")
    run_ranks(train_here, world_size, tmp_path / "whole", partly_damaged, *options)
    run_ranks(train_here, world_size, tmp_path / "pieces", partly_damaged, *options, "data.accumulate=5")
    assert rows(tmp_path / "pieces")[-1]["undecodable"] > 0
    assert_follows(tmp_path / "pieces", tmp_path / "whole")


def pieces_of(counts: list[int], pieces: int) -> list[tuple[int, float]]:
    count = counts[distributed.rank()]
    batch = Batch(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.arange(count), 0, count, [])
    return [(len(labels), float(weight)) for _, labels, weight in micro_batches(batch, pieces, torch.device("cpu"))]


def test_sizes_that_a_compiled_backbone_meets():
    """Those of a batch that is not damaged: smaller ones are filled up to them."""
    for pieces, sizes in ((1, {48}), (5, {9, 10}), (6, {8})):
        assert micro_batch_sizes(load_config(CONFIG, [f"data.accumulate={pieces}"])) == sizes


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_host_does_not_wait_for_a_batch_on_its_way(pieces):
    """Nor for what the device has queued before it."""
    device, number = torch.device("cuda"), torch.tensor(127.5, device="cuda")
    batch = Batch(torch.zeros(6, 3, 4, 4, dtype=torch.uint8).pin_memory(), torch.arange(6).pin_memory(), 0, 6, [])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, _, weight in micro_batches(batch, pieces, device):
            weight * normalize(images, number, number)
        share(torch.ones((), device=device), False, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_of_micro_batches_are_their_shares():
    for sizes in run_ranks(pieces_of, 2, [7, 4], 3):
        assert [weight for _, weight in sizes] == pytest.approx([3 / 11, 3 / 11, 5 / 11])
    assert [count for count, _ in run_ranks(pieces_of, 2, [7, 4], 3)[0]] == [2, 2, 3]
    assert run_ranks(pieces_of, 2, [0, 0], 2) == [[(0, 0.0)] * 2] * 2
    assert run_ranks(pieces_of, 2, [3, 1], 1) == [[(3, 1.0)], [(1, 1.0)]]


def test_micro_batches_must_not_be_empty(glyphs_ci, tmp_path):
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", glyphs_ci / "train", "data.accumulate=13")
    assert "data.accumulate 13 leaves micro-batches empty: a rank has 12 samples of a step" in messages[0]
    assert messages[0] == messages[1]


def tiny(embedding_dim: int, image_size: tuple[int, int]) -> EmbeddingNet:
    features = nn.Sequential(nn.Conv2d(3, 16, 3, 16, padding=1), nn.GroupNorm(1, 16), nn.PReLU(16))
    return EmbeddingNet(features, 16, embedding_dim, image_size)


def with_tiny(fn: Callable, *args: object) -> object:
    """fn(*args) where backbone.name=tiny is one."""
    backbone.BACKBONES["tiny"] = tiny
    return fn(*args)


# A small batch: a CPU has no float16 units. A backward of smallnet is 0.1 s a sample, four times that of float32; so
# tests of many steps train a tiny net.
FLOAT16 = ("engine.precision=fp16", "data.global_batch_size=2", "data.streams=2", "head.sample_rate=1")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_head_and_backbone_skip_together(glyphs_ci, tmp_path, optimizer):
    """A loss scale of 2^22 overflows until it has been halved often enough; the updates of both are counted."""
    rate = () if optimizer == "sgd" else ("optim.lr=0.001",)
    scale = (f"engine.loss_scale={2.0**22}", "run.steps=16", "backbone.name=tiny")
    overrides = (*SHORT, *FLOAT16, *scale, f"optim.name={optimizer}", *rate, "head.optim.name=adamw")
    run_ranks(with_tiny, 2, train_here, tmp_path / "run", glyphs_ci / "train", *overrides)
    last = rows(tmp_path / "run")[-1]
    assert 4 < last["skipped_steps"] < 13 and last["engine.loss_scale"] == 2.0 ** (22 - last["skipped_steps"])
    found = checkpoint.find_latest(tmp_path / "run")
    updates = load_file(found.path / "history.safetensors")["updates"].item()
    assert updates == found.step - last["skipped_steps"]
    if optimizer == "adamw":
        state = load_file(found.path / "optimizer.safetensors")
        assert {v.item() for name, v in state.items() if name.endswith(".step")} == {updates}
    skipped = [r["skipped_steps"] for r in rows(tmp_path / "run")]
    assert skipped[3] == 4 and len(set(skipped[-3:])) == 1  # skips first, then trains


def test_a_scale_that_never_fits_ends_the_run(glyphs_ci, tmp_path):
    overrides = (*FLOAT16, f"engine.loss_scale={2.0**100}", "run.steps=60", "backbone.name=tiny")
    messages = run_ranks(with_tiny, 2, train_and_catch, tmp_path / "run", glyphs_ci / "train", *overrides)
    assert messages[0] == messages[1]
    assert "the gradients of 30 successive steps, the last one 29, were not finite" in messages[0]


@pytest.mark.parametrize(
    "clip",
    [
        (),
        pytest.param(("optim.clip=0.5",), marks=pytest.mark.soak("train")),
        pytest.param(("optim.clip=0.5", "optim.clip_jointly=true"), marks=pytest.mark.soak("train")),
    ],
    ids=len,
)
def test_the_loss_scale_drops_out(glyphs_ci, tmp_path, clip):
    """From backbone and class centers: runs at two scales that fit differ by what float16 rounds away near 0."""
    net = "smallnet" if len(clip) == 2 else "tiny"
    for scale in (64.0, 1024.0):
        overrides = (*SHORT, *FLOAT16, f"engine.loss_scale={scale}", f"backbone.name={net}", *clip)
        run_ranks(with_tiny, 2, train_here, tmp_path / f"{scale}", glyphs_ci / "train", *overrides)
        assert rows(tmp_path / f"{scale}")[-1]["skipped_steps"] == 0
    one, other = (states(checkpoint.find_latest(tmp_path / f"{scale}")) for scale in (64.0, 1024.0))
    for name, value in other.items():
        assert (one[name] - value).norm() <= 1e-2 * value.norm(), name


RESUMED = {
    "adamw, cosine": ("optim.name=adamw", "optim.lr=0.001"),
    "fp16": (*FLOAT16, f"engine.loss_scale={2.0**19}", "optim.clip=0.5", "optim.clip_jointly=true"),
    "bf16, average": ("engine.precision=bf16", "engine.ema=0.9"),
    "pieces, clipped jointly": ("data.accumulate=3", "optim.clip=0.5", "optim.clip_jointly=true"),
    "channels last, activations": ("engine.channels_last=true", "engine.checkpoint_activations=true"),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_options_resume_bit_for_bit(glyphs_ci, tmp_path, kind):
    """At two ranks, from the middle; with fp16 while the scale is still falling."""
    overrides = (*SHORT, *RESUMED[kind])
    if "cosine" in kind:
        overrides = (*overrides, "optim.schedule=cosine")
    run_ranks(train_here, 2, tmp_path / "whole", glyphs_ci / "train", *overrides)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train", *overrides)
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    if "fp16" in kind:
        assert 4 < rows(tmp_path / "whole")[-1]["skipped_steps"] < 8
    for name in ("engine.loss_scale", "engine.gradient_norm"):
        found, wanted = ([row.get(name) for row in rows(tmp_path / run)] for run in ("run", "whole"))
        assert found == wanted


def assert_same_bits(run: Path, other: Path) -> None:
    assert curve(run) == curve(other)
    wanted = states(checkpoint.find_latest(other))
    assert all(torch.equal(value, wanted[name]) for name, value in states(checkpoint.find_latest(run)).items())


SAME = {  # what changes speed or memory and not the run
    "checkpointed activations": ("engine.checkpoint_activations=true",),
    "channels last": ("engine.channels_last=true",),
    "average": ("engine.ema=0.99",),
    "a norm that is never reached": ("optim.clip=1e9", "optim.clip_jointly=true"),
}


@pytest.fixture(scope="module")
def plain(glyphs_ci, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    run_ranks(train_here, 2, run, glyphs_ci / "train", *SHORT)
    return run


@pytest.mark.parametrize("kind", SAME)
def test_the_run_stays_the_same(glyphs_ci, tmp_path, plain, kind):
    run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train", *SHORT, *SAME[kind])
    if kind == "channels last":  # other kernels
        assert_follows(tmp_path / "run", plain)
    else:
        assert_same_bits(tmp_path / "run", plain)


def test_clipping_shortens_the_steps(glyphs_ci, tmp_path, plain):
    run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train", *SHORT, "optim.clip=0.01")
    assert all(row["engine.gradient_norm"] > 0.01 for row in rows(tmp_path / "run"))
    assert curve(tmp_path / "run") != curve(plain)


def test_the_stated_batch_scales_both_rates(glyphs_ci, tmp_path, capfd):
    options = ("optim.lr=0.04", "optim.lr_batch=48", "head.optim.lr=0.04")
    train_here(tmp_path / "run", glyphs_ci / "train", *SHORT, *options)
    train_here(tmp_path / "plain", glyphs_ci / "train", *SHORT)
    assert curve(tmp_path / "run", "lr") == curve(tmp_path / "plain", "lr")
    assert_same_bits(tmp_path / "run", tmp_path / "plain")
    wanted = "learning rate at its peak: 0.02 = optim.lr 0.04, stated for batches of 48, x 24 / 48"
    assert wanted in capfd.readouterr().out


def test_the_average_is_kept_and_evaluated_beside(glyphs_ci, tmp_path, capfd):
    run = tmp_path / "run"
    train_here(run, glyphs_ci / "train", *SHORT, "engine.ema=0.9")
    found = checkpoint.find_latest(run)
    average, trained = checkpoint.read_backbone(found, averaged=True), checkpoint.read_backbone(found)
    assert list(average) == list(trained) and not torch.equal(average["linear.weight"], trained["linear.weight"])
    evaluate_run(run, torch.device("cpu"))
    assert set(json.loads((run / "evaluation.json").read_text())["models"]) == {"trained", "averaged", "untrained"}
    assert "averaged" in capfd.readouterr().out
    write_report([str(run)], str(tmp_path / "report.html"))
    assert '<tr class="averaged">' in (tmp_path / "report.html").read_text()
    # without an average: none; with one again: it begins at the backbone
    train_here(run, glyphs_ci / "train", *SHORT, "run.steps=12")
    assert checkpoint.read_backbone(checkpoint.find_latest(run), averaged=True) is None
    parts = build(config_for(run, glyphs_ci / "train", *SHORT, "engine.ema=0.9"), torch.device("cpu"))
    assert all(torch.equal(v, parts.engine.average[k]) for k, v in parts.engine.backbone.state_dict().items())


def test_another_optimizer_of_the_backbone_is_an_error(glyphs_ci, tmp_path, plain):
    shutil.copytree(plain, tmp_path / "run")
    overrides = (*SHORT, "run.steps=12", "optim.name=adamw", "head.optim.name=sgd")
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", glyphs_ci / "train", *overrides)
    assert messages[0] == messages[1] and "optimizer was written with momentum_buffer, this run's keeps" in messages[0]


@pytest.mark.parametrize("override", ["engine.precision=tf32", "engine.sync_batchnorm=true"])
def test_what_a_cpu_does_not_have_is_one_error(glyphs_ci, tmp_path, override):
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", glyphs_ci / "train", override)
    assert messages[0] == messages[1] and override.partition("=")[0] in messages[0]


@pytest.mark.soak("train")
def test_a_transformer_trains_and_resumes(glyphs_ci, tmp_path):
    options = (
        *SHORT,
        "backbone.name=timm/test_vit",
        "optim.name=adamw",
        "optim.lr=0.001",
        "head.optim.name=adamw",
        "engine.checkpoint_activations=true",
    )
    run_ranks(train_here, 2, tmp_path / "whole", glyphs_ci / "train", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train", *options)
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")
    assert curve(tmp_path / "run")[-1] < curve(tmp_path / "run")[0]


def test_a_setting_that_only_a_start_looks_at_is_told_to_be_without_effect(glyphs_ci, tmp_path, capfd):
    options = (tmp_path / "run", glyphs_ci / "train", *SHORT, *FLOAT16)
    train_here(*options, "run.steps=2", "engine.loss_scale=64", "track.log_every=1")
    train_here(*options, "run.steps=3", "engine.loss_scale=1024", "track.log_every=1")
    output = capfd.readouterr().out
    assert "engine.loss_scale: 64.0 -> 1024.0 (without effect: the checkpoint has it)" in output
    assert "run.steps: 2 -> 3\n" in output
    assert [row["engine.loss_scale"] for row in rows(tmp_path / "run")] == [64.0] * 3
