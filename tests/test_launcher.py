"""Ranks by any launcher, what ends a job that waits for one of them, and one line for what is wrong."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from partial_fc.parallel import distributed, launcher, watch
from tests.conftest import REPOSITORY
from tests.processes import Program, run_program
from tests.test_doctor import free_port
from tests.test_launch import AGENT
from tests.test_train import CONFIG, QUICK, begin, finish, wait_for_step

TRAIN = ("launch/train.py", CONFIG, *QUICK, "evaluate.sets={}")
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
STEP = {  # as srun sets them, in Slurm 22.05
    "SLURM_JOB_ID": "6154",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "216268801",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SHELL = {name: value for name, value in STEP.items() if "STEP" not in name}  # of sbatch; salloc sets less
TORCHRUN = TORCH | {"TORCHELASTIC_RUN_ID": "1"}


@pytest.mark.parametrize(
    "environ, wanted",
    [
        ({}, None),
        (TORCH, "1 of 2, 1 at 127.0.0.1:29511"),
        (STEP, r"2 of 3, 0 at n1:2\d{4}"),
        (STEP | {"WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "5"}, "2 of 3, 0 at a:5"),
        (STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}, r"2 of 3, 2 at 127.0.0.1:2\d{4}"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SHELL | {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        (STEP | TORCHRUN, "1 of 2, 1 at 127.0.0.1:29511"),
        (OPEN_MPI, r"1 of 4, 1 at 127.0.0.1:2\d{4}"),
        (STEP | OPEN_MPI, r"1 of 4, 1 at 127.0.0.1:2\d{4}"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a"}, r"1 of 4, 1 at a:2\d{4}"),
        (STEP | {name: name[-4:] != "RANK" and "1" or "0" for name in OPEN_MPI}, None),
        (MPICH, "1 of 4, 1 at 127.0.0.1:29500"),
        (STEP | {"PMI_RANK": "2", "PMI_SIZE": "3"}, r"2 of 3, 0 at n1:2\d{4}"),  # srun --mpi=pmi2
    ],
)
def test_which_rank_this_is(environ, wanted):
    environ = dict(environ)
    joins = launcher.join(environ)
    assert joins == (wanted is not None) and launcher.join(environ) == joins
    if joins:
        assert re.fullmatch(
            wanted, "{RANK} of {WORLD_SIZE}, {LOCAL_RANK} at {MASTER_ADDR}:{MASTER_PORT}".format(**environ)
        )
        assert not launcher.join(launcher.alone(environ))


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set, MASTER_ADDR and MASTER_PORT are not: .*torchrun"),
        (TORCH | {"WORLD_SIZE": ""}, "RANK is set, WORLD_SIZE is not"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set, so this is one process alone: unset WORLD_SIZE"),
        (SHELL | {"WORLD_SIZE": "8"}, "this is one process alone"),
        (STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun started 3 ranks"),
        (TORCH | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: wanted ranks from 0"),
        (TORCH | {"RANK": "one"}, "RANK is 'one': wanted a number"),
        (TORCH | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000: wanted a port"),
        (TORCH | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is -1: wanted 0 or more"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun started 4 ranks, 2 of them .* mpirun -x MASTER_ADDR="),
    ],
)
def test_variables_that_do_not_do(environ, message):
    with pytest.raises(ValueError, match=message):
        launcher.join(dict(environ))


def test_the_first_host_of_slurms_list():
    lists = {"n[1-2]": "n1", "gpu-01-[005,07-9],x": "gpu-01-005", "r[1-2]n[3-4]": "r1n3", "a,b[1-2]": "a", "x": "x"}
    assert {text: launcher.first_host(text) for text in lists} == lists


def test_what_deepspeed_gives_as_an_argument():
    environ = {}
    launcher.take_local_rank(None, environ)
    launcher.take_local_rank(3, environ)
    launcher.take_local_rank(3, environ)
    assert environ == {"LOCAL_RANK": "3"}
    with pytest.raises(ValueError, match="--local_rank=0 and LOCAL_RANK is 3: leave out"):
        launcher.take_local_rank(0, environ)


@pytest.mark.parametrize("hidden, given, torchrun", [(True, "3", False), (False, "2,3", False), (False, "3", True)])
def test_a_device_of_ones_own(hidden, given, torchrun):
    environ = STEP | {"CUDA_VISIBLE_DEVICES": given} | (TORCHRUN if torchrun else {})
    assert launcher.one_device_each(environ) == hidden and not launcher.one_device_each({})


# ---- what a user sees


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line_by_the_rank_that_knows(tmp_path):
    wrong = "optim.lrr=3"
    cases = {
        "error: RANK is set, MASTER_ADDR and MASTER_PORT are not": ({"RANK": "0", "WORLD_SIZE": "1"}, ()),
        "error: WORLD_SIZE is 8, but": ({"WORLD_SIZE": "8"}, ()),
        "error: .* is no valid config:\n  optim.lrr: unknown key": ({"RANK": "1"}, (wrong,)),
        "error: .* is no valid config:\n  optim.lrr: unknown": (TORCH, (wrong,)),  # not the first rank of its node
        "error: --local_rank=0 and LOCAL_RANK is 1": (TORCH, ("--local_rank=0",)),
    }
    started = {
        message: Program(
            *TRAIN, f"run.dir={tmp_path}", *words, env=environ | {"TORCHELASTIC_ERROR_FILE": f"{tmp_path}/{n}"}
        )
        for n, (message, (environ, words)) in enumerate(cases.items())
    }
    for n, (message, program) in enumerate(started.items()):
        assert program.wait(60).returncode == 1
        assert re.match(message, program.stderr) and program.stderr.count("error") == 1, program.stderr
        summary = json.loads((tmp_path / str(n)).read_text())["message"]["extraInfo"]["py_callstack"]
        assert summary == program.stderr.rstrip("\n")


@pytest.mark.slow
def test_a_port_that_another_program_has():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        where = TORCH | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(port)}
        program = run_program(*TRAIN, env=where, timeout=60)
    assert program.returncode == 1 and f"error: rank 0 cannot listen at 127.0.0.1:{port}" in program.stderr


@pytest.mark.parametrize(
    "error, patience",
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error [::1]: Connection reset by peer"), [2.0]),
        (dist.DistBackendError("NCCL error: remote process exited"), [2.0]),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), []),
        (KeyError("gloo"), []),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_only_notices_gives_the_one_at_fault_the_time_to_say_so(monkeypatch, error, patience, ranks):
    slept = []
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    with pytest.raises(type(error)), distributed.job():
        raise error
    assert slept == (patience if ranks > 1 else [])


MINE = """
from dataclasses import dataclass
from partial_fc import CosFace

print("imported")

@dataclass(frozen=True, kw_only=True)
class Mine(CosFace):
    def target(self, cosine):
        raise KeyError("of one's own")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "override, wanted",
    [
        ("optim.lrr=3", "traceback : error: .* is no valid config:\n +optim.lrr: unknown key"),
        pytest.param(
            "data.train=nowhere",
            "traceback : error: preparing the run failed on rank 0: .*nowhere is no data set",
            marks=pytest.mark.soak("launch"),
        ),
        ("head.margin={name: mine.Mine}", 'KeyError: "of one\'s own"'),
    ],
)
def test_torchruns_summary_has_the_error(glyphs_ci, tmp_path, override, wanted):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "agent.py").write_text(AGENT)
    words = ("--standalone", "--nproc_per_node=2", *TRAIN, "run.steps=1", f"run.dir={tmp_path}/run", override)
    agent = run_program(tmp_path / "agent.py", "", *words, env={"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"})
    assert agent.returncode == 1
    summary = agent.stderr.partition("Root Cause (first observed failure):")[2]
    assert re.search(wanted, summary), agent.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["cloud/node.sh", "slurm/train.sbatch"])
def test_the_run_folder_is_told_from_what_a_loss_prints(tmp_path, script):
    """By the line of the scripts that reads it: with more in it no marker of a preemption is found."""
    (tmp_path / "mine.py").write_text(MINE + 'import os\nos.system("echo imported by a child")\n')
    line = re.search(r"^run=\$\(.*?\)", (REPOSITORY / "launch" / script).read_text(), re.MULTILINE | re.DOTALL).group()
    words = (CONFIG, "run.dir=runs/x y", "head.margin={name: mine.Mine}")
    environ = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", f'{line}; echo "[$run]"', "_", *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[runs/x y]\n" and "imported by a child" in done.stderr, done.stderr


MPIRUN = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])  # without torch: 4 s of CPU each
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
launcher.join()
print(*(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")))
"""


@pytest.mark.slow
def test_mpirun_starts_ranks(tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("not run: mpirun is not installed")
    (tmp_path / "rank.py").write_text(MPIRUN)
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, tmp_path / "rank.py", launcher.__file__]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(command, env=os.environ | as_root, capture_output=True, text=True, timeout=60)
    ports = {line.split()[-1] for line in done.stdout.splitlines()}
    assert len(ports) == 1, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} 2 {rank} 127.0.0.1 {min(ports)}" for rank in (0, 1)]


@pytest.mark.soak("launch")
def test_accelerate_starts_ranks(tmp_path):
    """Its own command, as in docs/launch.md, on CPUs; with no more of ours than what joins."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("not run: accelerate is not installed")
    (tmp_path / "rank.py").write_text(MPIRUN)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    port = str(free_port())
    command = [*launch, "--main_process_port", port, str(tmp_path / "rank.py"), launcher.__file__]
    done = subprocess.run(command, env=os.environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    wanted = [f"{rank} 2 {rank} 127.0.0.1 {port}" for rank in (0, 1)]
    assert sorted(done.stdout.splitlines()) == wanted, done.stdout + done.stderr


# ---- a rank that does not come


def said(begun: int, **other) -> dict:
    return {"host": "h", "begun": begun, "unlimited": False, "step": 7, "what": "gather", "waits": True} | other


@pytest.mark.parametrize(
    "seen, silent, still, wanted",
    [
        ([said(5), said(5)], [0, 0], [9, 9], None),
        ([said(6), said(5, what="data", waits=False)], [0, 0], [11, 9], None),
        ([said(6), said(5)], [0, 0], [1, 11], None),  # both were waiting, and rank 0 has told that it goes on
        ([said(6, unlimited=True), said(5, what="data")], [0, 0], [11, 11], "rank 1 on h did not come"),
        ([said(6), said(5, what="data")], [0, 0], [11, 11], "rank 1 on h did not come: .* in phase 'data' of step 7"),
        ([said(6), said(5), said(5)], [0, 0, 0], [11, 11, 9], None),
        ([said(6), said(5), said(5)], [0, 0, 0], [11, 11, 11], r"rank 1 on h \(and 1 more\) did not come"),
        (
            [said(6), said(5)],
            [0, 11],
            [11, 11],
            "rank 1 on h has not been heard of for 11 s .*phase 'gather' of step 7",
        ),
        ([said(6), said(5, unlimited=True)], [0, 11], [11, 11], "rank 1 on h has not been heard of"),
        ([said(6), said(5, unlimited=True)], [0, 0], [11, 11], None),
        ([said(5), said(5)], [0, 0], [11, 11], "no rank has come further than phase 'gather' of step 7"),
        ([said(5, what="data", waits=False)] * 2, [0, 0], [11, 11], None),  # a file system that is slow for all
        ([said(5, what="log")] * 2, [0, 0], [11, 11], "no rank has come further than phase 'log' of step 7"),
        ([said(0, step=None)], [0, 9], [11, 11], None),
        ([said(0, step=None)], [0, 11], [11, 11], "rank 1 has not been heard of for 11 s .* last in the start"),
    ],
)
def test_who_keeps_the_others_waiting(seen, silent, still, wanted):
    found = watch.judge(dict(enumerate(seen)), silent, still, 10.0)
    assert found is wanted if wanted is None else re.match(wanted, found)


def test_an_error_that_cannot_be_recorded_hides_no_other(monkeypatch, tmp_path):
    """Of a full disk."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    launcher.record("error: of one's own")
    assert "TORCHELASTIC_ERROR_FILE" not in os.environ and Path("/dev/full").exists()

    def full(_, file):
        file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(launcher.json, "dump", full)
    launcher.record("error: of one's own")
    assert not list(tmp_path.iterdir())  # torchrun raises at half a file


@pytest.mark.parametrize("where", ["_ask", "_look"])
def test_a_watch_that_fails_ends_the_process(where, monkeypatch, capsys):
    ended = threading.Event()

    def fail(self):
        raise KeyError("unforeseen")

    monkeypatch.setattr(watch.Watch, where, fail)
    monkeypatch.setattr(watch.Watch, "end", lambda self: ended.set())
    watching = watch.Watch(dist.HashStore(), 0, 1, 60.0)
    assert ended.wait(10)
    watching.close()
    assert "KeyError: 'unforeseen'" in capsys.readouterr().err


RANK = """
import os, signal, sys, time
import torch
from partial_fc.parallel import distributed
from partial_fc.parallel.watch import here, leave_time_to_compile, unlimited

def slow(graph, inputs):
    time.sleep(6 * rank)
    return graph.forward

with distributed.job(watch_seconds=4):
    rank = distributed.rank()
    leave_time_to_compile()
    here.begin("forward", waits=True)
    torch.compile(torch.sin, backend=slow)(torch.ones(2))
    here.begin("gather", waits=True)
    distributed.barrier()
    with unlimited("save"):
        time.sleep(6 * rank)
        distributed.barrier()
    print("exempt", flush=True)
    here.step = 7
    here.begin("data", waits=False)
    if rank == int(sys.argv[1]):
        time.sleep(0.5)  # several times as long as until it has told so
        os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[2] == "stops" else time.sleep(100)
    here.begin("gather", waits=True)
    distributed.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, does, wanted",
    [
        pytest.param(
            1,
            "hangs",
            r"rank 1 on .* did not come: it has been in phase 'data' of step 7 for \d+ s",
            marks=pytest.mark.soak("launch"),
        ),
        (1, "stops", r"rank 1 on .* has not been heard of for \d+ s .*, last in phase 'data' of step 7"),
        pytest.param(
            0,
            "stops",
            r"rank 0 on .* holds the store .* has not answered for \d+ s .*, last in phase 'data' of step 7",
            marks=pytest.mark.soak("launch"),
        ),
    ],
)
def test_a_rank_that_does_not_come_is_named(tmp_path, rank, does, wanted):
    """Past the timeout; saving and compiling are given the time."""
    (tmp_path / "rank.py").write_text(RANK)
    where = TORCH | {"MASTER_PORT": str(free_port())}
    ranks = [
        Program(tmp_path / "rank.py", rank, does, env=where | {"RANK": str(number), "LOCAL_RANK": str(number)})
        for number in (0, 1)
    ]
    try:
        waiting = ranks[1 - rank].wait(60)
        assert waiting.returncode == 1
        assert [program.stdout for program in ranks] == ["exempt\n"] * 2, [program.stderr for program in ranks]
        if does == "hangs":  # it hears of it, too
            assert ranks[rank].wait(30).returncode == 1
        lines = [line for program in ranks for line in program.stderr.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and re.match(f"error: {wanted}", lines[0]), [program.stderr for program in ranks]
    finally:
        for program in ranks:
            program.process.kill()
            program.process.join()


@pytest.mark.soak("ends")
def test_a_stopped_rank_ends_the_training(glyphs_ci, tmp_path):
    job = begin(2, tmp_path / "run", "run.steps=5000", "run.timeout=12")
    wait_for_step(tmp_path / "run", 30, job)  # it tells where it is every 0.6 s
    os.kill(job.pids[1], signal.SIGSTOP)
    assert job.ranks[0].wait(60).returncode == 1
    os.kill(job.pids[1], signal.SIGKILL)  # as torchrun does, 30 s later
    output = finish(job, code=1)
    wanted = (
        r"\nerror: rank 1 on .* has not been heard of for \d+ s \(run.timeout is 12 s\), last in phase '.*' of step"
    )
    assert re.search(wanted, output), output
