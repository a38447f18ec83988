"""Checkpoints: complete or invisible, by class, for any number of ranks, and safe to read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from partial_fc import (
    AdaFace,
    CenterLoss,
    CosFace,
    CurricularFace,
    Margin,
    PartialFC,
    Softmax,
    SubCenterArcFace,
    checkpoint,
)
from partial_fc.head.sampling import HardNegatives, tables
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import DDPEngine
from tests.conftest import REPOSITORY, run_ranks

CLASSES, DIM = 23, 4
NAMES = [f"class {number}\n" for number in range(CLASSES)]


def trained(
    rate: float = 0.3, num_classes: int = CLASSES, steps: int = 5, margin: Margin | None = None, **options
) -> tuple:
    head = PartialFC(num_classes, DIM, margin, rate, dtype=torch.float64, **options)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, DIM), nn.BatchNorm1d(DIM)).double()
    engine = DDPEngine(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), torch.device("cpu"))
    go_on(head, engine, range(steps))
    return head, engine


def go_on(head: PartialFC, engine: DDPEngine, steps: range) -> None:
    for step in steps:
        x = torch.randn(12, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        labels = torch.arange(12) * 3 % head.num_classes
        mine = distributed.part(12, distributed.rank(), distributed.world_size())
        engine.backward(head(engine(x[mine.start : mine.stop]), labels[mine.start : mine.stop]))
        head.step(0.1)
        engine.step(0.1)


def own_loop(run: Path, stop: int) -> tuple[int, torch.Tensor]:
    """The README's program, which here saves every 4 steps and after 6: the step it began at, all parameters."""
    section = (REPOSITORY / "README.md").read_text().partition("\n## The head in your own loop")[2]
    (program,) = [code for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "checkpoint.save" in code]
    for words, ours in (("runs/mine", str(run)), ("classes.txt", str(run / "names.txt")), ("% 1000", "% 4")):
        assert words in program
        program = program.replace(words, ours)

    def batches_from(step: int):
        begun.append(step)
        for number in range(step, stop):
            x = torch.randn(12, 3, generator=torch.Generator().manual_seed(number))
            labels = torch.arange(12) * (number + 3) % CLASSES
            mine = distributed.part(12, distributed.rank(), distributed.world_size())
            yield x[mine.start : mine.stop], labels[mine.start : mine.stop]

    begun = []
    torch.manual_seed(0)
    model = nn.Linear(3, DIM)
    names = {
        "num_classes": CLASSES,
        "embedding_dim": DIM,
        "device": torch.device("cpu"),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "batches_from": batches_from,
        "last_step": 6,
    }
    exec(program, names)
    return begun[0], torch.cat([names["head"].full_weight().flatten(), model.weight.detach().flatten()])


@pytest.mark.slow
def test_the_loop_of_the_readme_goes_on_at_another_number_of_ranks(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "names.txt").write_text("a name\n" * CLASSES)
    ((begun, wanted),) = run_ranks(own_loop, 1, tmp_path / "whole", 6)
    assert begun == 0
    run_ranks(own_loop, 2, tmp_path / "broken", 5)  # step 5 is lost
    for begun, got in run_ranks(own_loop, 3, tmp_path / "broken", 6):
        assert begun == 4
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert checkpoint.find_latest(tmp_path / "broken").step == 6


def save_here(
    run: Path, rate: float = 0.3, num_classes: int = CLASSES, margin: Margin | None = None, options: dict | None = None
) -> torch.Tensor:
    head, engine = trained(rate, num_classes, margin=margin, **(options or {}))
    (run / "names.txt").write_text("".join(NAMES))
    checkpoint.save(
        run, 5, head=head, engine=engine, classes=run / "names.txt", settings={"order": {}, "config": {}}, keep=2
    )
    return head.full_weight()


def load_here(run: Path, rate: float = 0.3, num_classes: int = CLASSES, dim: int = DIM) -> tuple | str:
    head, engine = trained(rate, num_classes, steps=0)
    if dim != DIM:
        head = PartialFC(num_classes, dim, CosFace(), rate, dtype=torch.float64)
    try:
        checkpoint.load(checkpoint.find_latest(run), head=head, engine=engine)
    except distributed.RunError as error:
        return str(error)
    return head.full_weight(), engine.backbone_state(), engine.optimizer_state(), head.step_count


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [CLASSES, 2])
@pytest.mark.parametrize("saved, loaded", [(2, 3), (3, 1), (1, 4), (4, 2)])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, saved, loaded, num_classes):
    wanted = run_ranks(save_here, saved, tmp_path, 0.3, num_classes)[0]
    for weight, _, optimizer, step_count in run_ranks(load_here, loaded, tmp_path, 0.3, num_classes):
        assert torch.equal(weight, wanted) and step_count == 5
        assert set(optimizer) == {f"{name}.momentum_buffer" for name in ("0.weight", "0.bias", "1.weight", "1.bias")}


ADAMW = dict(optimizer="adamw", cache_bytes=1000, cache_dtype=torch.bfloat16)


def more(run: Path | None, steps: int) -> tuple[list[torch.Tensor], int]:
    """The centers' state after five steps and some more: from the checkpoint, or all at once; updates counted."""
    head, engine = trained(steps=0 if run else 5, **ADAMW)
    if run:
        checkpoint.load(checkpoint.find_latest(run), head=head, engine=engine)
    go_on(head, engine, range(5, 5 + steps))
    return list(head.centers.state().values()), head.centers.updates


@pytest.mark.slow
def test_adamw_goes_on_where_it_was(tmp_path):
    """Bias corrections count the head's updates, which a checkpoint keeps."""
    run_ranks(save_here, 2, tmp_path, 0.3, CLASSES, None, ADAMW)
    for (resumed, updates), (whole, _) in zip(
        run_ranks(more, 2, tmp_path, 5), run_ranks(more, 2, None, 5), strict=True
    ):
        assert updates == 10 and len(resumed) == 3 and all(map(torch.equal, resumed, whole))
    here, there = run_ranks(more, 3, tmp_path, 0), run_ranks(more, 2, None, 0)
    for name in range(3):
        of_three, of_two = (torch.cat([state[name] for state, _ in ranks]) for ranks in (here, there))
        assert torch.equal(of_three, of_two) and of_two.abs().max() > 0
    assert all(updates == 5 for _, updates in here)


def test_another_optimizer_is_an_error(tmp_path):
    save_here(tmp_path, options=ADAMW)
    message = "written with exp_avg, exp_avg_sq, weight, this run keeps momentum, weight: put head.optim.name"
    assert message in load_here(tmp_path)


def test_small_parts_are_cut_and_joined(tmp_path, monkeypatch):
    head, engine = trained(1.0, steps=3)
    (tmp_path / "names.txt").write_text("")
    monkeypatch.setattr(checkpoint, "PART_BYTES", 5 * 2 * DIM * 8)  # five rows of weight and momentum
    checkpoint.save(tmp_path, 3, head=head, engine=engine, classes=tmp_path / "names.txt", settings={}, keep=1)
    found = checkpoint.find_latest(tmp_path)
    parts = [entry["classes"] for entry in found.files() if "classes" in entry]
    assert parts == [[0, 5], [5, 10], [10, 15], [15, 20], [20, 23]]
    assert torch.equal(load_here(tmp_path, 1.0)[0], head.full_weight())


@pytest.mark.slow
def test_a_part_is_named_by_its_classes_and_holds_rows_of_everything(tmp_path):
    run_ranks(save_here, 2, tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000005"
    with safe_open(folder / "centers_000000000012_000000000023.safetensors", framework="pt") as part:
        assert {name: part.get_slice(name).get_shape() for name in part.keys()} == {  # noqa: SIM118
            "weight": [11, DIM],
            "momentum": [11, DIM],
            "last_update": [11],
        }
    assert (folder / "classes.txt").read_text() == "".join(NAMES)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_without_its_manifest_there_is_no_checkpoint(tmp_path):
    assert checkpoint.find_latest(tmp_path) is None
    save_here(tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000005"
    later = tmp_path / "checkpoints" / "step_00000009"
    shutil.copytree(folder, later)
    (later / "manifest.json").unlink()  # as a kill in the middle of saving leaves it
    assert checkpoint.find_latest(tmp_path).step == 5
    with pytest.raises(ValueError, match="holds no manifest.json, so it is no complete checkpoint"):
        checkpoint.open_checkpoint(later)


def test_only_the_newest_are_kept(tmp_path):
    head, engine = trained()
    (tmp_path / "names.txt").write_text("")
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, head=head, engine=engine, classes=tmp_path / "names.txt", settings={}, keep=2)
    assert sorted(f.name for f in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000003", "step_00000004"]


def damage(folder: Path, kind: str) -> None:
    part = next(folder.glob("centers_*"))
    if kind == "flipped":
        data = bytearray(part.read_bytes())
        data[-3] ^= 1
        part.write_bytes(data)
    elif kind == "truncated":
        part.write_bytes(part.read_bytes()[:-8])
    else:
        part.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, message",
    [("flipped", "is damaged: its SHA-256"), ("truncated", "bytes, the manifest says"), ("gone", "is missing")],
)
def test_damage_is_one_error_on_all_ranks(tmp_path, kind, message):
    run_ranks(save_here, 2, tmp_path)
    damage(tmp_path / "checkpoints" / "step_00000005", kind)
    answers = run_ranks(load_here, 3, tmp_path)
    assert len(set(answers)) == 1
    assert message in answers[0] and "there is no other checkpoint beside" in answers[0]


def test_another_head_is_an_error_that_names_both(tmp_path):
    save_here(tmp_path)
    assert "written with num_classes 23, this run has 24" in load_here(tmp_path, num_classes=24)
    assert "written with embedding_dim 4, this run has 5" in load_here(tmp_path, dim=5)
    shutil.rmtree(tmp_path / "checkpoints")
    save_here(tmp_path, margin=Softmax())
    assert "written with bias, bias_momentum, momentum, weight, this run keeps" in load_here(tmp_path)


@pytest.mark.slow
def test_parts_that_do_not_tile_the_classes_are_an_error(tmp_path):
    run_ranks(save_here, 2, tmp_path)
    path = tmp_path / "checkpoints" / "step_00000005" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry.get("classes") != [0, 12]]
    path.write_text(json.dumps(manifest))
    assert "its parts hold classes [[12, 23]], which do not tile the 23 there are" in load_here(tmp_path)


def test_newer_and_foreign_manifests_are_errors(tmp_path, capsys):
    save_here(tmp_path)
    path = tmp_path / "checkpoints" / "step_00000005" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(ValueError, match="has checkpoint version 2; this partial_fc reads up to 1: upgrade it"):
        checkpoint.find_latest(tmp_path)
    path.write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(ValueError, match="has format 'other'"):
        checkpoint.open_checkpoint(path.parent)
    assert checkpoint.find_latest(tmp_path) is None  # another tool's
    assert "step_00000005/manifest.json has format 'other'" in capsys.readouterr().err


def save_where_one_rank_cannot(run: Path) -> str:
    head, engine = trained()
    (run / "names.txt").write_text("")
    written = checkpoint._write

    def full_disk(path, tensors):
        if distributed.rank() == 1:
            raise OSError(28, "No space left on device")
        return written(path, tensors)

    checkpoint._write = full_disk
    try:
        checkpoint.save(run, 9, head=head, engine=engine, classes=run / "names.txt", settings={}, keep=1)
    except distributed.RunError as error:
        return str(error)
    finally:
        checkpoint._write = written
    return "no error"


@pytest.mark.slow
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_loses_nothing(tmp_path):
    run_ranks(save_here, 3, tmp_path)
    answers = run_ranks(save_where_one_rank_cannot, 3, tmp_path)
    assert len(set(answers)) == 1 and "failed on rank 1" in answers[0] and "No space left" in answers[0]
    assert checkpoint.find_latest(tmp_path).step == 5


def test_the_backbone_alone(tmp_path):
    save_here(tmp_path)
    state = checkpoint.read_backbone(checkpoint.find_latest(tmp_path))
    assert torch.equal(state["0.weight"], load_here(tmp_path)[1]["0.weight"])


def hard_negatives(run: Path, steps: range, neighbours: int | None = 2) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Trains `steps` from the latest checkpoint, with a refresh at steps 4, 8, ..., and saves; centers and table."""
    sampler = None if neighbours is None else HardNegatives(neighbours, every=4)
    head = PartialFC(CLASSES, DIM, CosFace(), 0.1, sampler=sampler, dtype=torch.float64)
    _, engine = trained(steps=0)
    found = checkpoint.find_latest(run)
    if found is not None:
        for table in tables(head).values():
            table.fill_(7)  # loading leaves nothing of what was there
        checkpoint.load(found, head=head, engine=engine)
    assert head.step_count == steps.start
    for step in steps:
        x = torch.randn(12, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        labels = (torch.arange(12) // 4 * 3 + step) % CLASSES
        mine = distributed.part(12, distributed.rank(), distributed.world_size())
        head.begin_step(step, labels)
        head(x[mine.start : mine.stop] @ torch.ones(3, DIM).double().triu(), labels[mine.start : mine.stop]).backward()
        head.step(0.1)
    (run / "names.txt").write_text("")
    checkpoint.save(run, steps.stop, head=head, engine=engine, classes=run / "names.txt", settings={}, keep=9)
    return head.full_weight(), tables(head).get("neighbours")


def sums(run: Path, step: int) -> dict[str, str]:
    found = checkpoint.open_checkpoint(run / "checkpoints" / f"step_{step:08d}")
    return {entry["name"]: entry["sha256"] for entry in found.files()}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4, 6], ids=["before the first refresh", "before a refresh", "between two"])
def test_hard_negatives_resume_bit_for_bit(tmp_path, stop):
    (tmp_path / "whole").mkdir()
    (tmp_path / "run").mkdir()
    run_ranks(hard_negatives, 2, tmp_path / "whole", range(11))
    run_ranks(hard_negatives, 2, tmp_path / "run", range(stop))
    run_ranks(hard_negatives, 2, tmp_path / "run", range(stop, 11))
    assert sums(tmp_path / "run", 11) == sums(tmp_path / "whole", 11)


@pytest.mark.slow
@pytest.mark.parametrize("saved, loaded", [(2, 3), (3, 1), (1, 4)])
def test_hard_negatives_resume_at_another_number_of_ranks(tmp_path, saved, loaded):
    """From step 6: steps 6 and 7 use the table of step 4, which cannot be had from the centers any more."""
    whole, table = run_ranks(hard_negatives, saved, tmp_path, range(6))[0]
    for resumed, same in run_ranks(hard_negatives, loaded, tmp_path, range(6, 6)):
        assert torch.equal(same, table) and (table >= 0).all() and torch.equal(resumed, whole)
    wanted, _ = run_ranks(hard_negatives, saved, tmp_path, range(6, 8))[0]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000008")
    for got, _ in run_ranks(hard_negatives, loaded, tmp_path, range(6, 8)):
        assert (got - wanted).abs().max() < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("saved, loaded", [(None, 2), (2, None), (2, 3)])
def test_another_sampler_has_no_table_until_its_next_refresh(tmp_path, saved, loaded):
    run_ranks(hard_negatives, 2, tmp_path, range(6), saved)
    for _, table in run_ranks(hard_negatives, 2, tmp_path, range(6, 8), loaded):
        assert table is None if loaded is None else (table == -1).all()
    for _, table in run_ranks(hard_negatives, 2, tmp_path, range(8, 9), loaded):
        assert table is None if loaded is None else (table >= 0).all()


ADAFACE = AdaFace(momentum=0.25)


def statistics(run: Path | None, margin: Margin, steps: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The margin's running statistics and the centers after five steps, from the checkpoint or not, and some more."""
    head, engine = trained(steps=0 if run else 5, margin=margin)
    if run:
        checkpoint.load(checkpoint.find_latest(run), head=head, engine=engine)
    go_on(head, engine, range(5, 5 + steps))
    return head.statistics, head.full_weight()


KEPT = {  # margin, and what it keeps
    "adaface": (ADAFACE, {"length_mean", "length_deviation"}),
    "curricularface": (CurricularFace(momentum=0.5), {"t"}),
    "learned-scale": (CosFace(scale=12.0, learn_scale=True), {"scale", "scale_momentum"}),
    "sub-centers": (SubCenterArcFace(scale=24.0, sub_centers=2), set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("saved, loaded", [(2, 3), (3, 1), (1, 4)])
@pytest.mark.parametrize("kind", KEPT)
def test_running_statistics_are_kept_for_any_number_of_ranks(tmp_path, kind, saved, loaded):
    """At the same number they also go on: the next test."""
    margin, names = KEPT[kind]
    run_ranks(save_here, saved, tmp_path, 0.3, CLASSES, margin)
    wanted, weight = run_ranks(statistics, saved, None, margin, 0)[0]
    first = PartialFC(CLASSES, DIM, margin).statistics
    assert set(wanted) == names and not any(torch.equal(wanted[name], first[name]) for name in names)
    for found, read in run_ranks(statistics, loaded, tmp_path, margin, 0):
        assert all(torch.equal(found[name], wanted[name]) for name in names) and torch.equal(read, weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEPT)
def test_running_statistics_go_on_where_they_were(tmp_path, kind):
    margin, _ = KEPT[kind]
    run_ranks(save_here, 2, tmp_path, 0.3, CLASSES, margin)
    whole, weight = run_ranks(statistics, 2, None, margin, 4)[0]
    for found, resumed in run_ranks(statistics, 2, tmp_path, margin, 4):
        assert all(torch.equal(found[name], whole[name]) for name in whole) and torch.equal(resumed, weight)


def feature_centers(run: Path | None, steps: int) -> torch.Tensor:
    """As `statistics`, the feature centers of a center loss, of all ranks."""
    head, engine = trained(steps=0 if run else 5, **CENTER_LOSS)
    if run:
        checkpoint.load(checkpoint.find_latest(run), head=head, engine=engine)
    go_on(head, engine, range(5, 5 + steps))
    return torch.cat(distributed.gather_objects(head.feature_centers.value.clone()))


CENTER_LOSS = dict(embedding_losses=[CenterLoss(weight=1.0)])


@pytest.mark.slow
@pytest.mark.parametrize("saved, loaded", [(2, 2), (2, 3), (3, 1), (1, 4)])
def test_feature_centers_are_kept_for_any_number_of_ranks(tmp_path, saved, loaded):
    run_ranks(save_here, saved, tmp_path, 0.3, CLASSES, None, CENTER_LOSS)
    wanted = run_ranks(feature_centers, saved, None, 0)[0]
    assert not torch.equal(wanted, PartialFC(CLASSES, DIM, dtype=torch.float64, **CENTER_LOSS).feature_centers.value)
    for found in run_ranks(feature_centers, loaded, tmp_path, 0):
        assert torch.equal(found, wanted)
    if saved == loaded:
        whole = run_ranks(feature_centers, saved, None, 3)[0]
        assert torch.equal(run_ranks(feature_centers, saved, tmp_path, 3)[0], whole)


def test_a_checkpoint_without_feature_centers_leaves_those_of_a_new_run(tmp_path):
    save_here(tmp_path)
    assert torch.equal(feature_centers(tmp_path, 0), trained(steps=0, **CENTER_LOSS)[0].feature_centers.value)


def test_another_number_of_sub_centers_is_an_error(tmp_path):
    save_here(tmp_path, margin=SubCenterArcFace(sub_centers=2))
    for margin, count in ((CosFace(), 1), (SubCenterArcFace(), 3)):
        with pytest.raises(distributed.RunError, match=f"it was written with sub_centers 2, this run has {count}"):
            statistics(tmp_path, margin, 0)


def test_a_checkpoint_of_another_margin_has_no_statistics(tmp_path):
    """They begin where a new run begins; and a margin without statistics takes none from a checkpoint."""
    save_here(tmp_path)
    assert statistics(tmp_path, ADAFACE, 0)[0] == {"length_mean": 20.0, "length_deviation": 100.0}
    shutil.rmtree(tmp_path / "checkpoints")
    save_here(tmp_path, margin=ADAFACE)
    assert statistics(tmp_path, CosFace(), 0)[0] == {}
