"""Several ranks in one fast helper: a pool of gloo processes that is started once and runs many cases."""

import fcntl
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

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
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "partial_fc"])
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


_pools: dict[int, Ranks] = {}


def run_ranks(fn: Callable, world_size: int, *args) -> list:
    """Runs the module-level function fn(*args) on `world_size` gloo ranks; returns the list of their results."""
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        if pool is not None:
            pool.kill()
        pool = _pools[world_size] = Ranks(world_size)
    return pool.run(fn, *args)


def pytest_sessionfinish(session, exitstatus) -> None:
    for pool in _pools.values():
        pool.close() if pool.alive else pool.kill()


def pytest_collection_modifyitems(config, items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="not run: no CUDA device"))
    if not os.environ.get("PARTIAL_FC_SOAK"):
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="not run: takes minutes, see `make soak`"))


REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def glyphs_ci() -> Path:
    """The shards of configs/glyphs_ci.yaml, made once and left there: letters in the fonts that matplotlib brings."""
    from partial_fc.data.shards import load_index
    from partial_fc.prepare.glyphs import prepare_glyphs

    path = REPOSITORY / "data" / "glyphs_ci"
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers of pytest-xdist one makes them
        try:
            load_index(path / "train")
        except (OSError, ValueError):  # not there, or of an older version
            shutil.rmtree(path, ignore_errors=True)
            prepare_glyphs("letters", path, size=32)
    return path
