"""How a process ends: with its parent, but not with its terminal, and in one line where nobody reads its output.

It imports neither torch nor anything of this package: torch's import takes seconds, in which torchrun may end.
"""

import ctypes
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1


def signal_at_end_of_parent(number: int, parent: int | None = None) -> Callable[[], None]:
    """What has the kernel send `number` to the process that calls it when its parent ends. Does nothing but on Linux.

    Where the parent is no longer the process `parent`, it ends the caller. It may be called between fork and exec: all
    is loaded now.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return lambda: None

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if parent is not None and os.getppid() != parent:
            os._exit(1)

    return ask


def end_with_torchrun() -> None:
    """Ends this rank when torchrun ends, be it by SIGKILL. Without torchrun it does nothing.

    Else the rank would train on as an orphan, or wait for others that are never started.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signal_at_end_of_parent(signal.SIGKILL)()
    if _is_orphan():
        print("error: torchrun has ended before this rank began", file=sys.stderr, flush=True)
        os._exit(1)


def _is_orphan() -> bool:
    """Whether torchrun was gone before the kernel was asked to tell.

    A rank that it starts leads a session; in a script of --no-python it does not, and then nothing is known. Its parent
    is torchrun, which is Python and process 1 in some containers, or what adopts orphans.
    """
    parent = os.getppid()
    if os.getsid(0) != os.getpid():
        return False
    try:
        program = os.path.basename(Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")[0])
        name = Path(f"/proc/{parent}/comm").read_text().strip()
    except OSError:
        return False
    return (parent == 1 or name == "systemd") and b"python" not in program


def end_without_traceback_on_sigint() -> None:
    """As other programs do; a shell's background job, which ignores SIGINT, goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def handled(signals: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets `handler` take these signals, and gives them back at the end."""
    before = [(number, signal.signal(number, handler)) for number in signals]
    try:
        yield
    finally:
        for number, former in before:
            signal.signal(number, former)


def outlive_terminal() -> None:
    """Lets output vanish when the terminal that it goes to is gone: a print would be an error, before SIGHUP comes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


class _Terminal(io.FileIO):
    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _discard(self.fileno())
            return len(data)


@contextmanager
def ended_where_nobody_reads(message: str = "") -> Iterator[None]:
    """Ends a program with code 1 and `message`, without a traceback, when nobody reads its stdout: `| head -3`."""
    try:
        yield
    except BrokenPipeError:
        if not nobody_reads():
            raise
        sys.exit(message or 1)
    finally:
        if nobody_reads():  # the interpreter flushes stdout at its end, and would complain
            _discard(sys.stdout.fileno())


def nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader is gone."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (AttributeError, ValueError):  # no stdout, or one without a descriptor
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard(stream: int) -> None:
    """Lets what is written to this descriptor vanish."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream)
    os.close(null)
