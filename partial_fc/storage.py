"""Files here or in an object store, by path or URL: the only speaker of fsspec.

A place is a local Path, or a str with a protocol, as s3://bucket/run: `place` tells them apart. An object store has no
folders, only names that begin alike, and no rename; an object is there as a whole or not at all.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fsspec.callbacks import NoOpCallback, TqdmCallback
from fsspec.core import url_to_fs
from typing_extensions import TypeIs  # torch brings it

from partial_fc.environment import pip_install
from partial_fc.files import open_regular, read_at_most, shortened

Place = Path | str
T = TypeVar("T")
_PATTERN = "*?[]"
WANTED_URL = f"wanted a URL without {' '.join(_PATTERN)}: give it another name"
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}

RETRY_SECONDS = (1.0, 5.0, 20.0)  # pauses before another try, after those that the protocol's package makes itself
SILENCE = 60.0  # seconds that a server may take for an answer or for its next bytes
PATIENCE = 120.0  # seconds after which there is none: the other ranks wait, and not for ever


def place(where: str | os.PathLike) -> Place:
    """The URL as it stands, anything else as a Path. Raises ValueError as `check_url`."""
    text = str(where)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return check_url(text).rstrip("/") if "://" in text else Path(where)


def check_url(url: str) -> str:
    """The URL itself. Raises ValueError for one that fsspec takes for a pattern: other runs' names may be like it."""
    if set(url) & set(_PATTERN):
        raise ValueError(f"got {shortened(url)}, {WANTED_URL}")
    return url


def remote(where: Place) -> TypeIs[str]:
    return isinstance(where, str)


def local_path(where: str | os.PathLike) -> Path:
    """The path of a place on this machine. Raises ValueError for a URL, from which Path would make a folder s3:/."""
    found = place(where)
    if remote(found) or re.match(
        r"[A-Za-z][A-Za-z0-9+.-]+:/", str(found)
    ):  # s3:/bucket is what Path makes of s3://bucket
        raise ValueError(f"{where} is a URL, and this takes a path on this machine or a mounted file system")
    return found


def join(where: Place, name: str) -> Place:
    return f"{where}/{name}" if remote(where) else where / name


def parent(where: Place) -> Place:
    return where.rpartition("/")[0] if remote(where) else where.parent


def last_name(where: Place) -> str:
    return where.rpartition("/")[2] if remote(where) else where.resolve().name


def host(url: str) -> str:
    """Protocol and host, or bucket: https://host, s3://bucket."""
    return "/".join(url.split("/")[:3])


def read(where: Place, most: int | None = None) -> bytes:
    """The file's bytes; of one larger than `most` the first most + 1.

    Raises FileNotFoundError where there is none, and NoFile, a ValueError, for a folder, a pipe or a device.
    """

    def some(files: Any, path: str) -> bytes:
        with files.open(path, "rb") as file:
            return read_at_most(file, most)

    if not remote(where):
        with open_regular(where) as file:
            return read_at_most(file, most)
    return _try("read", where, some)


def exists(where: Place) -> bool:
    """Whether the file is there."""
    if not remote(where):
        return where.exists()
    return _try("look for", where, lambda files, path: files.exists(path))


def glob(where: Place, pattern: str) -> list[Place]:
    """What is in the folder under names like `pattern`, which may have slashes; by name."""
    if not remote(where):
        return sorted(where.glob(pattern))
    check_url(where)
    if "**" in pattern:
        raise ValueError(f"got the pattern {pattern} in {where}, wanted one without **: name each folder")
    found = _try("list", where, lambda files, path: files.glob(f"{path}/{pattern}"))
    depth = pattern.count("/") + 1
    return sorted(join(where, "/".join(path.rstrip("/").split("/")[-depth:])) for path in found)


def sizes(url: str) -> dict[str, int]:
    """Bytes of every object right under the URL, by name."""
    found = _try("list", url, lambda files, path: files.ls(path, detail=True))
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found}


def write(url: str, data: bytes) -> None:
    _try("write", url, lambda files, path: files.pipe_file(path, data))


def upload(path: Path, url: str) -> None:
    """Copies a file to the URL. Raises OSError where it does not get there at its whole size."""
    size = path.stat().st_size

    def put(files: Any, to: str) -> None:
        try:
            files.put_file(str(path), to)
        except FileNotFoundError as error:
            # s3fs asks twice to join the parts where the first answer is late or lost; what is there now may be older
            raise OSError(f"{type(error).__name__}: {error}") from error
        if (there := files.info(to)["size"]) != size:
            raise OSError(f"it has {there} bytes there, {size} here")

    _try("write", url, put)


def download(url: str, path: Path, *, bar: bool = False) -> None:
    """Raises FileNotFoundError where there is none, and OSError with an errno where the disk at `path` refuses.

    bar: shows how far it is.
    """

    def get(files: Any, of: str) -> None:
        shown = {"desc": "downloading", "unit": "B", "unit_scale": True, "mininterval": 1}
        with TqdmCallback(tqdm_kwargs=shown) if bar else NoOpCallback() as callback:
            files.get_file(of, str(path), callback=callback)

    _try("read", url, get)


@contextmanager
def local_copy(where: Place, path: Path, *, bar: bool = False) -> Iterator[Path]:
    """A file here as it is; one behind a URL as a copy at `path`, which is there as long as the block lasts.

    Raises as `download` does.
    """
    if not remote(where):
        yield where
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(where, path, bar=bar)
        yield path
    finally:
        path.unlink(missing_ok=True)


def read_ranges(urls: Sequence[str], starts: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Parts of files of one store, asked for side by side. Raises OSError where one has other than its size."""

    def ranges(files: Any, _: str) -> list[bytes]:
        paths = [files._strip_protocol(url) for url in urls]
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        found = files.cat_ranges(paths, list(starts), ends, on_error="return")
        for url, size, data in zip(urls, sizes, found, strict=True):
            if isinstance(data, FileNotFoundError | PermissionError):
                raise type(data)(f"{url}: {data}")
            if isinstance(data, Exception):
                raise data
            if len(data) != size:
                raise OSError(f"asked for {size} bytes of {url}, got {len(data)}: does the server send ranges?")
        return found

    return _try("read", urls[0], ranges) if urls else []


def pinned(url: str) -> str:
    """The URL with the commit that it stands for now, where it is one of the Hugging Face hub; else as it is."""
    if not url.startswith("hf://"):
        return url

    def with_commit(files: Any, path: str) -> str:
        found = files.resolve_path(path)
        if not hasattr(found, "revision"):  # a bucket has none
            return url
        commit = _commit(found.repo_type, found.repo_id, found.revision)
        return f"hf://{found.repo_type}s/{found.repo_id}@{commit}/{found.path_in_repo}"

    return _try("look for", url, with_commit)


@cache
def _commit(repo_type: str, repo_id: str, revision: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision).sha)


def remove(url: str, *, folder: bool = False) -> None:
    """Deletes the object, or all whose names begin with the URL and a slash; no error where there is none."""

    def delete(files: Any, path: str) -> None:
        if files.exists(path):
            files.rm(path, recursive=folder)

    check_url(url)
    _try("delete", url, delete)


def move(where: Place, to: Place) -> None:
    """Renames a folder; under a URL its objects are copied one by one, then deleted."""
    if not remote(where):
        where.rename(to)
        return
    check_url(where)
    check_url(str(to))
    _try("move", where, lambda files, path: files.mv(path, url_to_fs(str(to))[1], recursive=True))


def check_writable(url: str, name: str) -> None:
    """Writes and deletes the object `name` there. Raises OSError, or ValueError for a package that is not installed."""
    write(f"{url}/{name}", b"partial_fc was here\n")
    remove(f"{url}/{name}")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for the URL, and its path there."""
    if not url.startswith(("http://", "https://")):
        return url_to_fs(url)
    import aiohttp  # only fsspec's HTTP has it

    # fsspec gives a whole download five minutes; here a server may be slow, but not silent
    options: dict[str, Any] = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(None, None, SILENCE, SILENCE)}}
    hub, token = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), os.environ.get("HF_TOKEN")
    if token and url.startswith(f"{hub.rstrip('/')}/"):
        options["headers"] = {"Authorization": f"Bearer {token}"}  # aiohttp leaves it out where another host is next
    return url_to_fs(url, **options)


def _wanted_pause(error: BaseException) -> float:
    """Seconds that the server asks for, as with status 429 and 503."""
    for one in (error, error.__cause__):
        headers = getattr(one, "headers", None) or getattr(getattr(one, "response", None), "headers", None) or {}
        with suppress(KeyError, TypeError, ValueError):
            return float(headers["Retry-After"])
    return 0.0


def _try(verb: str, url: str, action: Callable[[Any, str], T]) -> T:
    """What `action`(file system, its path) gives, tried again after RETRY_SECONDS, or when the server says."""
    try:
        files, path = _file_system(url)
    except (ImportError, ValueError) as error:  # ValueError: of an unknown protocol
        package = _PACKAGES.get(url.partition("://")[0])
        advice = f"; {pip_install(package)}" if package else ""
        raise ValueError(f"cannot {verb} {url}: {error}{advice}") from None
    began = time.monotonic()
    for tries, pause in enumerate((*RETRY_SECONDS, None), 1):
        files.invalidate_cache()  # of listings: other ranks write, too
        try:
            return action(files, path)
        except (FileNotFoundError, PermissionError) as error:  # another try says the same
            raise type(error)(f"cannot {verb} {url}: {error}") from error
        except Exception as error:  # every package has its own kinds
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # of the disk here
                raise
            wanted = _wanted_pause(error)
            if pause is None or time.monotonic() - began + wanted > PATIENCE:
                raise OSError(f"cannot {verb} {url}, tried {tries} times: {type(error).__name__}: {error}") from error
        time.sleep(max(pause, wanted))
    raise AssertionError("the last try returns or raises")
