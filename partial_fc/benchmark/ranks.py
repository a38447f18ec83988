"""Starts the ranks of a measurement as processes of their own: fresh memory, a group of their own."""

import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from partial_fc.parallel import distributed

FAILED = 3  # exit code of a rank that said what was wrong


def on_ranks(function: Callable, ranks: int, device: str, *arguments) -> list:
    """function(*arguments) in `ranks` fresh processes joined in one group; the list of their results, by rank.

    Alone, all of them are started here. Under torchrun each of its processes starts one, with its own rank, and gets
    all results. `function` is at a module's top level. Raises RunError where a rank failed, with what it said.
    """
    started, world_size = distributed.rank(), distributed.world_size()
    address = os.environ.get("MASTER_ADDR", "127.0.0.1") if world_size > 1 else "127.0.0.1"
    port = distributed.gather_objects(_free_port())[0]
    environments = []
    for rank in [started] if world_size > 1 else range(ranks):
        environment = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        # torchrun's children would look for torchrun's own store at this port
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        environment["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", "0") if world_size > 1 else str(rank)
        if ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        environments.append(environment)
    with distributed.together("the benchmark"):
        results = _run(function, arguments, environments)
    return [result for part in distributed.gather_objects(results) for result in part]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _run(function: Callable, arguments: tuple, environments: list[dict]) -> list:
    # forkserver: a child has torch imported already, and nothing else of this process
    context = multiprocessing.get_context("forkserver")
    steps = [f"partial_fc.benchmark.{part}_steps" for part in ("head", "backbone")]
    context.set_forkserver_preload(["__main__", *steps])
    processes, answers = [], {}
    for environment in environments:
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(function, arguments, environment, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append((process, ours))
    try:
        while len(answers) < len(processes):
            for connection in wait([ours for _, ours in processes if ours not in answers]):
                try:
                    succeeded, answers[connection] = connection.recv()
                except (EOFError, ConnectionResetError):
                    succeeded, answers[connection] = False, "a rank ended without an answer"
                if not succeeded:
                    raise distributed.RunError(_what_failed(answers[connection], processes))
        return [answers[ours] for _, ours in processes]
    finally:
        for process, ours in processes:
            if len(answers) < len(processes) or sys.exc_info()[1] is not None:
                process.kill()  # it may wait for the one that failed
            process.join()
            ours.close()


def _what_failed(message: str, processes: list) -> str:
    time.sleep(0.2)  # of a rank that died the others hear first
    for rank, (process, _) in enumerate(processes):
        if process.exitcode not in (None, 0, FAILED):
            return (
                f"process {rank} ended with exit code {process.exitcode}; -9 is what the kernel does when memory runs "
                "out: fewer variants or a smaller size need less"
            )
    return message


def _rank(function: Callable, arguments: tuple, environment: dict, connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    with distributed.job():
        try:
            result = function(*arguments)
        except Exception as error:
            # said before the group falls apart and the others fail for that
            clear = isinstance(error, ValueError | distributed.RunError)
            connection.send((False, str(error) if clear else traceback.format_exc()))
            sys.exit(FAILED)
    connection.send((True, result))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
