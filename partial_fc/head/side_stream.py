"""Work on a CUDA stream of its own beside the main one, and copies that do not wait; elsewhere simply done."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host does not wait for what a CUDA device has queued."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class SideStream:
    """A stream for updates that may run beside what the current stream has queued."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._done: torch.cuda.Event | None = None
        self._keep: object = None

    @contextmanager
    def run(self, after: list[torch.cuda.Event | None] | None, keep: object) -> Iterator[None]:
        """Queues the body once the events of `after` have happened; None: once all that is queued now is done.

        `keep`: what the body reads; it stays alive until `join`, or its memory would be given away while in use.
        """
        if self._stream is None:
            yield
            return
        if after is None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for event in after or []:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            yield
        self._done, self._keep = self._stream.record_event(), keep

    def join(self) -> None:
        """What the current stream queues from here on comes after the last body."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._done = self._keep = None
