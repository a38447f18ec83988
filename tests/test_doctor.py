"""The doctor on a good config, and on each thing that can be wrong, made wrong."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from partial_fc import backbone, checkpoint
from partial_fc.backbone.smallnet import smallnet
from partial_fc.data import reader
from partial_fc.data.shards import load_index, write_shards
from partial_fc.doctor import machine, ranks, speed
from partial_fc.doctor.run import doctor
from partial_fc.doctor.sheet import Found, spans
from partial_fc.memory import size_text
from partial_fc.parallel import distributed
from tests.conftest import REPOSITORY, run_ranks
from tests.processes import Job, Program, run_program
from tests.test_train import CONFIG, TORCHRUN, config_for, train_here

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def ask(*overrides: str, config: Path | None = CONFIG) -> tuple[bool, str]:
    """What the doctor says in this process, or on these ranks, and whether all is well."""
    said = StringIO()
    os.chdir(REPOSITORY)  # the config's paths are relative
    with redirect_stdout(said):
        # a run folder that nobody has; what is given comes after it
        of_nobody = [] if config is None else ["run.dir=runs/doctor_test"]
        fine = doctor(config, [*of_nobody, *overrides], torch.device("cpu"), seconds=0.2)
    return fine, said.getvalue()


def problems(*overrides: str) -> str:
    """The lines of what is wrong; there must be some."""
    fine, said = ask(*overrides)
    assert not fine, said
    return "\n".join(line for line in said.splitlines() if line.startswith("problem"))


@pytest.fixture
def folder(glyphs_ci, tmp_path, monkeypatch) -> Path:
    """A copy of the training data, to be damaged."""
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree(glyphs_ci / "train", tmp_path / "train")
    return tmp_path / "train"


@pytest.fixture(scope="module")
def run(glyphs_ci, tmp_path_factory) -> Path:
    """A run with a checkpoint at step 3."""
    run = tmp_path_factory.mktemp("doctor") / "run"
    run_ranks(train_here, 1, run, glyphs_ci / "train", "run.steps=3", "evaluate.sets={}", "data.global_batch_size=48")
    return run


# ---- nothing wrong


def good(run: str) -> tuple[bool, str]:
    return ask(f"run.dir={run}")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_good_config(glyphs_ci, tmp_path, monkeypatch, world_size):
    monkeypatch.chdir(REPOSITORY)
    if world_size == 1:
        fine, said = good(f"{tmp_path}/run")
    else:
        (fine, said), (fine_there, silence) = run_ranks(good, 2, f"{tmp_path}/run")
        assert fine_there and silence == ""
        assert "2, gloo, collectives give the right results" in said and "GB/s" in said
        assert "ok       agreement: all ranks see the same" in said and "clocks: within 0.0" in said
    assert fine and "problem" not in said, said
    for line in (
        f"torch {torch.__version__.partition('+')[0]}",
        "8,535 samples of 764 identities in 1 shard",
        "32 samples decoded, 32 x 32 pixels",
        "177 steps of 48 samples an epoch",
        "checkpoint: none in",
        "evaluation sets: P1 1,411 samples, P2 251 samples",
        "bounds the run",
        " at this speed, without the head",
    ):
        assert line in said, line
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


@pytest.mark.slow
def test_the_size_of_a_checkpoint_is_what_a_checkpoint_takes(run):
    """And one that is there counts as room that is taken already."""
    fine, said = ask(f"run.dir={run}", f"data.train={REPOSITORY}/data/glyphs_ci/train", "checkpoint.keep=1")
    one, needed = re.search(r"takes about ([\d.]+) MiB; 2 of them, .* need ([\d.]+) MiB more", said).groups()
    real = sum(entry["bytes"] for entry in checkpoint.find_latest(run).files()) / 2**20
    assert float(one) == pytest.approx(real, rel=0.02)
    assert float(needed) == pytest.approx(real, rel=0.04)
    assert fine and "would go on from step 3" in said


@pytest.mark.slow
def test_no_config_and_two_ranks():
    job = Job(2, "doctor", script="partial-fc")
    said, _ = job.communicate(timeout=100)
    assert job.returncode == 0 and "ok       ranks: 2, gloo" in said and said.rstrip().endswith("nothing is wrong")


@pytest.mark.soak("launch")
def test_no_config_and_two_ranks_of_torchrun():
    command = [*TORCHRUN, "2", "--standalone", "-m", "partial_fc.cli", "doctor"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok       ranks: 2, gloo" in done.stdout and done.stdout.rstrip().endswith("nothing is wrong")


# ---- what can be wrong with a config and its files


def test_a_bad_config_says_everything_in_one_line():
    said = problems("data.worker=3", "optim.lr=-1")
    assert "data.worker: unknown key; did you mean data.workers?" in said and "optim.lr: got -1" in said
    assert said.count("\n") == 0


def test_a_missing_shard(folder):
    next(folder.glob("shard-*.tar")).unlink()
    assert "shard-000000.tar is missing" in problems(f"data.train={folder}")


def test_a_truncated_shard(folder):
    shard = next(folder.glob("shard-*.tar"))
    os.truncate(shard, shard.stat().st_size - 1000)
    assert re.search(r"shard-000000.tar has \d+ bytes, the index says \d+", problems(f"data.train={folder}"))


def test_a_label_out_of_range(folder):
    labels = np.load(folder / "index" / "label.npy")
    labels[7] = 764
    np.save(folder / "index" / "label.npy", labels)
    assert "has the label 764, wanted 0 <= label < 764" in problems(f"data.train={folder}")


def test_a_sample_that_does_not_decode(folder):
    offset = int(np.load(folder / "index" / "offset.npy")[0])
    with next(folder.glob("shard-*.tar")).open("r+b") as shard:
        shard.seek(offset)
        shard.write(b"\0" * 64)
    said = problems(f"data.train={folder}")
    assert "problem  images: " in said and "sample 000000000 (U+" in said


def test_other_classes_than_the_checkpoint_has(run, glyphs_ci):
    said = problems(f"run.dir={run}", f"data.train={glyphs_ci}/test_seen")
    assert "problem  checkpoint: " in said and "was written with other classes than" in said


def test_another_optimizer_than_the_checkpoint_has(run):
    said = problems(f"run.dir={run}", "head.optim.name=adamw")
    assert "problem  head: its class centers were written with momentum" in said


def test_settings_that_do_not_fit():
    said = problems("backbone.name=smallent", "head.margin={name: cosface, mragin: 1}", "evaluate.sets.P1.data=nowhere")
    assert "did you mean 'smallnet'?" in said and "problem  head: " in said
    assert "problem  evaluation sets: " in said and "nowhere is no data set" in said
    assert "wanted at most 8535" in problems("data.global_batch_size=10000")
    small = ("backbone.name=iresnet18", "data.global_batch_size=4", "data.streams=4", "data.accumulate=4")
    assert "problem  backbone: iresnet18 has batch norm, which wants two samples" in problems(*small)


def lines(*overrides: str) -> str:
    """What the doctor says of a config, without the measurements of speed."""
    with mock.patch("partial_fc.doctor.run._speed", lambda *_: None):
        return ask(*overrides)[1]


def test_a_run_that_is_too_short_for_its_plans(glyphs_ci):
    said = lines(
        "run.epochs=null",
        "run.steps=60",
        "optim.warmup_steps=60",
        "head.margin.warmup={steps: 60, margin: 0.0}",
        f"evaluate.sets.P1.data={glyphs_ci}/train",
    )
    assert re.search(
        "warning  schedule: 60 steps, .*optim.warmup_steps 60 take .*head.margin.warmup.steps 60 take", said
    )
    assert "warning  evaluation sets: " in said and "evaluate.sets.P1.data is the training set" in said, said
    said = lines("optim.schedule=step", "optim.milestones=[200, 100000]")
    assert re.search(r"warning  schedule: .*optim.milestones \[100000\] come after the run's", said), said
    assert "ok       evaluation sets: P1" in said


def test_what_is_said_of_the_margin():
    said = lines()
    assert "ok       margin: cosface, scale 24: the target's probability is at most 1 with 764 classes;" in said
    assert "wants a scale of 8.82 for 0.9" in said
    said = lines("head.margin={name: arcface, margin: 3.0, scale: 24}")
    assert "warning  margin: arcface, scale 24: the target's probability is at most 6.49e-14 with 764" in said
    assert "lower the margin" in said and "ok       margin: softmax: no bound" in lines("head.margin={name: softmax}")


def test_a_layer_that_no_embedding_depends_on(monkeypatch):
    """Training refuses it."""

    def with_idle(*arguments):
        net = smallnet(*arguments)
        net.idle = torch.nn.Linear(1, 1)
        return net

    monkeypatch.setitem(backbone.BACKBONES, "smallnet", with_idle)
    assert "problem  backbone: no embedding depends on 2 of the backbone's parameters, idle.weight" in problems()


def test_one_identity(tmp_path, glyphs_ci):
    index = load_index(glyphs_ci / "train")
    image = (index.path / "shard-000000.tar").read_bytes()[index.offset[0] : index.offset[0] + index.size[0]]
    samples = [(image, "png", 0)] * 60
    write_shards(tmp_path / "one", samples, ["everybody"], prepared=index.prepared)
    said = problems(f"data.train={tmp_path}/one")
    assert "problem  data: data.train: " in said and "has one identity, 'everybody': there is nothing" in said
    with pytest.raises(distributed.RunError, match="has one identity, 'everybody'"):
        train_here(tmp_path / "run", tmp_path / "one")


def test_a_run_of_weeks():
    assert speed.duration(90.0, 1000) == Found("1,000 steps take 1.5 minutes at this speed, without the head")
    assert "36.0 hours" in speed.duration(36 * 3600, 1).text
    assert speed.duration(15 * 86400, 1).level == "warning" and "15.0 days" in speed.duration(15 * 86400, 1).text


def test_an_engine_that_does_not_work_here(monkeypatch):
    assert "engine.deepspeed.optimizer is not for this section" in problems(
        "engine.name=deepspeed", "engine.deepspeed={optimizer: {}}"
    )
    assert "needs a process group" in problems("engine.name=deepspeed")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "track.tensorboard needs tensorboard" in problems("track.tensorboard=true")


def test_checkpoints_in_another_place(run, tmp_path):
    said = problems(f"run.dir={run}", f"checkpoint.dir={tmp_path}")
    assert "problem  checkpoint: " in said and "where this run had them, does: put checkpoint.dir back" in said


IN_A_NAMESPACE = """
import ctypes, subprocess, sys
from partial_fc import cli
_, config, *runs = sys.argv
if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
    raise OSError(ctypes.get_errno(), "unshare")
for mount in (
    "--make-rprivate /",
    f"-t tmpfs -o size=8m tmpfs {runs[0]}",
    f"-t tmpfs -o ro tmpfs {runs[1]}",
    "-t tmpfs -o size=256k tmpfs /dev/shm",
):
    subprocess.run(["mount", *mount.split()], check=True)
for run in runs:
    sys.argv = ["partial-fc", "doctor", config, f"run.dir={run}/run"]
    try:
        cli.main()
    except SystemExit as end:
        print("exit code", end.code)
"""


@pytest.mark.slow
def test_no_room_for_checkpoints_and_little_shared_memory(glyphs_ci, tmp_path):
    """File systems that really are small, or read-only; mounted for these processes alone."""
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    allowed = shutil.which("unshare") and subprocess.run(mount, capture_output=True)
    if not allowed or allowed.returncode:
        pytest.skip("not run: mounting a tmpfs in a namespace of one's own is not permitted")
    small, read_only = tmp_path / "small", tmp_path / "read_only"
    small.mkdir()
    read_only.mkdir()
    (tmp_path / "program.py").write_text(IN_A_NAMESPACE)
    done = run_program(tmp_path / "program.py", CONFIG, small, read_only, timeout=100)
    first, second, _ = done.stdout.split("exit code 1\n")
    assert re.search(r"problem  disk: .* need 14.9 MiB, 8.0 MiB are free in .*/small: make room", first), first
    assert "problem  shared memory: 256 KiB of 256 KiB are free" in first and "--shm-size" in first
    assert "2 problems" in first and "not measured while there are problems" in first
    assert "read_only cannot be written to: give another run.dir" in second, second


# ---- what can be wrong with the machines


def test_versions(monkeypatch):
    installed = machine.metadata.version

    def version(name: str) -> str:
        if name == "tqdm":
            raise machine.metadata.PackageNotFoundError(name)
        return {"numpy": "1.20.1", "pytest": "7.0"}.get(name) or installed(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    found = machine.packages()
    assert found.level == "problem"
    for text in ("numpy is 1.20.1, wanted >=1.26", "tqdm is missing, wanted >=4.66", "pytest is 7.0, wanted >=8"):
        assert text in found.text


def test_threads(monkeypatch):
    assert machine.cpu(1, None).level == "ok"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = machine.cpu(machine.cores(), None)
    assert found.level == "warning" and "export OMP_NUM_THREADS=1" in found.text


def test_a_device_that_torch_does_not_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    assert machine.device_of(torch.device("cpu")).level == "ok"
    (tmp_path / "nvidia0").touch()
    found = machine.device_of(torch.device("cpu"))
    assert found.level == "problem" and found.text.startswith("nvidia0 in ")


def test_shared_memory_without_a_config(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DOCKERS_DEFAULT", 2**60)
    assert machine.shared_memory(1, None, 0).level == "warning"
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "nowhere")
    assert "data.workers=0" in machine.shared_memory(1, None, 0).text


def test_clocks():
    assert ranks.compare_clocks([5.0, 5.2]) == Found("within 0.200 s of each other")
    found = ranks.compare_clocks([9.0, 5.0, 8.0])
    assert found.level == "warning" and found.text.startswith("rank 1's clock is 4.0 s behind rank 0's")


# ---- speed


@pytest.mark.slow
def test_a_slow_reader_bounds_the_run(glyphs_ci, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    fast, decoded = reader.decode, count()
    # the first 32 are looked at before anything is measured: 10 s
    monkeypatch.setattr(reader, "decode", lambda data: (time.sleep(0.3 * (next(decoded) >= 32)), fast(data))[1])
    fine, said = ask("data.workers=0", "data.global_batch_size=4")
    line = said.splitlines()[-3]
    assert fine and line.startswith("warning  speed: ") and ": the reader bounds the run" in line, said
    assert 1 <= float(re.search(r"the reader gives (\d+) samples/s", line).group(1)) <= 3


def test_the_verdict(tmp_path):
    config = config_for(tmp_path, "nowhere")
    assert speed.verdict([100, 90], [80, 85], config, 4, False).text == (
        "the reader gives 180 samples/s, the backbone alone takes 160: the backbone bounds the run, the readers keep up"
    )
    found = speed.verdict([50, 60], [80, 85], config, 4, False)
    assert found.level == "warning" and "raise data.workers, now 0: 4 cores of this machine are free" in found.text
    assert "store smaller images" in speed.verdict([50, 60], [80, 85], config, 0, False).text
    found = speed.verdict([900] * 4, [80, 85, 40, 82], config, 4, False)
    assert found.level == "warning" and "and rank 2's, which all wait for, has 40 samples/s" in found.text
    assert speed.verdict([30, 90, 90], [1, 1, 1], config, 4, False).level == "ok"  # what waits anyway may be uneven


# ---- ranks that differ


def another_file(config: Path) -> tuple[bool, str]:
    return ask(config=config if distributed.rank() != 1 else Path("nowhere.yaml"))


def another_seed(config: Path) -> tuple[bool, str]:
    return ask(f"run.seed={distributed.rank()}", config=config)


def out_of_memory(config: Path) -> tuple[bool, str]:
    """Rank 1 has no room for more than the first three steps, of two images each."""
    calls, real = [], speed.step

    def step(*arguments) -> None:
        calls.append(arguments)
        if distributed.rank() == 1 and len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(*arguments)

    with mock.patch.object(speed, "step", step):
        return ask(config=config)


@pytest.mark.slow
def test_a_step_that_one_rank_alone_cannot_make(glyphs_ci):
    """The others do not wait for it in an all-reduce of gradients."""
    (fine, said), (fine_there, _) = run_ranks(out_of_memory, 2, CONFIG)
    assert not fine and not fine_there
    assert re.search(r"problem  step: rank 1: \d+ images of 32 x 32 pixels do not fit the device's memory", said), said


@pytest.mark.slow
def test_what_one_rank_alone_finds(glyphs_ci):
    (fine, said), (fine_there, _) = run_ranks(another_file, 2, CONFIG)
    assert not fine and not fine_there
    assert "problem  config: rank 1: nowhere.yaml: no such config file" in said
    assert re.search(r"ok +config: rank 0: .*glyphs_ci.yaml is valid", said) and "data:" not in said
    (fine, said), (fine_there, _) = run_ranks(another_seed, 2, CONFIG)
    assert not fine and not fine_there
    assert "problem  agreement: ranks 0 and 1 see different things: config" in said


ALONE = """
import sys
from partial_fc.parallel import distributed
with distributed.job(float(sys.argv[1])) as device:
    if distributed.rank() == 1:
        sys.exit(3)
    from partial_fc.doctor.run import doctor
    doctor(None, [], device)
"""


@pytest.mark.slow
def test_a_rank_that_does_not_come_and_one_that_leaves(tmp_path):
    """Nobody waits for long, and the others say what happened."""
    (tmp_path / "alone.py").write_text(ALONE)

    def start(rank: int, port: int, seconds: int) -> Program:
        where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return Program(tmp_path / "alone.py", seconds, env=where)

    first, second = free_port(), free_port()
    alone, left, leaver = start(0, first, 2), start(0, second, 20), start(1, second, 20)
    said = alone.wait(60).stderr
    assert alone.returncode == 1, said
    assert f"error: rank 0 of 2 did not meet the others at 127.0.0.1:{first} within 2 s" in said
    said = left.wait(60).stderr
    assert left.returncode == 1 and "error: rank 0 on " in said and "does not reach the others" in said
    assert leaver.wait(60).returncode == 3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_texts():
    assert spans([0, 1, 2, 5]) == "0-2, 5" and spans([3]) == "3"
    assert [size_text(n) for n in (0, 1023, 1536, 2**30 * 200, 2**60)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "200 GiB",
        "1048576 TiB",
    ]
