"""partial-fc benchmark sampler: its figures are a hand computation's, and the run folder stays as it is."""

import hashlib
import math
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch

from partial_fc import cli
from partial_fc.benchmark.sampler import _open, _samplers, benchmark_sampler, rows_in_use
from partial_fc.build import build
from partial_fc.data.reader import normalize
from partial_fc.head.sampling import draw_negatives
from partial_fc.train import read_batches
from tests.conftest import run_ranks
from tests.test_train import config_for, train_here
from tests.test_trust import with_sum

STEPS, BATCHES = 10, 2
CPU = torch.device("cpu")
RUNS = {
    "sampled": (),  # at rate 0.5: rows lag in the checkpoint
    "full": ("head.sample_rate=1",),
    "hard, arcface": (
        "head.sample_rate=0.1",
        "head.hard_negatives={neighbours: 2, every: 5}",
        "head.margin={name: arcface, scale: 80, margin: 0.2}",  # exp(80) is more than float32 holds
    ),
}


SLOW_FIXTURES = ("runs",)  # tests that use one are slow


@pytest.fixture(scope="module")
def runs(glyphs_ci, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for number, overrides in enumerate(RUNS.values()):
        run_ranks(train_here, 1, folder / str(number), glyphs_ci / "train", f"run.steps={STEPS}", *overrides)
    return {name: folder / str(number) for number, name in enumerate(RUNS)}


def contents(run: Path) -> dict[Path, tuple]:
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        for path in run.rglob("*")
    }


def next_batches(run: Path, copy: Path, data: Path, *overrides: str) -> tuple[torch.Tensor, list]:
    """What the run's own build makes of its checkpoint: normalized centers; embeddings and labels of two batches."""
    shutil.copytree(run, copy)
    config = config_for(copy, data, f"run.steps={STEPS + BATCHES}", *overrides)
    parts = build(config, CPU)
    batches = []
    for batch in read_batches(config, parts):
        with torch.no_grad():
            x = parts.engine(normalize(batch.images, config.data.mean, config.data.std)).double()
        batches.append((x / x.norm(dim=1, keepdim=True), batch.labels.tolist()))
    w = parts.head.full_weight().double()
    return w / w.norm(dim=1, keepdim=True), batches


@pytest.mark.parametrize("name", RUNS)
def test_the_figures_are_a_hand_computation(runs, glyphs_ci, tmp_path, name):
    before = contents(runs[name])
    lines = benchmark_sampler(runs[name], CPU, random=[1.0, 0.1], hard=[(3, 0.02), (1, 0.02)], batches=BATCHES)
    assert contents(runs[name]) == before

    w, batches = next_batches(runs[name], tmp_path / "run", glyphs_ci / "train", *RUNS[name])
    count, scale = len(w), 80 if "arcface" in name else 24
    similar = (w @ w.T).tolist()
    for line, (neighbours, rate) in zip(lines, [(0, 1.0), (0, 0.1), (3, 0.02), (1, 0.02)], strict=True):
        rows, shares, hits = [], [], []
        for number, (x, labels) in enumerate(batches):
            used = set(labels) | set(draw_negatives(0, STEPS + number, range(count), count, rate).tolist())
            for label in set(labels):
                others = sorted(set(range(count)) - {label}, key=lambda j, row=similar[label]: -row[j])
                used |= set(others[:neighbours])
            rows.append(len(used))
            for row, label in zip((x @ w.T).tolist(), labels, strict=True):
                z = {j: math.exp(scale * cosine) for j, cosine in enumerate(row) if j != label}
                shares.append(sum(z[j] for j in used - {label}) / sum(z.values()))
                hits.append(max(z, key=z.get) in used)
        assert line["rows"] == mean(rows) and line["fraction"] == pytest.approx(mean(rows) / count, rel=1e-12)
        assert line["mass"] == pytest.approx(mean(shares), rel=1e-9)
        assert line["hardest"] == pytest.approx(mean(hits), rel=1e-9)
    everything = lines[0]
    assert everything["rows"] == count and everything["fraction"] == everything["hardest"] == 1
    assert everything["mass"] == pytest.approx(1, abs=1e-12)
    assert 0.02 < lines[1]["mass"] < 0.5 and lines[3]["rows"] < lines[2]["rows"] < count


def test_hard_rows_hold_the_neighbours_of_every_positive(runs, glyphs_ci, tmp_path):
    config = config_for(tmp_path / "run", glyphs_ci / "train", "run.steps=1", "head.sample_rate=0.5")
    head = build(config, CPU).head
    w = torch.nn.functional.normalize(head.full_weight())
    cosine = (w @ w.T).fill_diagonal_(-2)
    labels = torch.tensor([5, 0, 300, 5])
    samplers = _samplers(head, [0, 4, 2])
    random, four, two = (rows_in_use(head, sampler, 0.01, 7, labels) for sampler in samplers)
    assert random[labels].all() and four[random].all() and two[random].all()
    assert four[cosine[labels].topk(4).indices].all() and two[cosine[labels].topk(2).indices].all()
    assert random.sum() < two.sum() <= random.sum() + 6 and two.sum() < four.sum() <= random.sum() + 12


def test_the_command_prints_one_table(runs, capsys, monkeypatch):
    checkpoint = runs["full"] / "checkpoints" / f"step_{STEPS:08d}"
    arguments = ["--random", "0.1,1", "--hard", "3:0.02", "--batches", "2"]
    monkeypatch.setattr("sys.argv", ["partial-fc", "benchmark", "sampler", str(checkpoint), *arguments])
    cli.main()
    where, meaning, head, *lines = capsys.readouterr().out.splitlines()
    assert where.startswith(f"{checkpoint}: ") and where.endswith("2 batches of 24")
    assert head.split() == ["rows", "of", "all", "mass", "hardest"]
    assert [line.split()[:2] for line in lines] == [["random", "0.1"], ["random", "1"], ["hard", "3:0.02"]]
    assert lines[1].split()[3:] == ["1.000", "1.000", "1.000"]
    assert {len(line) for line in [head, *lines]} == {len(head)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(random=[1.5]), "got the rate 1.5; give a probability"),
        (dict(hard=[(3, 0.0)]), "got the rate 0; give a probability"),
        (dict(hard=[(0, 0.1)]), "got 0:0.1; give 1 neighbour or more"),
        (dict(batches=0), "--batches is 0; give a positive number"),
    ],
)
def test_samplers_out_of_range(runs, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_sampler(runs["full"], CPU, **(dict(random=[0.1], hard=[]) | options))


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint; give a run folder"):
        _open(tmp_path)


@pytest.mark.parametrize("margin", ["{name: softmax}", "{name: cosface, scale: null, margin: 0.1}"])
def test_a_margin_without_a_scale_is_refused(glyphs_ci, tmp_path, margin):
    run_ranks(train_here, 1, tmp_path, glyphs_ci / "train", "run.steps=1", f"head.margin={margin}")
    with pytest.raises(ValueError, match="wanted negatives s cos, each of one center"):
        benchmark_sampler(tmp_path, CPU, random=[0.1], hard=[], batches=1)


def test_other_classes_are_refused(runs, glyphs_ci, tmp_path):
    shutil.copytree(runs["full"], tmp_path / "run")
    names = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / "classes.txt"
    first, *others = names.read_text().splitlines()
    names.write_text("\n".join([*others, first]) + "\n")
    with_sum(names.parent, names.name)
    with pytest.raises(ValueError, match="was written with .* classes"):
        benchmark_sampler(tmp_path / "run", CPU, random=[0.1], hard=[], batches=1)
