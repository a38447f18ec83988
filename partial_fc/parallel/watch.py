"""Ends a job that waits for one of its ranks, and says for which.

A collective only knows that it took too long. So each rank tells the store, ten times in the timeout or more, where it
is: how many phases it has begun, which every rank begins in the same order. From this each sees who is silent (its
process is stopped, its machine hangs) and who is behind (it reads a disk that does not answer, it loops).
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from partial_fc.parallel import launcher

_GONE = (
    "its process is stopped, or its machine hangs or is not reached any more. The same command goes on from the latest "
    "checkpoint"
)


class Place:
    """Where this rank is in its work."""

    def __init__(self) -> None:
        self.begun, self.what, self.waits, self.unlimited = 0, "the start", True, 0
        self.step: int | None = None

    def begin(self, what: str, waits: bool) -> None:
        """Begins phase `what`. waits: whether a rank may wait for the others in it."""
        self.what, self.waits = what, waits
        self.begun += 1


here = Place()


@contextmanager
def unlimited(what: str) -> Iterator[None]:
    """Work that may take as long as it needs, as long as the process lives."""
    here.begin(what, waits=True)
    here.unlimited += 1
    try:
        yield
    finally:
        here.unlimited -= 1


def leave_time_to_compile() -> None:
    """What torch compiles from now on may take as long as it needs."""
    from torch._dynamo.callback import callback_handler  # torch._dynamo's import takes 2 s

    def count(change: int) -> None:
        here.unlimited += change

    if not callback_handler.start_callbacks:
        callback_handler.register_start_callback(lambda *_: count(1))
        callback_handler.register_end_callback(lambda *_: count(-1))


class Watch:
    """Two threads of this rank: one asks the others through the store, one looks whether the store answers."""

    def __init__(self, store: Any, rank: int, ranks: int, timeout: float):
        """store: a torch.distributed.Store, its connection used by nobody else. timeout: in seconds."""
        self._store, self._rank, self._ranks, self._timeout = store, rank, ranks, timeout
        self._interval = min(timeout / 20, 10.0)
        self._answers = 0  # of the store, which say that it is there
        self.found: str | None = None  # what was wrong; the process then ends within seconds
        self._seen: dict[int, dict] = {}  # what each rank said last
        self._ended = threading.Event()
        works = (self._ask, self._look)
        self._threads = [threading.Thread(target=self._to_the_end, args=(work,), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(5)

    def _to_the_end(self, work: Callable[[], None]) -> None:
        """A watch that has died would leave the job to wait for a day."""
        try:
            work()
        except Exception:
            if self._ended.is_set():  # the job has ended, and the store with it
                return
            with suppress(OSError, ValueError):
                traceback.print_exc()
            self.end()

    def _ask(self) -> None:
        seen = self._seen
        heard, moved = [0.0] * self._ranks, [0.0] * self._ranks  # when it said something new, and was further on
        clock, last = 0.0, time.monotonic()
        with suppress(RuntimeError):  # the store is gone: with rank 0, which has ended, or is to be noticed by _look
            self._store.compare_set("verdict", "", "none")
            while not self._ended.wait(self._interval):
                now = time.monotonic()
                # a process that was stopped itself has not waited for the others
                clock, last = clock + min(now - last, 2 * self._interval), now
                self._tell()
                for rank, said in self._read(seen).items():
                    before = seen.get(rank)
                    heard[rank] = clock
                    if before is None or said["begun"] != before["begun"] or before["unlimited"] > said["unlimited"]:
                        moved[rank] = clock
                    seen[rank] = said
                verdict = self._store.get("verdict").decode()
                self._answers += 1
                if verdict == "none":
                    silent, still = ([clock - time for time in times] for times in (heard, moved))
                    found = judge(seen, silent, still, self._timeout)
                    if found is None:
                        continue
                    verdict = self._store.compare_set("verdict", "none", f"{self._rank} {found}").decode()
                speaker, _, text = verdict.partition(" ")
                self._end(text, speaks=int(speaker) == self._rank)

    def _end(self, text: str, speaks: bool) -> None:
        """Ends the process: its main thread waits in a collective, where no exception reaches it."""
        self.found = text
        launcher.record(f"error: {text}")
        if speaks:
            with suppress(OSError, ValueError):
                print(f"error: {text}", file=sys.stderr, flush=True)
        time.sleep(self._interval + 1)  # until all have heard: a rank that is gone makes the others' collectives fail
        self.end()

    def end(self) -> NoReturn:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)

    def _tell(self) -> None:
        place = {"host": socket.gethostname(), "begun": here.begun, "unlimited": here.unlimited > 0}
        place |= {"step": here.step, "what": here.what, "waits": here.waits, "answer": self._answers}
        self._store.set(f"rank {self._rank}", json.dumps(place))

    def _read(self, seen: dict[int, dict]) -> dict[int, dict]:
        """What those ranks say who say something new."""
        present = [rank for rank in range(self._ranks) if rank in seen or self._store.check([f"rank {rank}"])]
        texts = self._store.multi_get([f"rank {rank}" for rank in present])
        said = {rank: json.loads(text) for rank, text in zip(present, texts, strict=True)}
        return {rank: place for rank, place in said.items() if place != seen.get(rank)}

    def _look(self) -> None:
        answers, silent, last = 0, 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            silent, last = silent + min(now - last, 2 * self._interval), now
            if self._answers != answers:
                answers, silent = self._answers, 0.0
            if silent > self._timeout:
                agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                holder = "the first node's torchrun" if agent else _names([0], self._seen)
                last_seen = "" if agent else f", last in {_place(self._seen.get(0))}"
                self._end(
                    f"{holder} holds the store where ranks meet, {os.environ.get('MASTER_ADDR')}:"
                    f"{os.environ.get('MASTER_PORT')}, and has not answered for {silent:.0f} s (run.timeout)"
                    f"{last_seen}: {_GONE}",
                    # nobody can agree on who says it
                    speaks=self._rank == 1 or os.environ.get("LOCAL_RANK") == "0",
                )


def judge(seen: dict[int, dict], silent: list[float], still: list[float], timeout: float) -> str | None:
    """Which rank keeps the others waiting, and where; None where nobody has for `timeout` seconds.

    seen: what each rank said last. silent, still: seconds since each rank said something new, and was further on.
    """
    gone = [rank for rank, seconds in enumerate(silent) if seconds > timeout]
    if len(seen) == len(silent):
        least = min(place["begun"] for place in seen.values())
        behind = [rank for rank, place in seen.items() if place["begun"] == least]
        # Nobody has moved: who is behind for a moment only was waiting itself until now, and has not told yet.
        waited = min(still)
        if not gone and (waited <= timeout or any(seen[rank]["unlimited"] for rank in behind)):
            return None
        gone = gone or [rank for rank in behind if silent[rank] > timeout / 2]  # stopped, not at work
    elif not gone:
        return None
    if gone:
        return (
            f"{_names(gone, seen)} has not been heard of for {silent[gone[0]]:.0f} s (run.timeout is {timeout:.0f} s), "
            f"last in {_place(seen.get(gone[0]))}: {_GONE}"
        )
    where = f"{_place(seen[behind[0]])} for {waited:.0f} s (run.timeout is {timeout:.0f} s)"
    if len(behind) == len(silent):
        if not seen[behind[0]]["waits"]:  # all of them work, on a file system that is slow for all
            return None
        return (
            f"no rank has come further than {where}: they wait for each other. Look at the network between the machines"
        )
    return (
        f"{_names(behind, seen)} did not come: it has been in {where}, and the other ranks wait for it. Look at what "
        "it waits for there, a disk for example; raise run.timeout if it may take so long"
    )


def _names(ranks: list[int], seen: dict[int, dict]) -> str:
    first = ranks[0]
    host = f" on {seen[first]['host']}" if first in seen else ""
    return f"rank {first}{host}" + (f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else "")


def _place(said: dict | None) -> str:
    if said is None:
        return "the start"
    return f"phase '{said['what']}'" + ("" if said["step"] is None else f" of step {said['step']}")
