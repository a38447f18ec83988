"""Several ranks in one fast helper, what tests may do by their marks, and the shards that many of them train on."""

import fcntl
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

# Inductor's, which change no kernel: compiled in the process that asks, not in one that loads torch for it (4 s of CPU
# in each that compiles); for the instructions of this CPU, without a trial of each kind (13 s on a cold cache).
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import partial_fc.opencv  # noqa: E402, F401 - its limit of pixels, before a test imports cv2
from tests.processes import REPOSITORY, context  # noqa: E402
from tests.soak import PARTS  # noqa: E402

torch.set_num_threads(1)

CASE_TIMEOUT = 120  # seconds; a case that hangs is an error, not a hung suite


def _serve(rank: int, world_size: int, store: str, connection) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=CASE_TIMEOUT),
    )
    while True:
        task = pickle.loads(connection.recv_bytes())
        if task is None:
            break
        fn, args = task
        try:
            answer = pickle.dumps((True, fn(*args)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)  # plain bytes: torch would send tensors as open file descriptors
    dist.barrier()
    dist.destroy_process_group()


class Ranks:
    """`world_size` processes in one gloo group; `run(fn, *args)` calls fn(*args) in each."""

    def __init__(self, world_size: int):
        self.store = tempfile.mktemp(prefix="partial_fc_store_")
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self.store, theirs), daemon=False)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, fn: Callable, *args) -> list:
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((fn, args)))
        answers: dict[int, tuple] = {}
        deadline = time.monotonic() + CASE_TIMEOUT
        while len(answers) < len(self.connections):
            waiting = [c for rank, c in enumerate(self.connections) if rank not in answers]
            ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                self.kill()
                silent = [rank for rank in range(len(self.connections)) if rank not in answers]
                failures = "\n".join(f"rank {rank}:\n{text}" for rank, (ok, text) in answers.items() if not ok)
                raise AssertionError(f"{fn.__name__}: ranks {silent} gave no answer within the time\n{failures}")
            for connection in ready:
                ok, value = answers[self.connections.index(connection)] = pickle.loads(connection.recv_bytes())
                if not ok:  # the others may wait for this rank in a collective: give them a moment to fail alike
                    deadline = min(deadline, time.monotonic() + 3)
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in sorted(answers.items()) if not ok]
        if failures:
            self.kill()  # the ranks may be out of step with each other
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(len(self.connections))]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for connection in self.connections:
            connection.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        Path(self.store).unlink(missing_ok=True)


def _run_here(task: bytes) -> object:
    """A group of one needs no other process; what it gets and gives are copies, as if it were one."""
    import torch.distributed as dist
    import torch.distributed.nn.functional  # noqa: F401 - its default arguments would keep a group that is there alive

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fn, args = pickle.loads(task)
        return pickle.loads(pickle.dumps(fn(*args)))
    except Exception as error:
        raise AssertionError(f"rank 0:\n{traceback.format_exc()}") from error
    finally:
        dist.destroy_process_group()


_pools: dict[int, Ranks] = {}


def run_ranks(fn: Callable, world_size: int, *args) -> list:
    """Runs the module-level function fn(*args) on `world_size` gloo ranks; returns the list of their results."""
    if world_size == 1:
        return [_run_here(pickle.dumps((fn, args)))]
    if _quick:
        pytest.fail("run_ranks in a test that is not marked slow", pytrace=True)
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        if pool is not None:
            pool.kill()
        pool = _pools[world_size] = Ranks(world_size)
    return pool.run(fn, *args)


def pytest_sessionfinish(session, exitstatus) -> None:
    for pool in _pools.values():
        pool.close() if pool.alive else pool.kill()


def pytest_terminal_summary(terminalreporter) -> None:
    """The figures that tests of soak have recorded; what a test prints in another process is lost."""
    for report in (*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "figures":
                terminalreporter.write_line(value)


def pytest_addoption(parser) -> None:
    parser.addoption("--soak", metavar="PART", help="run the tests of one part of `make soak`, and no others")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items) -> None:
    """Leaves out the tests of soak, or all others; and without a CUDA device those that need one."""
    part, chosen, left_out = config.getoption("--soak"), [], []
    for item in items:
        parts = {name for mark in item.iter_markers("soak") for name in mark.args}
        if parts - PARTS.keys() or ("soak" in item.keywords and not parts):
            raise pytest.UsageError(f"{item.nodeid} is of soak part {parts}; give one of tests/soak.py: {[*PARTS]}")
        (chosen if (part in parts if part else not parts) else left_out).append(item)
        if set(getattr(item.module, "SLOW_FIXTURES", ())) & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if hasattr(item, "callspec") and item.callspec.params.get("world_size", 1) != 1:
            item.add_marker(pytest.mark.slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="not run: no CUDA device"))
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


# ---- `make check`: what is neither slow nor of soak starts no process and compiles nothing

_quick = False  # whether such a test runs now
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")


def _no_process(event: str, arguments: tuple) -> None:
    git = bool(arguments) and Path(str(arguments[0])).name == "git"  # 3 ms, for a run's config
    if _quick and event in _STARTS and not git:
        pytest.fail(f"{event} in a test that is not marked slow", pytrace=True)


def _no_compiler(*arguments, **options):
    if _quick:
        pytest.fail("torch.compile in a test that is not marked slow", pytrace=True)
    return _compile(*arguments, **options)


sys.addaudithook(_no_process)
_compile, torch.compile = torch.compile, _no_compiler


def is_quick(item) -> bool:
    return not any(mark in item.keywords for mark in ("slow", "soak", "gpu"))


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup(item) -> None:
    if not is_quick(item):  # `prepare glyphs` asks for a server with less in it, and the first to start one decides
        forkserver.ensure_running()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item) -> Iterator:
    global _quick
    _quick = is_quick(item)
    try:
        return (yield)
    finally:
        _quick = False


@pytest.fixture(scope="session")
def glyphs_ci() -> Path:
    """The shards of configs/glyphs_ci.yaml, made once and left there: letters in the fonts that matplotlib brings."""
    from partial_fc.data.description import VERSION
    from partial_fc.data.shards import load_index
    from partial_fc.prepare.glyphs import prepare_glyphs

    path = REPOSITORY / "data" / "glyphs_ci"
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers of pytest-xdist one makes them
        try:
            found = load_index(path / "train").version
        except (OSError, ValueError):
            found = None
        if found != VERSION:  # not there, or of an older version
            shutil.rmtree(path, ignore_errors=True)
            prepare_glyphs("letters", path, size=32)
    return path
