"""The ledger: one JSON object a line, one line a finished trial. It is committed, and nothing in it is changed.

digest row stage overrides tuned seed epochs   which trial (see plan.Trial)
status                                         "done" or "failed"
result                                         of each set: tar_at_far, dir_at_far, rank1, fold_accuracy
loss target_cosine                             of the last logged steps
error                                          why it failed
seconds commit versions device                 wall time over all its pieces, and what it ran under; entries of early
                                               runs have no device: those were CPUs
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from partial_fc.documents import MIB, parse_json, read_bytes
from partial_fc.folders import make_folder
from partial_fc.schema import Document, fits

DONE, FAILED = "done", "failed"
BYTES = 256 * MIB  # of the file; an entry takes 2 kB

Rate = Annotated[float, Field(ge=0, le=1)]


class _Tar(Document):
    at_1e4: Rate | None = Field(alias="0.0001")


class _Dir(Document):
    at_1: Rate | None = Field(alias="0.01")


class _Result(Document):
    """Of one set: what the tables read."""

    tar_at_far: _Tar
    dir_at_far: _Dir
    rank1: Rate | None


def _facts(values: list) -> list:
    if not (len(values) == 2 and isinstance(values[0], str) and isinstance(values[1], int) and 0 < values[1] < 1 << 63):
        raise ValueError("a fingerprint and a number of samples")
    return values


class _Entry(Document):
    digest: str
    data: dict[str, Annotated[list, AfterValidator(_facts)]]
    seconds: float
    commit: str
    device: str = "cpu"


class _Done(_Entry):
    status: Literal["done"]
    result: dict[str, _Result] = Field(min_length=1)


class _Failed(_Entry):
    status: Literal["failed"]
    error: str


def read(path: Path) -> dict[str, dict]:
    """Digest to entry; of several with one digest the last counts. A torn last line is left out, with a message.

    Raises ValueError, which names the line and the field, for any other line that is no entry.
    """
    if not path.exists():
        return {}
    entries = {}
    lines = read_bytes(path, BYTES).split(b"\n")
    if lines[-1]:
        print(f"{path}: its last line is torn and left out: the trial is run again")
    for number, line in enumerate(lines[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line, where)
            failed = isinstance(entry, dict) and entry.get("status") == FAILED
            fits(_Failed if failed else _Done, entry, where)
        except ValueError as error:
            raise ValueError(f"{error}: no entry of a ledger, mend or delete that line") from None
        entries[entry["digest"]] = entry
    return entries


def recorded_data(entries: dict[str, dict]) -> dict[str, list]:
    """Every data set folder of the entries: its fingerprint and number of samples, as the last entry has them."""
    return {folder: facts for entry in entries.values() for folder, facts in entry["data"].items()}


@contextmanager
def opened(path: Path) -> Iterator["Ledger"]:
    """The ledger for appending, for one process at a time; a torn last line is cut off.

    Raises ValueError if another process has it.
    """
    make_folder(path.parent, "--ledger")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another study writes to {path}: wait for it, or give another --ledger and --runs"
            ) from None
        entries = read(path)
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        yield Ledger(path, descriptor, entries)
    finally:
        os.close(descriptor)


class Ledger:
    """Entries by digest, in memory and on disk alike."""

    def __init__(self, path: Path, descriptor: int, entries: dict[str, dict]):
        self.path, self.entries = path, entries
        self._descriptor = descriptor

    def append(self, entry: dict) -> None:
        """Raises OSError, with the file as it was, where the line cannot be written."""
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._descriptor)
        if not self._is_at_its_path(before):
            raise OSError(
                f"{self.path} was replaced or deleted while the study ran, as git checkout, stash and pull do: nothing "
                "more is written to it. Start the same command again: a trial that has finished meanwhile is entered "
                "from its run folder and not trained again"
            )
        if os.write(self._descriptor, line) != len(line):
            os.ftruncate(self._descriptor, before.st_size)  # the next line would go behind a torn one
            raise OSError(f"{self.path}: the disk is full: the entry is not written; free some space and start again")
        os.fsync(self._descriptor)
        self.entries[entry["digest"]] = entry

    def _is_at_its_path(self, ours: os.stat_result) -> bool:
        try:
            return os.path.samestat(ours, os.stat(self.path))
        except FileNotFoundError:
            return False
