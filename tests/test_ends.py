"""How training ends: asked to stop, interrupted, without its terminal, a reader of its output, memory, or torchrun."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partial_fc import checkpoint
from tests.conftest import REPOSITORY
from tests.processes import Job, Program, is_running, run_program
from tests.test_train import CONFIG, QUICK, TORCHRUN, finish, start, wait_for_step, workers

pytestmark = pytest.mark.slow

ENDLESS = ("run.steps=100000", "checkpoint.every=100000", "data.workers=1", "evaluate.sets={}")


def words(run: Path, *overrides: str) -> tuple:
    return (CONFIG, *QUICK, *ENDLESS, f"run.dir={run}", *overrides)


class Run(Program):
    """Training in one process, without torchrun."""

    def __init__(self, run: Path, *, output: str = ""):
        super().__init__("launch/train.py", *words(run), output=output)

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self) -> tuple[str, None]:
        return self.stdout + self.stderr, None

    def kill(self) -> None:
        self.process.kill()


def assert_saved(run: Path) -> None:
    saved = checkpoint.find_latest(run)
    assert saved is not None and saved.step >= 3 and (run / "preempted").read_text() == f"step {saved.step}\n"


# ---- asked to stop

ASKED = """
import os, signal, sys
from partial_fc.train import preemption
first, second, ignored = sys.argv[1:]
if ignored:
    signal.signal(signal.Signals[ignored], signal.SIG_IGN)
with preemption() as asked:
    os.kill(os.getpid(), signal.Signals[first])
    print(asked(), flush=True)
    os.kill(os.getpid(), signal.Signals[second])
    print("saved", flush=True)
"""


@pytest.mark.parametrize(
    "first, second, ignored, output, code",
    [
        ("SIGINT", "SIGINT", "", "True\n", -signal.SIGINT),
        ("SIGINT", "SIGTERM", "", "True\n", -signal.SIGTERM),  # as torchrun hands on the second
        ("SIGTERM", "SIGINT", "", "True\nsaved\n", 0),
        ("SIGUSR1", "SIGTERM", "SIGUSR1", "True\nsaved\n", 0),  # ignored by torchrun in train.sbatch
        ("SIGHUP", "SIGHUP", "", "True\nsaved\n", 0),
        ("SIGHUP", "SIGHUP", "SIGHUP", "False\nsaved\n", 0),  # nohup
    ],
)
def test_signals_ask_to_stop_and_a_second_sigint_ends_at_once(tmp_path, first, second, ignored, output, code):
    (tmp_path / "asked.py").write_text(ASKED)
    ended = run_program(tmp_path / "asked.py", first, second, ignored, timeout=30)
    assert (ended.stdout, ended.returncode) == (output, code), ended.stderr
    assert ("interrupt again to end it at once" in ended.stderr) == ("SIGINT" in (first, second))


def test_sigint_to_one_rank_saves_on_all(glyphs_ci, tmp_path):
    run = tmp_path / "run"
    job = Job(2, *words(run))
    wait_for_step(run, 3, job)
    os.kill(job.pids[1], signal.SIGINT)
    finish(job)
    assert_saved(run)


def test_a_run_whose_terminal_is_closed_saves(glyphs_ci, tmp_path):
    """As by a lost ssh: it writes into the closed terminal before SIGHUP comes."""
    run = tmp_path / "run"
    master, terminal = pty.openpty()
    process = Run(run, output=os.ttyname(terminal))
    wait_for_step(run, 3, process)
    os.close(terminal)
    os.close(master)
    wait_for_step(run, len((run / "metrics.jsonl").read_text().splitlines()) + 2, process)
    os.kill(process.pid, signal.SIGHUP)
    process.process.join(60)
    assert process.returncode == 0
    assert_saved(run)


# ---- something is gone

PIPED = """
import os, runpy, sys
ours, theirs = os.pipe()
if os.fork() == 0:
    os.close(theirs)
    with os.fdopen(ours) as lines:
        for _ in range(3):
            lines.readline()
    os._exit(0)
os.close(ours)
os.dup2(theirs, 1)
os.close(theirs)
sys.argv = sys.argv[1:]
runpy.run_path("launch/train.py", run_name="__main__")
"""


def test_a_run_ends_with_one_line_when_nobody_reads_its_output(glyphs_ci, tmp_path):
    """As of `| head -3`."""
    (tmp_path / "piped.py").write_text(PIPED)
    ended = run_program(tmp_path / "piped.py", "launch/train.py", *words(tmp_path / "run"), timeout=60)
    assert ended.returncode == 1
    assert ended.stderr == "error: nobody reads the output any more. The same command resumes the run\n"


def test_a_killed_reader_ends_the_run_with_one_line(glyphs_ci, tmp_path):
    """By SIGKILL, as the kernel does where memory runs out."""
    process = Run(tmp_path / "run")
    wait_for_step(tmp_path / "run", 3, process)
    (reader,) = children(process.pid)
    os.kill(reader, signal.SIGKILL)
    assert process.wait(60).returncode == 1
    assert process.stderr.startswith("error: rank 0: a reader process was killed (SIGKILL)"), process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.soak("ends")
@pytest.mark.timeout(1800)
def test_torchrun_blames_the_rank_whose_reader_was_killed(glyphs_ci, tmp_path):
    """Not the one whose collective fails for it, in the same second."""
    for number in range(6):
        run = tmp_path / f"run{number}"
        agent = start(2, run, *ENDLESS)
        wait_for_step(run, 3, agent)
        (rank,) = (pid for pid in workers(agent.pid) if b"RANK=1" in environment_of(pid))
        (reader,) = children(rank)
        os.kill(reader, signal.SIGKILL)
        output = finish(agent, code=1)
        cause = output.partition("Root Cause (first observed failure):")[2]
        assert re.search(r"rank +: 1 .*", cause) and "error: rank 1: a reader process was killed" in cause, output


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


LITTLE = """
import ctypes, os, runpy, sys
libc = ctypes.CDLL(None, use_errno=True)
def done(code):
    if code:
        print("no mount namespace here:", os.strerror(ctypes.get_errno()))
        sys.exit(77)
done(libc.unshare(0x20000))  # CLONE_NEWNS
done(libc.mount(None, b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
done(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=512k"))
sys.argv[0] = "launch/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_little_shared_memory_ends_all_ranks_with_a_line(glyphs_ci, tmp_path, ranks):
    """A few batches fit, as into the 64 MB of a container."""
    (tmp_path / "little.py").write_text(LITTLE)
    began = time.monotonic()
    job = Job(
        ranks, *words(tmp_path / "run", "data.prefetch=20", "data.global_batch_size=48"), script=tmp_path / "little.py"
    )
    output, _ = job.communicate(60)
    if any(rank.returncode == 77 for rank in job.ranks):
        pytest.skip(f"not run: {output}")
    assert job.returncode == 1 and time.monotonic() - began < 40
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert errors, output
    for error in errors:
        assert "a reader cannot hand over 0.1 MiB of images" in error and "of 0.5 MiB are free in /dev/shm" in error
        assert "docker run --shm-size" in error and "data.prefetch" in error


# ---- torchrun is gone: real interpreters, that import no torch or are ended while they do

ORPHAN = """
import os, sys, time
from partial_fc.parallel.process import end_with_torchrun
os.environ["TORCHELASTIC_RUN_ID"] = "none"
agent = os.getpid()
if os.fork() == 0:  # a rank; its parent plays torchrun
    os.setsid()
    while sys.argv[1] == "gone" and os.getppid() == agent:
        time.sleep(0.001)
    end_with_torchrun()
    print("the rank begins", flush=True)
    os._exit(0)
if sys.argv[1] == "alive":
    os.wait()
"""


@pytest.mark.parametrize("first, agent", [(True, "alive"), (False, "alive"), (False, "gone")])
def test_a_rank_does_not_begin_without_torchrun(tmp_path, first, agent):
    """Which is process 1 of a container, or a child of another one."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("not run: no PID namespace here: needs root and unshare")
    (tmp_path / "orphan.py").write_text(ORPHAN)
    play = [sys.executable, str(tmp_path / "orphan.py"), agent]
    command = play if first else ["sh", "-c", '"$@"; sleep 1', "sh", *play]
    ended = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", *command],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = ("the rank begins\n", "") if agent == "alive" else ("", "error: torchrun has ended before this rank began\n")
    assert (ended.stdout, ended.stderr) == said


AGENT = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
print(rank.pid, flush=True)
rank.wait()
"""


def test_a_rank_ends_when_torchrun_is_killed_while_it_imports_torch(tmp_path):
    environment = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)}
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, "launch/train.py", str(CONFIG)],
        cwd=REPOSITORY,
        env=os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    rank = int(agent.stdout.readline())
    until = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{rank}/maps").read_text():
        assert time.monotonic() < until
        time.sleep(0.002)
    agent.kill()
    agent.wait()
    agent.stdout.close()
    until = time.monotonic() + 1  # the import takes longer
    while is_running(rank):
        assert time.monotonic() < until
        time.sleep(0.01)


# ---- a finished job: real interpreters, whose order of imports and whose end matter

LEFT = """
import importlib, os
from partial_fc.parallel import distributed
with distributed.job():
    importlib.import_module("torch.distributed.nn.functional")  # as the first step of torch.optim does
    distributed.barrier()
"""
COUNT = """
tasks = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print("threads of gloo at the end:", sum("gloo" in task for task in tasks), flush=True)
"""
TRAINING = """
import os, runpy, sys
sys.argv[0] = "launch/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_interpreter(*arguments: object, **environment: str) -> str:
    """What it prints; its code is 0."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_no_thread_of_gloo_outlives_the_process_group():
    """One that still works while the interpreter ends aborts it: 1 of 20 times on a loaded machine."""
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    assert run_interpreter("-c", LEFT + COUNT, **group) == "threads of gloo at the end: 0\n"


@pytest.mark.soak("ends")
@pytest.mark.timeout(6 * 3600)
def test_finished_jobs_end_with_0_on_a_loaded_machine(glyphs_ci, tmp_path):
    """Real trainings of three ranks and three steps, beside two busy loops."""
    (tmp_path / "training.py").write_text(TRAINING + COUNT)
    jobs = int(os.environ.get("PARTIAL_FC_ENDS", 200))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for number in range(jobs):
            run = tmp_path / f"run{number}"
            output = run_interpreter(*TORCHRUN[1:], 3, tmp_path / "training.py", *words(run, "run.steps=3"))
            assert output.count("threads of gloo at the end: 0\n") == 3, output
            shutil.rmtree(run)
            print(f"{number + 1} of {jobs} jobs have ended with 0", flush=True)
    finally:
        for process in busy:
            process.kill()
