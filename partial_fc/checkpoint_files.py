"""The files of a checkpoint: made to last, verified, removed; in a local folder, or in an object store by way of one.

The manifest is written last and removed first: only with it a checkpoint is complete, in a folder and in a store.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from partial_fc import storage
from partial_fc.parallel import distributed
from partial_fc.storage import Place

MANIFEST = "manifest.json"


def complete(where: Place) -> list[Place]:
    """The folders of the complete checkpoints in the folder or URL `where`, oldest first."""
    return [storage.parent(manifest) for manifest in storage.glob(where, f"step_*/{MANIFEST}")]


def begin(folder: Place) -> None:
    """Makes room for a new checkpoint: leftovers of killed saves are removed.

    Raises ValueError where a URL has this checkpoint or a later one: nothing locks it, as the run folder is locked.
    """
    where = storage.parent(folder)
    finished = complete(where)
    if storage.remote(folder):
        later = [one for one in finished if storage.last_name(one) >= storage.last_name(folder)]
        if later:
            raise ValueError(
                f"{later[-1]} has come to be while this run was at {storage.last_name(folder)}: another job writes "
                "there. Stop one of them, or give them different checkpoint.dir"
            )
    for found in storage.glob(where, "step_*"):
        if found not in finished and re.fullmatch(r"step_\d{8,}", storage.last_name(found)):
            remove(found)
    remove(folder)
    if not storage.remote(folder):
        folder.mkdir(parents=True)


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """An empty local folder of this rank for the time of the body: in `folder`, or where temporary files go."""
    if folder is None:
        with TemporaryDirectory(prefix="partial_fc_") as temporary:
            yield Path(temporary)
        return
    mine = folder / "scratch" / f"rank_{distributed.rank()}"
    shutil.rmtree(mine, ignore_errors=True)  # what a killed process left
    mine.mkdir(parents=True)
    try:
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def settle(path: Path, folder: Place) -> dict:
    """Makes a file that was just written last in `folder`, where it is or which it is moved to; its manifest entry."""
    entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
    if storage.remote(folder):
        storage.upload(path, storage.join(folder, path.name))
        path.unlink()
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return entry


def finish(folder: Place, manifest: str, entries: list[dict]) -> None:
    """Writes the manifest, and so makes the checkpoint. Raises OSError where a store does not have all its files."""
    where, latest = storage.parent(folder), storage.last_name(folder) + "\n"
    if not storage.remote(folder):
        _write_atomically(folder / MANIFEST, manifest)
        _write_atomically(where / "latest", latest)
        return
    there = storage.sizes(folder)
    missing = [entry["name"] for entry in entries if there.get(entry["name"]) != entry["bytes"]]
    if missing:
        raise OSError(
            f"{folder} lacks {', '.join(missing)}, or has it at another size: does another job write there? The "
            "checkpoint before it stays the latest"
        )
    storage.write(storage.join(folder, MANIFEST), manifest.encode())
    storage.write(storage.join(where, "latest"), latest.encode())


def remove(folder: Place) -> None:
    """Deletes a checkpoint, its manifest first: half deleted it must not look complete. Leftovers are no error."""
    if not storage.remote(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        storage.remove(storage.join(folder, MANIFEST))
        storage.remove(folder, folder=True)
    except OSError as error:
        print(f"warning: {error}; the next checkpoint tries again", file=sys.stderr)


@contextmanager
def at_hand(
    folder: Place, entries: list[dict], *, near: Path | None = None, verified: bool = False, bar: str | None = None
) -> Iterator[Path]:
    """A local folder with these files of a checkpoint, verified: its own, or for the time of the body a copy.

    near: where copies go, see `scratch`. verified: those of a local folder are. bar: shown where it takes long.
    Raises ValueError for a file that is missing or damaged.
    """
    wanted = tqdm(entries, desc=bar, unit=" files", mininterval=1, delay=2, disable=bar is None)
    if not storage.remote(folder):
        for entry in [] if verified else wanted:
            verify(folder, entry)
        yield folder
        return
    with scratch(near) as copies:
        for entry in wanted:
            _fetch(folder, entry, copies)
        yield copies


def verify(folder: Path, entry: dict) -> None:
    """Raises ValueError if the file is missing or not what the manifest says."""
    path = folder / entry["name"]
    if not path.exists():
        raise ValueError(f"{path} is missing; {_advice(folder)}")
    _compare(path, entry, path, _advice(folder))


def check(data: bytes, folder: Place, entry: dict) -> bytes:
    """The same of a small file's bytes, which are returned."""
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(
            f"{storage.join(folder, entry['name'])} is damaged: its SHA-256 is not the manifest's; {_advice(folder)}"
        )
    return data


def _fetch(folder: str, entry: dict, to: Path) -> None:
    url, path = storage.join(folder, entry["name"]), to / entry["name"]
    try:
        storage.download(url, path)
    except FileNotFoundError:
        raise ValueError(f"{url} is missing; {_advice(folder)}") from None
    _compare(path, entry, url, _advice(folder))


def _compare(path: Path, entry: dict, shown: Place, advice: str) -> None:
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{shown} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}; {advice}")
    if _sha256(path) != entry["sha256"]:
        raise ValueError(f"{shown} is damaged: its SHA-256 is not the manifest's; {advice}")


def _advice(folder: Place) -> str:
    return f"delete {folder} to go on from the checkpoint before it"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
