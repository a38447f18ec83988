"""Shards that lie behind a URL, or are compressed, as plain tars on this machine: a bounded folder of copies.

A copy is named after the SHA-256 of the shard as it lies there. So runs, data sets, ranks and readers of one machine
share the folder: what one has fetched is there for all, and a changed shard is another copy. A copy appears when it is
whole; what a killed process left is removed by the next that fetches. The copies used longest ago are deleted where
the limit asks for room; a reader that has one open reads on.
"""

import fcntl
import gzip
import hashlib
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import IO, Any, Literal, NamedTuple

from partial_fc import storage
from partial_fc.config import Data
from partial_fc.data.description import AGAIN, MOST_BYTES, Shard, read_description
from partial_fc.environment import pip_install
from partial_fc.files import sha256_of
from partial_fc.storage import Place

SUFFIXES: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
PARTIAL, PACKED = ".partial", ".packed"  # a copy that is being written, and what it is unpacked from
TRIES = 2  # of a download that is not what the index says
POLL = 0.1  # seconds
STANDSTILL = 300.0  # seconds without a byte of those that a process waits for: longer than a download takes to give up
KEPT_FREE = 0.1  # of the file system, without a limit of one's own
_AT_ONCE = 1 << 20  # bytes


class Fetches(NamedTuple):
    """What readers asked the cache for."""

    found: int = 0  # shards that were there
    fetched: int = 0  # shards that were not
    bytes: int = 0  # that came for these, and for samples that were read alone

    def plus(self, other: "Fetches") -> "Fetches":
        return Fetches(*(one + more for one, more in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Cache:
    """Copies in `folder`, which together have at most `most_bytes`; None: as much as leaves KEPT_FREE of the disk."""

    folder: Path
    most_bytes: int | None = None
    _asked: deque[Fetches] = field(default_factory=deque, compare=False)  # of threads, too

    def asked(self) -> Fetches:
        """What this process has asked for since it was last told."""
        total = Fetches()
        while self._asked:
            total = total.plus(self._asked.popleft())
        return total

    def note(self, fetches: Fetches) -> None:
        self._asked.append(fetches)

    def open(self, shard: Shard, source: Place) -> int:
        """A file descriptor of the plain tar; it is fetched from `source` where it is not there.

        Raises ValueError for a shard that is not what the index says, FileNotFoundError where there is none, and
        OSError where it cannot be fetched or kept.
        """
        path = self.path(shard)
        with suppress(FileNotFoundError):
            return self._found(path)
        with locked(self._locks / shard.sha256, self._written) as lock:  # one process fetches it, others wait
            with suppress(FileNotFoundError):
                return self._found(path)
            with _names(self.folder):
                self._make_room(shard.plain_bytes + (shard.bytes if shard.compression else 0), lock)
                descriptor = fetch(shard, source, path)
                lock.truncate(0)
                self.note(Fetches(fetched=1, bytes=shard.bytes))
                return descriptor

    def wrong(self, shard: Shard, source: Place) -> str | None:
        """What of the shard at `source` is not as the index says. One behind a URL is fetched, and not kept."""
        if not storage.remote(source):
            return _wrong(shard, source)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _names(self.folder), NamedTemporaryFile(dir=self.folder) as file:
            storage.download(source, Path(file.name))
            return _wrong(shard, Path(file.name))

    def _found(self, path: Path) -> int:
        descriptor = _open(path)
        self.note(Fetches(found=1))
        return descriptor

    def path(self, shard: Shard) -> Path:
        """Where the copy is, if it is there."""
        return self.folder / f"{shard.sha256}.tar"

    def holds(self, shard: Shard) -> bool:
        return self.path(shard).exists()

    def drop(self, shard: Shard) -> None:
        """Deletes a copy, as one that has gone bad."""
        self.path(shard).unlink(missing_ok=True)

    def limit(self) -> int:
        """Bytes that copies may have."""
        if self.most_bytes is not None:
            return self.most_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        usage = shutil.disk_usage(self.folder)
        copies = sum(size for _, size, _ in self._copies())
        written = sum(size for _, size in self._written())  # what is reserved holds these bytes, too
        return max(usage.free - int(KEPT_FREE * usage.total), 0) + copies + written

    def _copies(self) -> list[tuple[int, int, Path]]:
        """(last used, bytes, path) of each, oldest first."""
        found = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return sorted(found)

    @property
    def _locks(self) -> Path:
        """A file for each shard that was ever fetched; while one is, it holds the bytes that this will take."""
        return self.folder / "locks"

    def _make_room(self, wanted: int, lock: IO[str]) -> None:
        """Deletes copies until there is room for `wanted` bytes, which `lock` then reserves. Waits for others."""
        most = self.limit()
        if wanted > most:
            raise ValueError(
                f"the cache {self.folder} may hold {most:,} bytes, and one shard takes {wanted:,}: raise "
                "data.cache_bytes, or give a data.cache_dir with more room"
            )
        # what the others fetch is a copy then, and may go
        _wait(lambda: self._reserve(wanted, most, lock), self._written, self.folder)

    def _written(self) -> list[tuple[str, int]]:
        """What is being fetched, and how far it has come."""
        return [one for suffix in (PARTIAL, PACKED) for one in sizes(self.folder, f"*{suffix}")]

    def _reserve(self, wanted: int, most: int, lock: IO[str]) -> bool:
        with locked(self._locks / "room"):
            total = wanted + self._reserved()
            if total > most:
                return False
            copies = self._copies()
            total += sum(size for _, size, _ in copies)
            for _, size, path in copies:
                if total <= most:
                    break
                path.unlink(missing_ok=True)
                total -= size
            lock.write(str(wanted))
            lock.flush()
        return True

    def _reserved(self) -> int:
        """Bytes that others are about to write. What a killed process began is removed."""
        total = 0
        for file in self._locks.iterdir():
            if not file.stat().st_size:
                continue
            with open(file, "r+") as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    total += int(other.read() or 0)
                    continue
                for suffix in (PARTIAL, PACKED):
                    (self.folder / file.name).with_suffix(suffix).unlink(missing_ok=True)
                other.truncate(0)
        return total


def cache_of(settings: Data) -> Cache:
    """The one that a config asks for."""
    return Cache(default_folder() if settings.cache_dir is None else Path(settings.cache_dir), settings.cache_bytes)


def local_index(url: str, cache: Cache) -> Path:
    """A local copy of all but the shards of the data set at `url`; fetched where the cache has none of its index.json.

    Raises FileNotFoundError where there is none, ValueError for files that are not what index.json says, and OSError.
    """
    try:
        data = storage.read(f"{url}/index.json", MOST_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} is no data set: it has no index.json ({error})") from None
    folder = cache.folder / "indexes" / hashlib.sha256(data).hexdigest()
    if folder.exists():
        return folder
    partial = folder.with_suffix(PARTIAL)
    with _names(cache.folder), locked(folder.with_suffix(".lock"), lambda: sizes(partial, "**/*")):
        if folder.exists():
            return folder
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process
        (partial / "index").mkdir(parents=True)
        (partial / "index.json").write_bytes(data)
        for name, sha256 in read_description(partial).files().items():
            storage.download(f"{url}/{name}", partial / name)
            got = sha256_of(partial / name)
            if got != sha256:
                raise ValueError(f"{url}/{name} is damaged: its sha256 is {got}, index.json says {sha256}: {AGAIN}")
        partial.rename(folder)
    return folder


def default_folder() -> Path:
    """$PARTIAL_FC_CACHE, or partial_fc in the user's cache folder; without a home where temporary files go."""
    given = os.environ.get("PARTIAL_FC_CACHE")
    if given:
        return Path(given)
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(of_user if os.path.isabs(of_user) else gettempdir()) / "partial_fc"


def fetch(shard: Shard, source: Place, path: Path) -> int:
    """Writes the plain tar of `shard`, which lies at `source`, to `path`; checked, and there as a whole or not at all.

    Returns a file descriptor: another process may delete the copy at once. Raises as Cache.open does.
    """
    partial, packed = path.with_suffix(PARTIAL), path.with_suffix(PACKED)
    try:
        for attempt in range(1, TRIES + 1):
            file = source
            if storage.remote(source):
                file = packed if shard.compression else partial
                storage.download(source, file)
            wrong = _wrong(shard, file)
            if wrong is None:
                break
            if not storage.remote(source) or attempt == TRIES:
                again = f" at each of {TRIES} downloads" if storage.remote(source) else ""
                raise ValueError(f"{source} is damaged or has changed: {wrong}{again}: {AGAIN}")
        if shard.compression:
            with (
                open(partial, "wb") as to,
                open(file, "rb") as packed_file,
                unpacked(packed_file, shard.compression, source) as stream,
            ):
                _copy(stream, to, shard.plain_bytes, source)
        descriptor = os.open(partial, os.O_RDONLY)
        partial.rename(path)
        return descriptor
    finally:
        partial.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)


def _wrong(shard: Shard, file: Place) -> str | None:
    """What of the file is not as the index says."""
    size = os.stat(file).st_size
    if size != shard.bytes:
        return f"it has {size:,} bytes, the index says {shard.bytes:,}"
    sha256 = sha256_of(Path(file))
    return None if sha256 == shard.sha256 else f"its sha256 is {sha256}, the index says {shard.sha256}"


def _copy(stream: Any, to: IO[bytes], wanted: int, source: Place) -> None:
    """Raises ValueError where the stream has not exactly `wanted` bytes."""
    count = 0
    while data := stream.read(_AT_ONCE):
        count += len(data)
        if count > wanted:
            break
        to.write(data)
    if count != wanted:
        more = "more" if count > wanted else f"{count:,}"
        raise ValueError(f"{source}: got {more} bytes unpacked, the index says {wanted:,}: {AGAIN}")


def compression_of(name: str) -> Literal["gzip", "zstd"] | None:
    """By the name's end."""
    return SUFFIXES.get(os.path.splitext(name)[1].lower())


@contextmanager
def unpacked(stream: Any, compression: str | None, name: object) -> Iterator[Any]:
    """The plain bytes of `stream`, as a stream. Raises ValueError, which says `name`, where it proves damaged."""
    errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    with ExitStack() as stack:
        plain = stream
        if compression == "gzip":
            plain = stack.enter_context(gzip.GzipFile(fileobj=stream))
        elif compression == "zstd":
            zstandard = _zstandard()
            errors = (*errors, zstandard.ZstdError)
            reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True, closefd=False)
            plain = stack.enter_context(reader)
        try:
            yield plain
        except errors as error:
            raise ValueError(f"{name} is no whole {compression} file: {error}") from None


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"a shard in .zst needs another package: {pip_install('zstandard')}") from None
    return zstandard


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    used(descriptor)
    return descriptor


def used(descriptor: int) -> None:
    """Notes that a copy is in use now: those used longest ago are deleted first."""
    with suppress(PermissionError):  # another user's
        os.utime(descriptor)


@contextmanager
def locked(file: Path, progress: Callable[[], object] | None = None) -> Iterator[IO[str]]:
    """Held by one thread of one process; ends with it.

    progress: what changes while the holder works. Raises OSError where nothing has changed for STANDSTILL seconds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+") as lock:
        _wait(lambda: _taken(lock), progress or (lambda: None), file)
        lock.truncate(0)
        try:
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile holds the file open, too


def sizes(folder: Path, pattern: str) -> list[tuple[str, int]]:
    """Path and bytes of the files that there are now: they change where another process writes them."""
    found = []
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            found.append((str(path), path.stat().st_size))
    return sorted(found)


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(attempt: Callable[[], bool], progress: Callable[[], object], what: Path) -> None:
    """Until the attempt succeeds. Raises OSError where `progress` has given the same for STANDSTILL seconds."""
    before, since = progress(), time.monotonic()
    while not attempt():
        if (now := progress()) != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > STANDSTILL:
            raise OSError(
                f"another process holds {what}, and has fetched nothing for {STANDSTILL:.0f} s: is it stopped? End it, "
                "or give this run another data.cache_dir"
            )
        time.sleep(POLL)


@contextmanager
def _names(folder: Path) -> Iterator[None]:
    """Says of an error of the disk which folder it is."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it has its words
            raise
        raise OSError(
            f"cannot keep a shard in the cache {folder}: {error}: make room, lower data.cache_bytes, or give another "
            "data.cache_dir"
        ) from error
