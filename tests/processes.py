"""Programs as a user starts them, forked from a server that has loaded torch and its compiler: 5 s of CPU each saved.

They differ from `python launch/train.py` in their imports, which were made before. Tests of torchrun itself, of imports
and of the interpreter's end start real interpreters.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist

REPOSITORY = Path(__file__).parent.parent
# Loaded once per server, not in each process: torch._dynamo comes with the first step of any optimizer (2 s), the
# compiler with the first compiled head and with DeepSpeed (1.5 s), wandb, plots and the page with most runs (1.2 s).
PRELOADED = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "partial_fc.train",
    "partial_fc.evaluate.runs",
    "partial_fc.commands",
    "partial_fc.report.page",
    "wandb",
    "tests.test_train",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def _run(arguments: list[str], environment: dict[str, str], folder: str, out: str, error: str) -> None:
    """The child: `python *arguments`, or partial-fc."""
    for path, streams in ((out, (1,)), (error, (2,))):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in streams:
            os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # as the interpreter has them at its start; the server ignores SIGINT, and nohup SIGHUP
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv, code = arguments, 0
    try:
        if arguments[0] == "partial-fc":
            from partial_fc.cli import main

            main()
        else:
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code, sys.last_value = end.code, end  # held until the end with all that its frames hold
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exc()
        code, sys.last_value = 1, error  # as the interpreter does
    atexit._run_exitfuncs()
    sys.exit(code)


def is_running(pid: int) -> bool:
    """Whether there is that process, and not only an exit code that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Program:
    """A process that runs `arguments`: a script and what follows it, or "partial-fc" and its subcommand."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None, cwd: Path = REPOSITORY, output: str = ""):
        """`output`: a file for both streams, appended to; without one each has its own."""
        self._folder = tempfile.TemporaryDirectory(prefix="partial_fc_program_")
        self._out = output or f"{self._folder.name}/out"
        self._error = output or f"{self._folder.name}/error"
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | (env or {})
        words = [str(argument) for argument in arguments]
        self.process = context.Process(target=_run, args=(words, environment, str(cwd), self._out, self._error))
        self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self) -> str:
        return Path(self._out).read_text() if Path(self._out).exists() else ""

    @property
    def stderr(self) -> str:
        return Path(self._error).read_text() if Path(self._error).exists() else ""

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 200) -> "Program":
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it did not end within {timeout} s:\n{self.stdout}\n{self.stderr}")
        return self


def run_program(*arguments: object, timeout: float = 200, **options) -> Program:
    return Program(*arguments, **options).wait(timeout)


class Job:
    """`world_size` ranks of launch/train.py (`script`), with the store and the environment that torchrun gives them.

    Like its agent, `communicate` ends the others with SIGTERM as soon as one rank has failed.
    """

    def __init__(
        self,
        world_size: int,
        *arguments: object,
        env: dict[str, str] | None = None,
        script: str | Path = "launch/train.py",
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="partial_fc_job_")
        self._output = Path(self._folder.name) / "output"
        self._output.touch()
        # held here as torchrun's agent holds it: no rank is the master, and no port is chosen before it is bound
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [
            Program(
                script,
                *arguments,
                env={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "GROUP_RANK": "0",
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "GROUP_WORLD_SIZE": "1",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self._store.port),
                    "TORCHELASTIC_RUN_ID": "none",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                    "TORCHELASTIC_MAX_RESTARTS": "0",
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    **(env or {}),
                },
                output=str(self._output),
            )
            for rank in range(world_size)
        ]

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks]

    def poll(self) -> int | None:
        codes = [rank.returncode for rank in self.ranks]
        return None if None in codes else self.returncode

    @property
    def returncode(self) -> int:
        return int(any(rank.returncode for rank in self.ranks))

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            if rank.returncode is None:
                os.kill(rank.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 200) -> tuple[str, None]:
        """Waits for the end; the output of all ranks."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            running = [rank for rank in self.ranks if rank.returncode is None]
            if len(running) < len(self.ranks) and self.returncode:
                self.send_signal(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + 30)
            wait([rank.process.sentinel for rank in running], timeout=max(deadline - time.monotonic(), 0))
            if time.monotonic() >= deadline:
                self.kill()
                for rank in self.ranks:
                    rank.process.join()
                if not self.returncode:
                    raise AssertionError(f"it did not end within {timeout} s:\n{self._output.read_text()}")
        return self._output.read_text(), None
