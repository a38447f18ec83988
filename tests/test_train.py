"""The real train() on real shards: the same run at any number of ranks, resumed anywhere, stopped cleanly."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from partial_fc import checkpoint
from partial_fc.build import build, check_shared
from partial_fc.config_file import load_config
from partial_fc.data.order import Order
from partial_fc.data.shards import load_index
from partial_fc.evaluate.runs import evaluate_run
from partial_fc.metrics import cut_back
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import DDPEngine
from partial_fc.parallel.watch import Place
from partial_fc.phases import ALONE, NAMES
from partial_fc.train import read_batches, share, the_only_one_in, train
from tests.conftest import REPOSITORY, run_ranks
from tests.processes import Job, is_running, run_program

pytestmark = pytest.mark.slow

CONFIG = REPOSITORY / "configs" / "glyphs_ci.yaml"
QUICK = (
    "run.epochs=null",
    "run.steps=30",
    "data.workers=0",
    "data.global_batch_size=24",  # a step is mostly its images
    "checkpoint.every=10",
    "checkpoint.keep=9",
    "track.log_every=1",
    "data.affine={degrees: 5, translate: 0.05, scale: 0.1}",
    "track.wandb=disabled",
    "optim.lr=0.02",
    "optim.warmup_steps=5",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node")


def config_for(run: Path, data: Path, *overrides: str):
    return load_config(CONFIG, [*QUICK, f"run.dir={run}", f"data.train={data}", *overrides])


def train_here(run: Path, data: Path, *overrides: str) -> bool:
    return train(config_for(run, data, *overrides), torch.device("cpu"))


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in rows(run)]


def states(found: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    """Backbone and class centers."""
    centers = [load_file(found.path / e["name"])["weight"] for e in found.files() if "classes" in e]
    return checkpoint.read_backbone(found) | {"centers": torch.cat(centers)}


def assert_follows(run: Path, other: Path) -> None:
    """The same run in another order of sums: four losses to 1e-6, later ones to 1e-4, tensors to 2e-2 of how far they
    moved between the last two checkpoints.

    In float32 losses were 2e-7 apart and tensors 6e-5, until an activation took the other side of its kink: then 7e-6
    and 3e-3, in two of four sets of CPU instructions. For ten steps at most.
    """
    assert curve(run)[:4] == pytest.approx(curve(other)[:4], rel=1e-6)
    assert curve(run) == pytest.approx(curve(other), rel=1e-4)
    before, last = (checkpoint.find_checkpoint(one) for one in sorted((other / "checkpoints").glob("step_*"))[-2:])
    found, start = states(checkpoint.find_latest(run)), states(before)
    for name, wanted in states(last).items():
        assert (found[name] - wanted).norm() <= 2e-2 * (wanted - start[name]).norm(), name


def checksums(run: Path) -> dict[str, str]:
    """SHA-256 of every file of the latest checkpoint: the state, bit for bit."""
    return {entry["name"]: entry["sha256"] for entry in checkpoint.find_latest(run).files()}


@pytest.fixture(scope="module")
def reference(glyphs_ci, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks, with checkpoints at 10, 20 and 30."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert run_ranks(train_here, 2, run, glyphs_ci / "train") == [True, True]
    return run


def test_the_loss_falls_and_the_row_is_complete(reference):
    losses = curve(reference)
    assert len(losses) == 30 and sum(losses[-5:]) < 0.95 * sum(losses[:5])
    last = rows(reference)[-1]
    assert last["step"] == 30 and last["epoch"] == pytest.approx(30 / (8535 // 24), rel=0.02)
    for name in ("lr", "samples_per_second", "data_wait", "step_time", "memory"):
        assert last[name] > 0, name
    assert -1 <= last["target_cosine"] <= 1 and last["skipped_steps"] == last["undecodable"] == 0


def test_a_row_says_where_the_time_went(reference):
    for row in rows(reference):
        assert sum(row[f"phase.{name}"] for name in NAMES) == pytest.approx(row["step_time"])
        assert row["phase.data"] > 0 and row["phase.backward"] > 0 and row["phase.gather"] > 0
        assert row["slowest_rank"] in (0, 1) and row["slowest_lag"] >= 0 and row["slowest_phase"] in ALONE
        assert row["target_cosine_q10"] <= row["target_cosine_q50"] <= row["target_cosine_q90"]
        assert row["center_norm"] > 0 and row["embedding_norm"] > 0
        assert row["samples_per_second"] == pytest.approx(2 * row["samples_per_second_per_device"])


@pytest.mark.soak("train")
def test_the_same_run_twice_is_the_same_bit_for_bit(reference, glyphs_ci, tmp_path):
    """The second with a profile and TensorBoard, which change nothing."""
    run = tmp_path / "run"
    run_ranks(train_here, 2, run, glyphs_ci / "train", "track.profile=[4,6]", "track.tensorboard=true")
    assert checksums(run) == checksums(reference) and curve(run) == curve(reference)
    for rank in (0, 1):
        with gzip.open(run / "profile" / f"trace_rank{rank}.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("optimizer") == names.count("gather") == 2, "two steps"
        assert "aten::convolution_backward" in (run / "profile" / f"operators_rank{rank}.txt").read_text()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows(run)
    ]
    assert "phase/backward" in events.Tags()["scalars"]


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.soak("train"))])
def test_any_number_of_ranks_follows_the_same_curve(reference, glyphs_ci, tmp_path, world_size):
    run_ranks(train_here, world_size, tmp_path / "run", glyphs_ci / "train")
    assert curve(tmp_path / "run") == pytest.approx(curve(reference), rel=1e-4)
    assert curve(tmp_path / "run", "lr") == curve(reference, "lr")


def batches_seen(run: Path, data: Path) -> list[tuple]:
    config = config_for(run, data, "run.steps=5", "data.affine={degrees: 10, translate: 0.1}")
    mine = [
        (batch.step, batch.labels, batch.images) for batch in read_batches(config, build(config, torch.device("cpu")))
    ]
    gathered = distributed.gather_objects(mine)
    return [
        (steps[0][0], torch.cat([s[1] for s in steps]), torch.cat([s[2] for s in steps]))
        for steps in zip(*gathered, strict=True)
    ]


def test_every_global_batch_holds_the_same_images_at_any_number_of_ranks(glyphs_ci, tmp_path):
    one, two, three = (run_ranks(batches_seen, w, tmp_path / f"{w}", glyphs_ci / "train")[0] for w in (1, 2, 3))
    for other in (two, three):
        for (step, labels, images), (other_step, other_labels, other_images) in zip(one, other, strict=True):
            assert step == other_step and torch.equal(labels, other_labels)
            assert torch.equal(images, other_images), "augmentation depends on the number of ranks"


def interrupted(reference: Path, run: Path, step: int) -> None:
    """A run folder as it is after a kill some steps past the checkpoint of `step`."""
    shutil.copytree(reference, run)
    for folder in (run / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    cut_back(run / "metrics.jsonl", step + 3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')  # torn by the kill


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumes_at_any_number_of_ranks(reference, glyphs_ci, tmp_path, world_size):
    interrupted(reference, tmp_path / "run", 20)
    run_ranks(train_here, world_size, tmp_path / "run", glyphs_ci / "train")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 31))
    if world_size == 2:
        assert curve(tmp_path / "run") == curve(reference)
        assert checksums(tmp_path / "run") == checksums(reference)
    else:
        assert curve(tmp_path / "run") == pytest.approx(curve(reference), rel=1e-4)


def test_three_ranks_resume_bit_for_bit(glyphs_ci, tmp_path):
    """DDP's buckets change their order after its first backward; at three ranks that would change the sums."""
    options = ("run.steps=10", "checkpoint.every=5")
    run_ranks(train_here, 3, tmp_path / "whole", glyphs_ci / "train", *options)
    interrupted(tmp_path / "whole", tmp_path / "run", 5)
    run_ranks(train_here, 3, tmp_path / "run", glyphs_ci / "train", *options)
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")


OPTIONS = {
    "adamw, cached": ("head.optim.name=adamw", "head.optim.lr=0.01", "head.cache_bytes=100000"),
    "compiled": ("head.compile=true", "head.sample_rate=1"),
    "bfloat16": ("head.matmul_precision=bfloat16", "head.cache_bytes=50000", "head.cache_dtype=bfloat16"),
}


@pytest.mark.parametrize(
    "options",
    [pytest.param(name, marks=pytest.mark.soak("compiled")) if name == "compiled" else name for name in OPTIONS],
)
def test_options_of_the_head_resume_bit_for_bit(glyphs_ci, tmp_path, options):
    overrides = (*OPTIONS[options], "optim.schedule=constant", "checkpoint.every=5")
    run_ranks(train_here, 2, tmp_path / "whole", glyphs_ci / "train", *overrides, "run.steps=10")
    interrupted(tmp_path / "whole", tmp_path / "parts", 5)
    run_ranks(train_here, 2, tmp_path / "parts", glyphs_ci / "train", *overrides, "run.steps=10")
    assert checksums(tmp_path / "parts") == checksums(tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(reference, glyphs_ci, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    assert run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train") == [True, True]
    assert rows(tmp_path / "run") == rows(reference) and checksums(tmp_path / "run") == checksums(reference)


def train_and_catch(run: Path, data: Path, *overrides: str) -> str:
    try:
        train_here(run, data, *overrides)
    except distributed.RunError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "override, message",
    [
        ("run.seed=1", "run.seed was 0, now 1.*data.restart=true"),
        ("data.streams=6", "data.streams was 4, now 6"),
        ("data.global_batch_size=96", "data.global_batch_size was 24, now 96"),
        ("backbone.embedding_dim=32", "embedding_dim 64, .* this run has smallnet, embedding_dim 32"),
        ("backbone.name=spherenet20", "was written with smallnet, .* this run has spherenet20"),
        ("evaluate.sets.P1.data=data/nope", "data/nope"),
        ("data.train=data/nowhere", "preparing the run failed.*data/nowhere"),
        (
            "head.margin={name: softmax}",
            "written with momentum, weight, this run keeps bias, .*: put head.optim.name and head.margin.name back",
        ),
        ("head.margin={name: cosfase}", "did you mean cosface"),
        ("head.margin.m=0.3", "head.margin.m: cosface has no such parameter; it has scale, learn_scale, "),
        ("backbone.name=smallnett", "did you mean 'smallnet'"),
        ("data.global_batch_size=100000", "got a global batch of 100000 samples"),
    ],
)
def test_a_wrong_config_is_one_clear_error_on_all_ranks(reference, glyphs_ci, tmp_path, override, message):
    shutil.copytree(reference, tmp_path / "run")
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", glyphs_ci / "train", "run.steps=40", override)
    assert messages[0] == messages[1]
    assert re.search(message, messages[0]), messages[0]


def test_the_same_number_of_other_classes_is_an_error(reference, glyphs_ci, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    shutil.copytree(glyphs_ci / "train", tmp_path / "data")
    classes, file = tmp_path / "data" / "classes.txt", tmp_path / "data" / "index.json"
    first, *others = classes.read_text().splitlines()
    classes.write_text("\n".join([*others, first]) + "\n")
    description = json.loads(file.read_text())
    description["classes_sha256"] = hashlib.sha256(classes.read_bytes()).hexdigest()  # a sound data set, but another
    file.write_text(json.dumps(description))
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", tmp_path / "data", "data.restart=true")
    assert messages[0] == messages[1] and "was written with other classes" in messages[0]


def test_restart_accepts_another_order(reference, glyphs_ci, tmp_path):
    interrupted(reference, tmp_path / "run", 20)
    run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train", "data.streams=6", "data.restart=true")
    assert rows(tmp_path / "run")[-1]["step"] == 30
    assert curve(tmp_path / "run")[:20] == curve(reference)[:20] and curve(tmp_path / "run") != curve(reference)


def test_a_loss_that_is_not_finite_skips_the_step_and_then_ends_the_run(glyphs_ci, tmp_path):
    messages = run_ranks(
        train_and_catch, 2, tmp_path / "run", glyphs_ci / "train", "optim.lr=1e30", "optim.warmup_steps=0"
    )
    assert messages[0] == messages[1]
    assert "the loss was not finite in 10 successive steps" in messages[0]
    assert rows(tmp_path / "run")[-1]["skipped_steps"] >= 9
    assert checkpoint.find_latest(tmp_path / "run") is None  # nothing is saved while the loss is not finite


def test_rows_are_the_same_after_a_resume_in_the_middle_of_one(glyphs_ci, tmp_path):
    for name, stop in (("whole", 8), ("run", 5), ("run", 8)):  # 5 is no multiple of 3
        overrides = (f"run.steps={stop}", "optim.schedule=constant", "track.log_every=3")
        run_ranks(train_here, 2, tmp_path / name, glyphs_ci / "train", *overrides)
    kept = [row for row in rows(tmp_path / "run") if row["step"] != 5]  # the row of a run's last step
    assert [row["step"] for row in kept] == [3, 6, 8]
    wanted = {row["step"]: row["loss"] for row in rows(tmp_path / "whole")}
    assert kept[0]["loss"] == wanted[3] and kept[2]["loss"] == wanted[8]


def test_fewer_steps_than_a_checkpoint_has_is_a_finished_run(reference, glyphs_ci, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    assert run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train", "run.steps=25") == [True, True]
    assert not (tmp_path / "run" / "preempted").exists()


def test_a_finished_run_does_not_pass_for_one_with_another_loss(reference, glyphs_ci, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", glyphs_ci / "train", "head.margin.margin=0.1")
    assert messages[0] == messages[1]
    assert "nothing would be trained with head.margin.margin: 0.2 -> 0.1. Give another run.dir" in messages[0]


def see_other_folders(run: Path, data: Path) -> str:
    return train_and_catch(run if distributed.rank() == 0 else run.with_name("node-local"), data)


def test_ranks_that_see_other_folders_are_told(reference, glyphs_ci, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    messages = run_ranks(see_other_folders, 2, tmp_path / "run", glyphs_ci / "train")
    assert messages[0] == messages[1] and "ranks 0 and 1 see different things: config" in messages[0]


def see_another_disk(folder: Path, names: tuple[str, str]) -> str:
    try:
        check_shared(folder / names[distributed.rank()], patience=0.3)
    except distributed.RunError as error:
        return str(error)
    return "no error"


def test_checkpoints_on_a_disk_of_each_machine_are_an_error_at_the_start(tmp_path):
    messages = run_ranks(see_another_disk, 2, tmp_path, ("one", "other"))
    assert messages[0] == messages[1] and "is not the folder that rank 0 sees there: put run.dir on" in messages[0]
    assert run_ranks(see_another_disk, 2, tmp_path, ("one", "one")) == ["no error"] * 2
    assert not list((tmp_path / "one").iterdir())
    (tmp_path / "file").touch()
    messages = run_ranks(see_another_disk, 2, tmp_path, ("file", "file"))
    assert (
        messages[0] == messages[1]
        and f"preparing the run failed on rank 0: {tmp_path}/file is a file, wanted a folder: give another run.dir"
        in messages[0]
    )


def lose_a_step(run: Path, data: Path, *overrides: str) -> list[tuple[str, bool]]:
    """Trains with an infinite loss in step 3, which is number 4. What the watch is told: phase and waits."""
    told, begin = [], Place.begin

    def begin_told(place: Place, what: str, waits: bool) -> None:
        told.append((what, waits))
        begin(place, what, waits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "begin", begin_told)
        patch.setattr("partial_fc.train.share", lambda loss, *rest: share(loss / (step() != 3), *rest))
        counted = count()
        step = lambda: next(counted)  # noqa: E731
        train_here(run, data, *overrides)
    return told


def test_a_checkpoint_of_a_lost_step_is_made_in_the_next(glyphs_ci, tmp_path):
    options = ("run.steps=6", "checkpoint.every=4")
    told, other = run_ranks(lose_a_step, 2, tmp_path / "run", glyphs_ci / "train", *options)
    assert told == other, "the watch counts phases"
    assert {what for what, waits in told if what in NAMES and not waits} == {"data"}
    order = ["building the engine", "data", "save", "closing the trackers", "ending the run"]
    assert [what for what in dict.fromkeys(what for what, _ in told) if what in order] == order
    assert [one.name for one in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))] == [
        "step_00000005",
        "step_00000006",
    ]
    assert rows(tmp_path / "run")[-1]["skipped_steps"] == 1


def test_a_skipped_step_leaves_running_statistics_alone():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    engine = DDPEngine(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.device("cpu"))
    engine.warm_up(torch.randn(2, 3, 8, 8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    engine.backward(engine(torch.full((2, 3, 8, 8), torch.inf)).sum())
    engine.skip()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    engine.backward(engine(torch.randn(2, 3, 8, 8)).sum())
    engine.step(0.1)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


def damaged(data: Path, out: Path, samples: range) -> Path:
    shutil.copytree(data, out)
    index = load_index(out)
    for sample in samples:
        with open(Path(index.shard_of(sample)), "r+b") as shard:
            shard.seek(int(index.offset[sample]))
            shard.write(b"not an image")
    return out


def test_undecodable_samples_shorten_their_batch_and_are_counted(glyphs_ci, tmp_path):
    broken = range(0, 8000, 200)
    data = damaged(glyphs_ci / "train", tmp_path / "data", broken)
    steps = 25
    run_ranks(train_here, 2, tmp_path / "run", data, f"run.steps={steps}", "data.max_undecodable=0.01")
    index = load_index(data)
    order = Order(index.samples_per_shard, 24, 4, 0, 8192)
    seen = {int(sample) for step in range(steps) for sample in order.batch(step)}
    last = rows(tmp_path / "run")[-1]
    assert last["undecodable"] == len(seen & set(broken)) > 0
    assert last["skipped_steps"] == 0 and last["loss"] < rows(tmp_path / "run")[0]["loss"]


def test_batch_norm_is_not_left_with_one_sample(glyphs_ci, tmp_path):
    """A rank has two of a step, and every fourth image is none: one is left in three of eight parts."""
    data = damaged(glyphs_ci / "train", tmp_path / "data", range(0, 8000, 4))
    small = ("backbone.name=iresnet18", "data.global_batch_size=4", "data.max_undecodable=0.5", "run.steps=6")
    assert run_ranks(train_here, 2, tmp_path / "run", data, *small) == [True, True]
    last = rows(tmp_path / "run")[-1]
    assert last["undecodable"] > 0 and last["skipped_steps"] == 0


@pytest.mark.soak("train")  # test_reader has the tries, test_launcher the one message
def test_shards_that_vanish_during_a_run_end_it_with_one_message(glyphs_ci, tmp_path):
    shutil.copytree(glyphs_ci / "train", tmp_path / "data")
    process = begin(2, tmp_path / "run", f"data.train={tmp_path}/data", "run.steps=5000", "data.workers=1")
    wait_for_step(tmp_path / "run", 3, process)
    for shard in (tmp_path / "data").glob("*.tar"):
        os.truncate(shard, 512)
    output = finish(process, code=1)
    assert re.search(r"error: rank \d: cannot read \d+ bytes at offset \d+ of .*shard-000000.tar after 4 tries", output)


def test_too_many_undecodable_samples_end_the_run(glyphs_ci, tmp_path):
    data = damaged(glyphs_ci / "train", tmp_path / "data", range(0, 8500, 2))
    messages = run_ranks(train_and_catch, 2, tmp_path / "run", data)
    assert messages[0] == messages[1] and "samples could not be decoded, more than data.max_undecodable" in messages[0]

    labels = np.load(data / "index" / "label.npy")
    np.save(data / "index" / "label.npy", labels[::-1])  # as many of each class, and of other people
    messages = run_ranks(train_and_catch, 2, tmp_path / "other", data)
    assert messages[0] == messages[1] and "label.npy is damaged: its sha256 is" in messages[0]


# ---- real processes, as users start and lose them


def start(world_size: int, run: Path, *overrides: str) -> subprocess.Popen:
    command = [*TORCHRUN, str(world_size), "launch/train.py", str(CONFIG), *QUICK, f"run.dir={run}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def begin(world_size: int, run: Path, *overrides: str) -> Job:
    """As start, without torchrun and without its imports."""
    return Job(world_size, CONFIG, *QUICK, f"run.dir={run}", *overrides)


def finish(process: subprocess.Popen | Job, code: int | None = 0) -> str:
    output, _ = process.communicate(timeout=200)
    assert code is None or process.returncode == code, output
    return output


def wait_for(happened: Callable[[], bool], process: subprocess.Popen | Job) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if happened():
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"it did not happen: {process.communicate()[0]}")


def wait_for_step(run: Path, step: int, process: subprocess.Popen | Job) -> None:
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step, process)


def workers(agent: int) -> list[int]:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children if "launch/train.py" in Path(f"/proc/{child}/cmdline").read_text()]


def test_killed_and_resumed_is_the_same_run_bit_for_bit(reference, tmp_path):
    """kill -9 in the middle of a step, twice, and of a save; the same command goes on; all that is left is equal."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(reference, whole)
    evaluate_run(whole, torch.device("cpu"))
    for step in (4, 17):  # before the first checkpoint, and between two
        process = begin(2, killed)
        wait_for_step(killed, step, process)
        os.kill(process.pids[1], signal.SIGKILL)
        finish(process, code=1)
    process = begin(2, killed)
    wait_for(lambda: (killed / "checkpoints" / "step_00000020").exists(), process)  # in the middle of saving it
    os.kill(process.pids[0], signal.SIGKILL)
    finish(process, code=1)
    assert checkpoint.find_latest(killed).step in (10, 20)
    output = finish(begin(2, killed))
    assert checksums(killed) == checksums(whole)
    assert curve(killed) == curve(whole) and curve(killed, "lr") == curve(whole, "lr")
    results = [json.loads((run / "evaluation.json").read_text()) for run in (killed, whole)]
    assert results[0] == results[1]
    assert "TAR@1e-3" in output and (killed / "report.html").exists()


ON_CUDA = {
    "smallnet": ("head.compile=true", "head.matmul_precision=tf32"),
    "iresnet18": (
        "backbone.name=iresnet18",
        "engine.precision=bf16",
        "engine.channels_last=true",
        "head.compile=true",
        "head.matmul_precision=bfloat16",
        "head.cache_bytes=40000",
    ),
    "without kernels": ("head.compile=false", "head.margin.interclass_filtering_threshold=0.4"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ON_CUDA)
def test_killed_and_resumed_on_cuda_is_the_same_run_bit_for_bit(glyphs_ci, tmp_path, kind):
    """One process, with engine.deterministic."""
    options = ("engine.deterministic=true", "optim.lr=0.02", *ON_CUDA[kind])
    finish(start(1, tmp_path / "whole", *options))
    killed = tmp_path / "killed"
    process = start(1, killed, *options)
    wait_for_step(killed, 17, process)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    finish(process, code=1)
    assert checkpoint.find_latest(killed).step == 10
    finish(start(1, killed, *options))
    assert checksums(killed) == checksums(tmp_path / "whole")
    assert curve(killed) == curve(tmp_path / "whole")


@pytest.mark.parametrize(
    "number, agent",
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.soak("train")),
        pytest.param(signal.SIGUSR1, True, marks=pytest.mark.soak("train")),
    ],
)
def test_a_preempted_run_saves_at_once_and_goes_on(glyphs_ci, tmp_path, number, agent):
    run = tmp_path / "run"
    process = (start if agent else begin)(2, run, "run.steps=2000", "checkpoint.every=100000", "data.workers=1")
    wait_for_step(run, 5, process)
    if number == signal.SIGTERM:
        process.send_signal(number)  # an agent hands it on; its own exit code is 1 whatever the workers return
        finish(process, code=None if agent else 0)
    else:
        os.kill(workers(process.pid)[0], number)  # one rank hears of it, all stop at the same step
        finish(process, code=0)
    saved = checkpoint.find_latest(run)
    assert saved is not None and saved.step >= 5 and (run / "preempted").read_text() == f"step {saved.step}\n"
    finish(begin(2, run, f"run.steps={saved.step + 3}", "evaluate.sets={}"))
    assert not (run / "preempted").exists() and checkpoint.find_latest(run).step == saved.step + 3


HOLDER = """
import os, signal, sys, time
from pathlib import Path
from partial_fc.train import the_only_one_in
with the_only_one_in(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_readers_that_outlive_a_killed_rank_do_not_hold_the_folder(tmp_path):
    """They are children of a fork, and notice only after seconds that their parent is gone."""
    run = tmp_path / "run"
    (tmp_path / "holder.py").write_text(HOLDER)
    holder = run_program(tmp_path / "holder.py", run, timeout=60)
    assert holder.returncode == -signal.SIGKILL
    child = int(holder.stdout)
    try:
        with the_only_one_in(run):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_jobs_in_one_folder_are_an_error(glyphs_ci, tmp_path):
    first = begin(1, tmp_path / "run", "run.steps=5000")
    wait_for_step(tmp_path / "run", 2, first)
    assert "another process trains in this folder" in finish(begin(1, tmp_path / "run"), code=1)
    assert first.poll() is None
    first.kill()
    finish(first, code=None)


@pytest.mark.soak("train")
def test_a_killed_agent_takes_its_workers_with_it(glyphs_ci, tmp_path):
    first = start(2, tmp_path / "run", "run.steps=5000")
    wait_for_step(tmp_path / "run", 2, first)
    orphans = workers(first.pid)
    assert len(orphans) == 2
    first.kill()
    first.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in orphans):
        assert time.monotonic() < deadline, "workers train on as orphans"
        time.sleep(0.1)


@pytest.mark.soak("train")
def test_eight_ranks_are_wired(glyphs_ci, tmp_path):
    output = finish(start(8, tmp_path / "run", "run.steps=3", "evaluate.sets={}"))
    assert "8 ranks on cpu, 96 class centers on the first" in output
    assert len(rows(tmp_path / "run")) == 3


def test_a_wrong_run_ends_with_one_message(glyphs_ci, tmp_path):
    output = finish(begin(2, tmp_path / "run", "data.global_batch_size=1", "data.streams=1"), code=1)
    assert output.count("error: opening the data failed on rank 0: got a global batch of 1 samples on 2 ranks") == 1
    unknown = run_program("launch/train.py", CONFIG, "optim.lrr=3")
    assert unknown.returncode == 1 and "optim.lrr: unknown key; did you mean optim.lr?" in unknown.stderr


def test_print_config_shows_every_setting_with_its_documentation():
    shown = run_program("launch/train.py", CONFIG, "--optim.lr=0.25", "--print-config")
    assert shown.returncode == 0, shown.stderr
    assert "  lr: 0.25 " in shown.stdout and "Learning rate at its peak" in shown.stdout


def test_batch_norm_wants_two_samples(glyphs_ci, tmp_path):
    small = ("backbone.name=iresnet18", "data.global_batch_size=4", "data.streams=4", "data.accumulate=2")
    with pytest.raises(AssertionError, match="iresnet18 has batch norm, which wants two samples at least"):
        run_ranks(train_here, 2, tmp_path / "run", glyphs_ci / "train", *small)
