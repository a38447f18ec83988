"""Where the time of training goes: a chain of phases, each of which ends where the next one begins."""

import time
from collections import deque
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function

# data: waiting for the batch. gather: the batch of all ranks, which is also waiting for the last of them. head: the
# rest of its forward. backward: also joining the gradients. wait: for the device, to read the loss. update: of the
# class centers. optimizer: of the backbone. log: metrics. save: checkpoints.
NAMES = ("data", "forward", "head", "gather", "backward", "wait", "update", "optimizer", "log", "save")
ALONE = ("data", "forward", "optimizer", "log")  # where a rank spends time of its own, by which the slowest is told
_SOME = 64  # marks on a CUDA device that may wait to be read


class Phases:
    """Seconds in each phase; on a CUDA device those of its main stream, by events that nobody waits for.

    `named` makes ranges in the trace of a profiler as well.
    """

    def __init__(self, device: torch.device):
        self.device, self._cuda = device, device.type == "cuda"
        self._marks: deque[tuple[str, float | torch.cuda.Event]] = deque()
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self.named = False
        self._range = nullcontext()
        self._waiting_since: float | None = None
        self._waited = 0.0
        self.first_wait: float | None = None  # seconds that the program waited for its first batch

    def begin(self, name: str) -> None:
        """Ends the phase before, if there is one, and begins phase `name` of NAMES."""
        self._marks.append((name, self._now()))
        if self._waiting_since is not None:
            waited = time.perf_counter() - self._waiting_since
            self._waited += waited
            self.first_wait = waited if self.first_wait is None else self.first_wait
        self._waiting_since = time.perf_counter() if name == "data" else None
        if not self._cuda or len(self._marks) > _SOME:
            self._count()
        if self.named or not isinstance(self._range, nullcontext):
            self._range.__exit__(None, None, None)
            self._range = record_function(name) if self.named else nullcontext()
            self._range.__enter__()

    def read(self) -> Tensor:
        """(len(NAMES),) float64, on the host: the seconds since the last reading. Waits for the device."""
        self.begin(self._marks[-1][0])
        if self._cuda:
            torch.cuda.synchronize(self.device)
            self._count()
        seconds = torch.tensor([self._seconds[name] for name in NAMES], dtype=torch.float64)
        self._seconds = dict.fromkeys(NAMES, 0.0)
        return seconds

    def data_wait(self) -> float:
        """Seconds since the last reading that the program waited for batches, whatever its device did."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _count(self) -> None:
        while len(self._marks) > 1:
            (name, start), (_, stop) = self._marks[0], self._marks[1]
            if self._cuda and not stop.query():
                break
            self._seconds[name] += start.elapsed_time(stop) / 1000 if self._cuda else stop - start
            self._marks.popleft()


def slowest_rank(seconds: Tensor) -> tuple[int, float, str]:
    """Which rank the others wait for, by how many seconds at most, and the phase in which it takes more than they do.

    seconds: (W, len(NAMES)). All ranks leave the gather together, so who spends the least time in it came last.
    """
    gather = seconds[:, NAMES.index("gather")]
    last = int(gather.argmin())
    alone = [NAMES.index(name) for name in ALONE]
    excess = seconds[last, alone] - seconds[:, alone].mean(dim=0)
    return last, float(gather.max() - gather.min()), ALONE[int(excess.argmax())]
