"""A window of steps under torch's profiler, on request."""

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from partial_fc.parallel import distributed
from partial_fc.phases import Phases

ROWS = 30  # of the table, the dearest first


class Profiler:
    """Records the steps [first, last) and writes, of this rank, `trace_rank0.json.gz` and `operators_rank0.txt`.

    The trace opens in Perfetto or chrome://tracing; the phases of a step are ranges in it. Without steps it does
    nothing. A disk that is full costs the files, not the run.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device, phases: Phases):
        self._steps, self._folder, self._cuda, self._phases = steps, folder, device.type == "cuda", phases
        self._profile: profile | None = None

    def check(self, start: int, stop: int) -> None:
        """Says, on rank 0, where the steps [start, stop) of this run have none of the window."""
        if self._steps and not max(self._steps[0], start) < min(self._steps[1], stop) and distributed.rank() == 0:
            print(f"warning: track.profile {list(self._steps)}: this run makes the steps {start} to {stop - 1}")

    def begin_step(self, step: int) -> None:
        """Starts or ends the window where step number `step` is its border."""
        if self._steps is None:
            return
        first, last = self._steps
        if first <= step < last and self._profile is None:  # or in the middle, where a run goes on
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
            self._phases.named = True
        elif step >= last:
            self.close()

    def close(self) -> None:
        """Ends the window if it is open, as at the end of a run."""
        if self._profile is None:
            return
        recorded, self._profile, self._phases.named = self._profile, None, False
        recorded.stop()
        rank = distributed.rank()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self._folder / f"trace_rank{rank}.json.gz"))
            by = "self_device_time_total" if self._cuda else "self_cpu_time_total"
            table = recorded.key_averages().table(sort_by=by, row_limit=ROWS)
            (self._folder / f"operators_rank{rank}.txt").write_text(table + "\n")
        except OSError as error:
            print(f"profile of rank {rank} is not written: {error}", file=sys.stderr)
        else:
            if rank == 0:
                print(f"profile: {self._folder}/trace_rank0.json.gz for Perfetto, operators_rank0.txt", flush=True)
