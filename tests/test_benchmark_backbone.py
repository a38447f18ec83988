"""partial-fc benchmark backbone: each variant is the engine it says, and the figures are what was measured."""

import json
from statistics import median

import pytest
import torch

from partial_fc import cli
from partial_fc.benchmark.backbone import _runnable, benchmark_backbone
from partial_fc.benchmark.backbones import LR, OPTIONS, Cell, build, data, measure_memory, settings_of
from partial_fc.config import Engine
from tests.conftest import run_ranks

CPU = torch.device("cpu")
SMALL = Cell("smallnet", 8, 32, 8)


def test_a_variant_is_its_engine():
    assert settings_of("fp32") == Engine()
    assert settings_of("bf16+channels_last+ema") == Engine(precision="bf16", channels_last=True, ema=0.9999)
    for name in OPTIONS.keys() - {"tf32"}:  # which a CPU does not have
        assert build(name, SMALL, CPU).engine.settings == Engine(**OPTIONS[name])
    for wrong, message in (("bf61", "got 'bf61'; wanted some of fp32, tf32"), ("bf16+fp16", "two precisions at once")):
        with pytest.raises(ValueError, match=message):
            settings_of(wrong)


def test_a_step_is_a_training_step():
    """What is timed moves the parameters by torch's own gradient and SGD."""
    net = build("fp32", SMALL, CPU).engine.backbone
    images, targets = data("fp32", SMALL, 0, CPU)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    wanted = (net(images) - targets).square().mean()
    gradients = torch.autograd.grad(wanted, list(net.parameters()))
    trained = build("fp32", SMALL, CPU)
    assert trained.step(images, targets) == wanted
    decay = trained.engine.optimizer.defaults["weight_decay"]
    for parameter, old, gradient in zip(trained.engine.backbone.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter, old - LR * (gradient + decay * old))


def steps_of_a_rank() -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's images of step 2, and all parameters after it."""
    net = build("fp32", SMALL, CPU)
    for step in range(3):
        images, targets = data("fp32", SMALL, step, CPU)
        net.step(images, targets)
    return images, torch.cat([parameter.detach().flatten() for parameter in net.engine.backbone.parameters()])


def test_ranks_share_one_batch():
    ranks = run_ranks(steps_of_a_rank, 2)
    assert torch.equal(torch.cat([images for images, _ in ranks]), data("fp32", SMALL, 2, CPU)[0])
    assert torch.equal(ranks[0][1], ranks[1][1])


def test_what_stays_between_steps():
    """Parameters, gradients and momentum; an average is of parameters and buffers once more."""
    kept, _ = measure_memory(SMALL, "fp32", 1, "cpu")
    averaged, _ = measure_memory(SMALL, "ema", 1, "cpu")
    net = build("fp32", SMALL, CPU).engine.backbone
    parameters, buffers = (sum(t.nbytes for t in tensors) for tensors in (net.parameters(), net.buffers()))
    assert kept == 3 * parameters + buffers
    assert averaged == 4 * parameters + 2 * buffers


def test_checkpointed_activations_take_less():
    cell = Cell("smallnet", 8, 64, 32)
    _, plain = measure_memory(cell, "fp32", 1, "cpu")
    _, recomputed = measure_memory(cell, "checkpoint_activations", 1, "cpu")
    assert recomputed < 0.9 * plain


@pytest.mark.parametrize("ranks", [1, 2])
def test_table_and_json(ranks, tmp_path, capsys):
    cell = Cell("smallnet", 8, 32, 8, ranks)
    variants = ["bf16", "channels_last+ema"] if ranks == 1 else ["bf16"]
    report = benchmark_backbone(
        cell, variants, rounds=3, threads=1, device="cpu", json_file=tmp_path / "out.json", markdown=ranks == 2
    )
    assert json.loads((tmp_path / "out.json").read_text()) == report
    said = capsys.readouterr().out
    assert report["header"]["hardware"] in said and f"{ranks} rank" in said
    results = report["variants"]
    assert list(results) == ["fp32", *variants]
    plain = results["fp32"]
    assert plain["time_ratio"] == plain["memory_ratio"] == 1
    for name, result in results.items():
        pairs = zip(result["time"]["rounds"], plain["time"]["rounds"], strict=True)
        assert result["time_ratio"] == median(one / other for one, other in pairs)
        assert result["memory_ratio"] == result["memory"] / plain["memory"]
        assert 0 < result["peak"] < result["memory"] <= result["kept"] + result["peak"]
        assert abs(result["loss"] - plain["loss"]) < 1e-2 * plain["loss"]
        (row,) = [line for line in said.splitlines() if line.strip("| ").split("  ")[0].split(" |")[0] == name]
        assert f"{result['time_ratio']:.2f}" in row and f"{result['kept'] / 2**20:,.0f} + " in row


def test_what_can_run_here():
    with_compiler, without = (_runnable(None, "cpu", compiler) for compiler in (True, False))
    assert with_compiler[0] == "fp32" and not {"tf32", "fp16"} & set(with_compiler)
    assert [name for name in with_compiler if "compile" not in name] == without
    assert {"tf32", "fp16"} < set(_runnable(None, "cuda", True))
    assert _runnable(["bf16", "fp32"], "cpu", True) == ["fp32", "bf16"]
    with pytest.raises(ValueError, match="finds no compiler here; leave out ema.compile"):
        _runnable(["ema+compile"], "cpu", False)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--variants", "bf61"), "error: --variants: got 'bf61'"),
        (("--variants", "tf32"), "tf32 is something that CUDA devices do"),
        (("--backbone", "smallent"), "did you mean 'smallnet'?"),
        (("--size", "40"), "wanted sides that are multiples of 16"),
        (("--batch", "5", "--ranks", "2"), "--batch 5 on 2 ranks; wanted equal batches"),
        (("--batch", "1"), "of 2 images or more"),
        (("--rounds", "0"), "both must be positive"),
    ],
)
def test_errors_are_one_line(options, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["partial-fc", "benchmark", "backbone", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert message in end.value.code
