"""partial-fc benchmark backbone: each variant is the engine it says, and the figures are what was measured."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

from partial_fc import backbone, cli
from partial_fc.benchmark.backbone import _runnable, benchmark_backbone
from partial_fc.benchmark.backbone_steps import LR, Backbone, Cell, data, measure_memory, settings_of
from partial_fc.benchmark.compare import Measuring
from partial_fc.benchmark.ranks import on_ranks
from partial_fc.config import Engine, Optim
from partial_fc.parallel import distributed
from tests.conftest import run_ranks

CPU = torch.device("cpu")
SMALL = Cell("smallnet", 8, 32, 8)
TWO = replace(SMALL, batch=2)  # for fp16, which takes a CPU 10 times as long


@pytest.mark.slow
def test_a_variant_is_its_engine():
    assert settings_of("fp32") == Engine()
    assert settings_of("bf16+channels_last+ema") == Engine(precision="bf16", channels_last=True, ema=0.9999)
    images = data("fp32", TWO, 0, CPU)[0]
    seen = {}
    for variant in ("fp32", "bf16", "fp16", "channels_last", "checkpoint_activations", "ema"):
        net = Backbone(variant, TWO, CPU)
        convolution = next(module for module in net.engine.backbone.modules() if isinstance(module, nn.Conv2d))
        outputs = []
        convolution.register_forward_hook(lambda module, inputs, out, outputs=outputs: outputs.append(out))
        net.engine.backward(net.engine(images).sum())
        last = outputs[0].is_contiguous(memory_format=torch.channels_last)
        seen[variant] = (outputs[0].dtype, last, len(outputs), net.engine.average is not None)
    plain = (torch.float32, False, 1, False)
    assert (
        seen
        == {
            "fp32": plain,
            "bf16": (torch.bfloat16, *plain[1:]),
            "fp16": (torch.float16, *plain[1:]),
            "channels_last": (torch.float32, True, 1, False),
            "checkpoint_activations": (torch.float32, False, 2, False),  # once more in the backward
            "ema": (*plain[:3], True),
        }
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("bf61", "got 'bf61' in 'bf61'; wanted some of fp32, tf32"),
        ("bf16+", r"got '' in 'bf16\+'"),
        ("bf16+fp16", "one setting twice"),
        ("fp32+bf16", "one setting twice"),
        ("ema+ema", "one setting twice"),
    ],
)
def test_what_is_no_variant(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings_of(wrong)


def test_a_step_is_a_training_step():
    """What is timed moves the parameters as torch's own gradient and SGD do."""
    net = Backbone("fp32", SMALL, CPU).engine.backbone
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=Optim().weight_decay)
    images, targets = data("fp32", SMALL, 0, CPU)
    trained = Backbone("fp32", SMALL, CPU)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (net(images) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert trained.step(images, targets).item() == pytest.approx(losses[-1], rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]  # another gradient would show in the table
    for parameter, wanted in zip(trained.engine.backbone.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-7)


def test_a_step_that_would_be_skipped_is_an_error():
    net = Backbone("fp16", TWO, CPU)
    images, targets = data("fp16", TWO, 0, CPU)
    with pytest.raises(distributed.RunError, match="are not finite; leave out fp16"):
        net.step(images, torch.inf * targets)


def steps_of_a_rank() -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's images, and all parameters after 3 steps."""
    net, batch = Backbone("fp32", SMALL, CPU), data("fp32", SMALL, 0, CPU)
    for _ in range(3):
        net.step(*batch)
    return batch[0], torch.cat([parameter.detach().flatten() for parameter in net.engine.backbone.parameters()])


@pytest.mark.slow
def test_ranks_share_one_batch():
    ranks = run_ranks(steps_of_a_rank, 2)
    images, alone = steps_of_a_rank()
    assert torch.equal(torch.cat([images for images, _ in ranks]), images)
    assert torch.equal(ranks[0][1], ranks[1][1])
    torch.testing.assert_close(ranks[0][1], alone, rtol=1e-4, atol=1e-5)  # smallnet has no batch norm


@pytest.mark.soak("benchmark")
def test_memory():
    """Kept: parameters, gradients, momentum, buffers, whatever the batch; an average has two of them once more.

    Peak: what the process takes from the system is what torch counts. 32 images: activations of 25 MiB.
    """
    cell = Cell("mobilefacenet", 8, 32, 32)
    two = replace(cell, batch=2)
    net = Backbone("fp32", cell, CPU).engine.backbone
    parameters, buffers = (sum(t.nbytes for t in tensors) for tensors in (net.parameters(), net.buffers()))
    trained = sum(parameter.nbytes for parameter in net.parameters() if parameter.requires_grad)
    assert buffers > 0
    kept = {}
    for variant in ("fp32", "fp16", "ema"):
        net, batch = Backbone(variant, two, CPU), data(variant, two, 0, CPU)
        net.step(*batch)
        kept[variant] = net.kept()
    whole = parameters + 2 * trained + buffers
    assert kept == {"fp32": whole, "fp16": whole, "ema": whole + parameters + buffers}
    plain, recomputed = (
        on_ranks(measure_memory, 1, "cpu", cell, variant, 1, "cpu")[0] for variant in ("fp32", "checkpoint_activations")
    )
    assert plain[0] == recomputed[0] == whole
    assert recomputed[1] < 0.6 * plain[1]
    assert plain[1] == pytest.approx(counted_by_torch(cell), rel=0.05)


def counted_by_torch(cell: Cell) -> int:
    """The peak of a step's tensors, by the profiler's record of every allocation."""
    net, batch = Backbone("fp32", cell, CPU), data("fp32", cell, 0, CPU)
    for _ in range(2):
        net.step(*batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        net.step(*batch)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak("benchmark"))])
def test_table_and_json(ranks, tmp_path, capsys):
    cell = Cell("smallnet", 8, 32, 8, ranks)
    variants = ["bf16", "channels_last+ema"] if ranks == 1 else ["bf16"]
    report = benchmark_backbone(
        cell, variants, Measuring(3, 1, "cpu", json_file=tmp_path / "out.json", markdown=ranks == 2)
    )
    assert json.loads((tmp_path / "out.json").read_text()) == report
    said = capsys.readouterr().out
    assert report["header"]["hardware"] in said and f"{ranks} rank" in said
    results = report["variants"]
    assert list(results) == ["fp32", *variants]
    plain = results["fp32"]
    assert plain["time_ratio"] == plain["memory_ratio"] == 1
    for name, result in results.items():
        assert set(result) == {"clocks", "time", "loss", "time_ratio", "kept", "peak", "memory_ratio"}
        pairs = zip(result["time"]["rounds"], plain["time"]["rounds"], strict=True)
        assert result["time_ratio"] == median(one / other for one, other in pairs)
        assert result["memory_ratio"] == (result["kept"] + result["peak"]) / (plain["kept"] + plain["peak"])
        assert result["peak"] > 0
        assert abs(result["loss"] - plain["loss"]) < 0.1 * plain["loss"]
        (row,) = [line for line in said.splitlines() if line.strip("| ").split("  ")[0].split(" |")[0] == name]
        assert f"{result['time_ratio']:.2f}" in row
        assert f"{result['kept'] / 2**20:,.0f} + {result['peak'] / 2**20:,.0f}" in row


@pytest.mark.soak("benchmark")
def test_a_compiled_variant_is_measured():
    results = benchmark_backbone(SMALL, ["compile"], Measuring(3, 1, "cpu"))["variants"]
    plain, compiled = results["fp32"], results["compile"]
    assert abs(compiled["loss"] - plain["loss"]) < 0.1 * plain["loss"] and compiled["kept"] == plain["kept"]


def test_what_can_run_here():
    net = backbone.build("smallnet", 8, (32, 32))
    with_compiler, without = (_runnable(None, "cpu", net, compiler) for compiler in (True, False))
    assert with_compiler[0] == "fp32" and not {"tf32", "fp16"} & set(with_compiler)
    assert [name for name in with_compiler if "compile" not in name] == without
    assert {"tf32", "fp16"} < set(_runnable(None, "cuda", net, True))
    assert _runnable(["bf16", "fp32", "ema+bf16", "bf16+ema", "fp32+ema"], "cpu", net, True) == [
        *("fp32", "bf16", "ema+bf16", "fp32+ema")
    ]
    with pytest.raises(ValueError, match="finds no compiler here; leave out ema.compile"):
        _runnable(["ema+compile"], "cpu", net, False)
    with torch.device("meta"):
        cannot = backbone.build("timm/dla34", 8, (32, 32))
    assert "checkpoint_activations" not in _runnable(None, "cpu", cannot, True)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--variants", "bf61"), "--variants: got 'bf61'"),
        (("--variants", "tf32"), "tf32 is something that CUDA devices do"),
        (("--backbone", "smallent"), "did you mean 'smallnet'?"),
        (("--size", "40"), "wanted sides that are multiples of 16"),
        (("--size", "0"), "--size and --ranks are 0 and 1; both must be positive"),
        (("--ranks", "0"), "--size and --ranks are 112 and 0; both must be positive"),
        (("--batch", "5", "--ranks", "2"), "--batch 5 on 2 ranks; wanted equal batches"),
        (("--batch", "1"), "of 2 images or more"),
        (("--rounds", "0"), "both must be positive"),
        pytest.param(
            ("--backbone", "timm/dla34", "--size", "32", "--batch", "2", "--variants", "checkpoint_activations"),
            "engine.checkpoint_activations: this backbone cannot",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_errors_are_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["partial-fc", "benchmark", "backbone", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.removesuffix("\n")
    assert message in said and said.startswith("error: ") and "\n" not in said
