"""torchrun on one node and on two: two hosts here are two network namespaces with a cable between them.

In `make test` its agents are forked from a server that has loaded torch, and fork their workers, as torchrun itself
offers (--run-path --start-method=fork): 25 s of imports saved. In `make soak` all are real interpreters.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from partial_fc.parallel import distributed
from tests.conftest import REPOSITORY, run_ranks
from tests.processes import Program
from tests.test_train import CONFIG, QUICK, checksums, curve, finish, train_here, wait_for_step

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
OPTIONS = (*QUICK, "evaluate.sets={}", "run.steps=22")

AGENT = """
import ctypes, os, sys
_, namespace, *words = sys.argv
if namespace:  # as `ip netns exec`; CLONE_NEWNET
    inside = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(inside, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")
from torch.distributed.run import main
main(["--run-path", "--start-method=fork", *words])
"""

RANK = """
import runpy
sys.argv = words
runpy.run_path(words[0], run_name="__main__")
"""


class Agent(Program):
    """torchrun in a forked process, and forked workers."""

    def __init__(self, options: tuple[str, ...], run: Path, namespace: str = "", **environment: str):
        script = run.with_name(f"agent_{namespace}.py")
        script.write_text(AGENT)
        words = (*options, "launch/train.py", CONFIG, *OPTIONS, f"run.dir={run}")
        log = str(run.with_name(f"agent_{namespace}.log"))
        super().__init__(script, namespace, *words, env=environment, output=log)

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float = 200) -> tuple[str, None]:
        return self.wait(timeout).stdout, None

    def kill(self) -> None:
        self.process.kill()


def torchrun(options: tuple[str, ...], run: Path, namespace: str = "", **environment: str) -> subprocess.Popen:
    before = ("ip", "netns", "exec", namespace) if namespace else ()
    command = [*before, *TORCHRUN, *options, "launch/train.py", str(CONFIG), *OPTIONS, f"run.dir={run}"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


Start = Callable[..., Agent | subprocess.Popen]


@pytest.fixture(scope="module")
def whole(glyphs_ci, tmp_path_factory) -> dict[int, Path]:
    """Run folders of uninterrupted runs on this machine alone, made when asked for, by the number of ranks."""
    folder = tmp_path_factory.mktemp("whole")

    class Runs(dict):
        def __missing__(self, ranks: int) -> Path:
            run_ranks(train_here, ranks, folder / f"{ranks}", glyphs_ci / "train", *OPTIONS)
            self[ranks] = folder / f"{ranks}"
            return self[ranks]

    return Runs()


@pytest.mark.soak("launch")
@pytest.mark.parametrize("start", [Agent, torchrun])
def test_torchrun_restarts_a_killed_worker_and_the_run_is_the_same(whole, tmp_path, start):
    """In one more attempt, without a variable in the environment."""
    run = tmp_path / "run"
    process = start(("--standalone", "--nproc_per_node=2", "--max-restarts=3"), run)
    wait_for_step(run, 13, process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    output = finish(process)
    assert output.count("from the start") == 1 and output.count(f"from {run}/checkpoints/step_00000010") == 1, output
    assert output.count("failed (exitcode") == 1, output  # the kill; an attempt that did not come up would be another
    assert checksums(run) == checksums(whole[2]) and curve(run) == curve(whole[2])


@pytest.mark.parametrize("nodes, shared, apart", [("1", "True", True), ("2", "True", False), ("1", "False", False)])
def test_the_store_of_an_attempt(monkeypatch, capsys, nodes, shared, apart):
    """Apart where one node's number of restarts tells; on several nodes it is said what does it."""
    elastic = {"USE_AGENT_STORE": shared, "MAX_RESTARTS": "3"}
    for name, value in {"GROUP_WORLD_SIZE": nodes, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name, value in elastic.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    everything, seen = dist.HashStore(), []
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        store = distributed._of_this_attempt(everything)
        seen.append(store.check(["address of rank 1"]))
        store.set("address of rank 1", "dead by now")
    assert seen == [False, not apart]
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().out) == (nodes == "2")


class Hosts:
    """Two hosts, 10.99.0.1 and 10.99.0.2, each in a network namespace of its own.

    Their names do not resolve to these addresses, as on a Debian machine whose /etc/hosts sends its own name to a
    loopback address: torchrun and gloo must be told.
    """

    CARD = "cable0"

    def __init__(self):
        self.names = [f"pfc{os.getpid()}{letter}" for letter in "ab"]
        try:
            for name in self.names:
                ip("netns", "add", name)
            first, second = self.names
            ip("link", "add", self.CARD, "netns", first, "type", "veth", "peer", "name", self.CARD, "netns", second)
            for number, name in enumerate(self.names, start=1):
                ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", self.CARD)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", self.CARD, "up")
        except BaseException:
            self.close()
            raise

    def start(self, start: Start, host: int, run: Path, processes: int, *options: str) -> Agent | subprocess.Popen:
        """launch/README.md's command for one of several nodes, on this host."""
        given = (
            "--nnodes=2",
            f"--nproc_per_node={processes}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={run.name}",
            "--rdzv-endpoint=10.99.0.1:29500",
            f"--local-addr=10.99.0.{host + 1}",
            *(["--rdzv-conf=is_host=1"] if host == 0 else []),
            *options,
        )
        restarts = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if options else {}
        return start(given, run, self.names[host], GLOO_SOCKET_IFNAME=self.CARD, **restarts)

    def kill(self, host: int) -> None:
        """All processes of a host at once."""
        for pid in ip("netns", "pids", self.names[host]).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        for host, name in enumerate(self.names):
            if Path("/run/netns", name).exists():
                self.kill(host)
                ip("netns", "delete", name)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("not run: ip (iproute2) is not installed")
    try:
        hosts = Hosts()
    except OSError as error:
        pytest.skip(f"not run: no network namespaces here: {error}")
    yield hosts
    hosts.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "start, processes",
    [(Agent, 1), *(pytest.param(torchrun, number, marks=pytest.mark.soak("launch")) for number in (1, 2))],
)
def test_two_nodes_are_the_same_run_as_one(hosts, whole, tmp_path, start, processes):
    run = tmp_path / "run"
    agents = [hosts.start(start, host, run, processes) for host in range(2)]
    outputs = [finish(agent) for agent in agents]
    assert f"{2 * processes} ranks on cpu" in outputs[0]
    assert checksums(run) == checksums(whole[2 * processes]) and curve(run) == curve(whole[2 * processes])


@pytest.mark.soak("launch")  # torch looks the hosts' names up, half a minute long, where nothing answers
def test_a_name_that_leads_nowhere_is_told(hosts, tmp_path):
    """Without GLOO_SOCKET_IFNAME: each host's name resolves to an address that only means itself."""
    run = tmp_path / "run"
    ranks = []
    for rank, name in enumerate(hosts.names):
        where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29501"}
        script = tmp_path / f"rank{rank}.py"
        script.write_text(AGENT.partition("from torch")[0] + RANK)
        words = (script, name, "launch/train.py", CONFIG, *OPTIONS, f"run.dir={run}")
        ranks.append(Program(*words, env=where, cwd=REPOSITORY))
    for rank in ranks:
        assert rank.wait(60).returncode == 1
        assert "error: rank 0 is on " in rank.stderr and "set GLOO_SOCKET_IFNAME" in rank.stderr, rank.stderr


@pytest.mark.soak("launch")
def test_a_lost_node_started_again_and_the_run_is_the_same(hosts, whole, tmp_path):
    run = tmp_path / "run"
    first, second = (hosts.start(torchrun, host, run, 1, "--max-restarts=3") for host in range(2))
    wait_for_step(run, 13, first)
    hosts.kill(1)
    second.communicate(timeout=60)
    second = hosts.start(torchrun, 1, run, 1, "--max-restarts=3")
    output = finish(first)
    finish(second)
    assert f"from {run}/checkpoints/step_00000010" in output
    assert checksums(run) == checksums(whole[2]) and curve(run) == curve(whole[2])
