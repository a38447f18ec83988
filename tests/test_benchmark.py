"""partial-fc benchmark head: the peers compute what they should, and the figures are what was measured."""

import json
import os
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

from partial_fc import PartialFC, cli
from partial_fc.benchmark.compare import Measuring, begin
from partial_fc.benchmark.head import BASELINES, OURS, README, ROWS, TARGETS, _runnable, benchmark_head, sweep
from partial_fc.benchmark.head_steps import LABELS, Cell, build, data
from partial_fc.benchmark.measure import counted
from partial_fc.benchmark.peers import Dense, Limit, Published, head_matmul, torch_matmul
from partial_fc.benchmark.ranks import on_ranks
from partial_fc.head.elementwise import compiler_works
from partial_fc.parallel import distributed
from tests.conftest import run_ranks
from tests.dense import MARGINS

EXACT = 1e-11
C, D, B, STEPS = 23, 5, 6, 3
SGD = dict(lr=0.1, momentum=0.9, weight_decay=5e-3)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(C, (B,), generator=generator)


def train(head) -> dict:
    """Losses, gradients of this rank's embeddings, this rank's weight after every step."""
    mine = distributed.part(B, distributed.rank(), distributed.world_size())
    out = {"loss": [], "gradient": [], "weight": []}
    for step in range(STEPS):
        x, labels = batch(step)
        x = x[mine.start : mine.stop].requires_grad_()
        out["loss"].append(head.step(x, labels[mine.start : mine.stop]))
        out["gradient"].append(x.grad / distributed.world_size())
        out["weight"].append(head.weight.detach().clone())
    return out


def train_published(margin: str) -> dict:
    return train(Published(C, D, MARGINS[margin], **SGD, dtype=torch.float64))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("margin", ["cosface", "arcface"])
def test_published_equals_dense(margin, world_size):
    """Uneven classes; loss, embedding gradients and weight after each of 3 steps."""
    wanted = train(Dense(C, D, MARGINS[margin], **SGD, dtype=torch.float64))
    ranks = run_ranks(train_published, world_size, margin)
    for step in range(STEPS):
        for result in ranks:
            assert abs(result["loss"][step] - wanted["loss"][step]) < EXACT * wanted["loss"][step]
        for name in ("gradient", "weight"):
            got = torch.cat([result[name][step] for result in ranks])
            assert (got - wanted[name][step]).abs().max() < EXACT * wanted[name][step].abs().max(), (name, step)


def test_dense_equals_the_head():
    """The two start from the same centers and take the same steps: what is timed is the same work."""
    wanted = train(Dense(C, D, MARGINS["cosface"], **SGD, dtype=torch.float64))
    head = PartialFC(C, D, MARGINS["cosface"], momentum=0.9, weight_decay=5e-3, dtype=torch.float64)
    for step in range(STEPS):
        x, labels = batch(step)
        loss = head(x.requires_grad_(), labels)
        loss.backward()
        head.step(SGD["lr"])
        assert abs(loss.item() - wanted["loss"][step]) < EXACT * wanted["loss"][step]
        assert (x.grad - wanted["gradient"][step]).abs().max() < EXACT
        assert (head.full_weight() - wanted["weight"][step]).abs().max() < EXACT


@pytest.mark.parametrize("rate", [0.5, 0.2])  # at 0.2 only 4 rows would be drawn: fewer than there are positives
def test_published_updates_the_drawn_rows_alone(rate):
    margin = MARGINS["cosface"]
    head = Published(C, D, margin, rate, **SGD, dtype=torch.float64)
    drawn = []
    for step in range(STEPS):
        x, labels = batch(step)
        weight, velocity = head.weight.detach().clone(), head.momentum.clone()
        loss = head.step(x.clone().requires_grad_(), labels)
        ids = head.ids
        assert set(labels.tolist()) <= set(ids.tolist())
        assert len(ids) == max(int(rate * C), len(labels.unique())) and torch.equal(ids, ids.unique())
        idle = torch.ones(C, dtype=torch.bool)
        idle[ids] = False
        assert torch.equal(head.weight[idle], weight[idle]) and torch.equal(head.momentum[idle], velocity[idle])
        active = weight[ids].requires_grad_()
        cosine = nn.functional.normalize(x) @ nn.functional.normalize(active).T
        at = torch.searchsorted(ids, labels)
        one_hot = nn.functional.one_hot(at, len(ids)).double()
        wanted = nn.functional.cross_entropy(margin.scale * (cosine - margin.margin * one_hot), at)
        wanted.backward()
        assert abs(loss - wanted) < EXACT * wanted
        moved = SGD["momentum"] * velocity[ids] + active.grad + SGD["weight_decay"] * weight[ids]
        assert (head.momentum[ids] - moved).abs().max() < EXACT * moved.abs().max()
        assert (head.weight[ids] - (weight[ids] - SGD["lr"] * moved)).abs().max() < EXACT
        drawn.append(ids.tolist())
    assert drawn[0] != drawn[1]


def test_all_variants_have_the_cells_precision():
    cell = Cell(3000, 64, 32, 1.0, precision="bfloat16")
    cpu = torch.device("cpu")
    batch = data("dense", cell, 0, cpu)
    exact = build("dense", replace(cell, precision="float32"), cpu).step(*batch)
    for variant in ("dense", "published", "recompute", "cache-bf16"):
        loss = build(variant, cell, cpu).step(*batch)
        assert 0 < abs(loss / exact - 1) < 5e-3, variant


def test_dense_with_sampling_moves_every_row():
    head = Dense(C, D, MARGINS["cosface"], 0.5, **SGD, dtype=torch.float64)
    before = head.weight.detach().clone()
    x, labels = batch(0)
    head.step(x.requires_grad_(), labels)
    decayed = before * (1 - SGD["lr"] * SGD["weight_decay"])
    idle = (head.weight - decayed).abs().amax(dim=1) < 1e-14
    assert idle.sum() == C - int(0.5 * C) and not idle[labels].any()


@pytest.mark.parametrize("matmul", [torch_matmul, head_matmul])
def test_the_limit_is_three_products_and_one_pass(matmul):
    """Chunks of 3, 3 and 1 rows. At lr 0 and in the first step the momentum is dW + wd w, the weight stays."""
    head = Limit(7, D, B, matmul, chunk=3, weight_decay=0.5)
    weight = head.weight.clone()
    x = torch.randn(B, D)
    head.step(x, None)
    assert torch.equal(head.weight, weight)
    velocity = torch.cat(
        [optimizer.state[part]["momentum_buffer"] for part, optimizer in zip(head.parts, head.optimizers, strict=True)]
    )
    torch.testing.assert_close(velocity, (x @ weight.T).T @ x + 0.5 * weight)
    torch.testing.assert_close(head.by_embedding, x @ weight[6:].T @ weight[6:])


# ---- measuring


def count_collectives() -> dict:
    with counted() as counts:
        distributed.all_gather(torch.zeros(3))
        distributed.all_reduce_sum(torch.zeros(5))
        distributed.all_reduce_sum(torch.zeros(5))
    distributed.all_reduce_max(torch.zeros(7))
    return counts


@pytest.mark.slow
def test_collectives_are_counted_where_there_are_ranks():
    wanted = {"collectives": {"all_gather": 1, "all_reduce_sum": 2}, "bytes": 4 * (2 * 3 + 5 + 5)}
    assert run_ranks(count_collectives, 2) == [wanted, wanted]
    assert count_collectives() == {"collectives": {}, "bytes": 0}


def test_all_variants_get_the_same_data():
    cell = Cell(100, 4, 8, 1.0)
    (x, labels), (again, same) = (data(name, cell, 3, torch.device("cpu")) for name in ("dense", "limit"))
    assert torch.equal(x, again) and torch.equal(labels, same) and x.requires_grad
    assert not torch.equal(x, data("dense", cell, 4, torch.device("cpu"))[0])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak("benchmark"))])
def test_table_and_json(ranks, tmp_path, capsys):
    cell = Cell(6000, 256, 16, 1.0, ranks)
    variants = ["dense", "published", "recompute", "limit", *(["cache-bf16", "limit-ours"] if ranks == 1 else [])]
    report = benchmark_head(
        [cell], variants, Measuring(3, 1, "cpu", json_file=tmp_path / "out.json", markdown=ranks == 2)
    )
    assert json.loads((tmp_path / "out.json").read_text()) == report
    said = capsys.readouterr().out
    assert report["header"]["torch"] in said and report["header"]["hardware"] in said
    assert report["header"]["clock"] == "cpu" and report["header"]["threads"] == 1
    (of_cell,) = report["cells"]
    assert Cell(**{name: of_cell[name] for name in ("classes", "dim", "batch", "rate", "ranks")}) == cell
    results = of_cell["variants"]
    assert list(results) == [name for name in variants if ranks == 1 or name != "dense"]  # dense: one process
    for name, result in results.items():
        (row,) = [line for line in said.splitlines() if line.strip("| ").split("  ")[0].split(" |")[0] == LABELS[name]]
        assert f"{result['time_ratio']['published']:.2f}" in row
        for clock in ("cpu", "wall"):
            times = result["clocks"][clock]
            assert len(times["rounds"]) == 3 and 0 < times["low"] <= times["median"] <= times["high"]
        for baseline in set(BASELINES) & set(results):
            pairs = zip(result["time"]["rounds"], results[baseline]["time"]["rounds"], strict=True)
            assert result["time_ratio"][baseline] == median(one / other for one, other in pairs)
    state = 2 * 4 * 256 * cell.classes_of_rank
    recompute, published = results["recompute"], results["published"]
    # weight and momentum are touched, and no more than a few chunks come on top
    assert 0.95 * state < recompute["memory"] < 2.5 * state < published["memory"]
    assert recompute["bytes_per_class"] == recompute["memory"] / cell.classes_of_rank
    assert published["memory_ratio"]["published"] == 1
    assert recompute["memory_ratio"]["published"] == recompute["memory"] / published["memory"]
    assert results["limit"]["memory"] is None and results["limit"]["loss"] is None
    assert abs(recompute["loss"] - published["loss"]) < 1e-3
    if ranks == 1:
        assert recompute["bytes"] == published["bytes"] == 0
        return
    assert recompute["collectives"] == {"all_gather": 1, "all_reduce_sum": 1, "reduce_scatter_sum": 1}
    assert recompute["bytes"] == 16 * (256 + 2) * 4 + 4 * 16 * 8 + 16 * 256 * 4
    assert sum(published["collectives"].values()) == 5 + ranks
    assert published["bytes"] == 16 * (256 * 4 + 8) + 3 * 16 * 4 + 16 * 256 * 4


@pytest.mark.slow
def test_growth_compares_cells_in_turn(capsys):
    cells = [Cell(2000, 8, 8, 0.1), Cell(20_000, 8, 8, 0.01)]
    report = benchmark_head(cells, ["recompute"], Measuring(3, 1, "cpu"), growth=True)
    small, large = (cell["variants"]["recompute"]["time"]["rounds"] for cell in report["cells"])
    (growth,) = report["growth"]
    assert growth["classes"] == [2000, 20_000]
    assert growth["time_ratio"][1] == median(b / a for a, b in zip(small, large, strict=True))
    assert f"time at C=20,000 / time at C=2,000: {growth['time_ratio'][1]:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_profile_says_where_the_time_goes(capsys):
    cell = Cell(3000, 128, 64, 1.0)
    report = benchmark_head([cell], ["published", "recompute"], Measuring(1, 1, "cpu"), profile=True)
    variants = report["cells"][0]["variants"]
    assert "profile" not in variants["published"]
    operations = variants["recompute"]["profile"]
    named = {one["operation"]: one for one in operations}
    assert named["mkldnn::_linear_pointwise"]["calls"] == 8  # four products for each of two chunks
    assert [one["ms"] for one in operations[:-1]] == sorted((one["ms"] for one in operations[:-1]), reverse=True)
    assert "ours recompute, " in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiler_is_looked_for_where_it_is_needed():
    """It takes 5 s of CPU."""
    (header, compiler), (same, nobody) = (
        begin(Measuring(1, 1, "cpu"), compiles=compiles) for compiles in (True, False)
    )
    assert compiler == compiler_works("cpu") and nobody is False
    assert header == same and "compiler" not in header


@pytest.mark.soak("benchmark")
def test_compiled_variants_are_measured():
    """Without names: all that can run here."""
    assert compiler_works("cpu")
    report = benchmark_head([Cell(6000, 256, 16, 1.0)], None, Measuring(3, 1, "cpu"))
    results = report["cells"][0]["variants"]
    assert list(results) == list(LABELS)
    for name in ("recompute", "cache-fp32", "cache-bf16"):
        plain, compiled = results[name], results[f"{name}-compiled"]
        assert abs(plain["loss"] - compiled["loss"]) < 1e-3 and 0.5 < compiled["memory"] / plain["memory"] < 2


def test_presets_and_targets():
    assert {target.cell for target in TARGETS} <= set(README)
    assert {target.against for target in TARGETS} <= set(BASELINES)
    assert [cell.rows for cell in ROWS] == [100_000, 100_000]
    assert set(LABELS) == {*BASELINES, *OURS}
    assert sweep([10, 20], [4], [8], [1.0, 0.5], [2], ["tf32"])[1] == Cell(10, 4, 8, 0.5, 2, "tf32")


# ---- errors


def fail(how: str) -> None:
    if distributed.rank() == 1:
        if how == "raise":
            raise ValueError("this is wrong")
        os._exit(7)
    distributed.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("how, message", [("raise", "this is wrong"), ("exit", "process 1 ended with exit code 7")])
def test_a_rank_that_fails_ends_the_others(how, message):
    with pytest.raises(distributed.RunError, match=message):
        on_ranks(fail, 2, "cpu", how)


def test_without_a_compiler_the_rest_is_measured():
    assert _runnable(None, False, True, "cpu") == list(LABELS)
    for device in ("cpu", "cuda"):
        assert _runnable(None, False, False, device) == [name for name in LABELS if "compiled" not in name]
        assert _runnable(None, True, False, device) == ["recompute"]
    with pytest.raises(ValueError, match="finds no compiler here"):
        _runnable(["dense", "cache-bf16-compiled"], False, False, "cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--variants", "dens"), "error: --variants: got 'dens'; wanted some of dense, published"),
        (("--batch", "5", "--ranks", "2"), "error: --batch 5 on 2 ranks"),
        (("--classes", "1", "--ranks", "2"), "wanted classes for every rank"),
        (("--precision", "fp16"), "error: matmul_precision is 'fp16'; give 'float32', 'tf32' or 'bfloat16'"),
        (("--precision", "tf32"), "error: matmul_precision 'tf32' is something that CUDA devices do"),
        (("--rate", "1.5"), "wanted positive sizes and a rate in (0, 1]"),
        (("--json", "nowhere/out.json"), "No such file or directory: 'nowhere/out.json'"),
    ],
)
def test_errors_are_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["partial-fc", "benchmark", "head", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert message in capsys.readouterr().err + str(end.value.code)
