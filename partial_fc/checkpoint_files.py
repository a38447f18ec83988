"""The files of a checkpoint: made to last, verified, removed; in a local folder, or in an object store by way of one.

The manifest is written last and removed first: only with it a checkpoint is complete, in a folder and in a store. Until
then the file UNFINISHED says whose it is. Nothing is deleted but what is proved to be of the run itself.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from tqdm import tqdm

from partial_fc import manifest, storage
from partial_fc.documents import parse_json
from partial_fc.files import NoFile, one_line, sha256_of, write_atomically
from partial_fc.manifest import Damaged, Foreign, Missing
from partial_fc.parallel import distributed
from partial_fc.storage import Place

MANIFEST = manifest.NAME
UNFINISHED = "unfinished.json"  # in a folder that is being written


@dataclass(frozen=True)
class Owner:
    """Whose checkpoints they are: the run's id, and step folders without one that it went on from."""

    run: str
    adopted: frozenset[str] = frozenset()

    def owns(self, folder: Place, values: dict) -> bool:
        run = values.get("run")
        return run == self.run or (run is None and folder_name(folder) in self.adopted)


def folder_name(folder: Place) -> str:
    """The name itself: of a link it is not that of what it leads to."""
    return storage.last_name(folder) if storage.remote(folder) else folder.name


def complete(where: Place) -> list[Place]:
    """The folders in the folder or URL `where` that are named like checkpoints and have a manifest, oldest first."""
    return _by_step([storage.parent(found) for found in storage.glob(where, f"step_*/{MANIFEST}")])


def _by_step(folders: list[Place]) -> list[Place]:
    return sorted((one for one in folders if _step(one) >= 0), key=_step)


def _step(folder: Place) -> int:
    """By its name; -1 where that is no checkpoint's."""
    step = manifest.step_of(folder_name(folder))
    return -1 if step is None else step


def read_manifest(folder: Place) -> dict:
    """The manifest of a checkpoint, checked. Raises Missing without one, and what `manifest.parse` does."""
    file = storage.join(folder, MANIFEST)
    try:
        data = storage.read(file, manifest.MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(f"{folder} holds no {MANIFEST}, so it is no complete checkpoint; name another one") from None
    except NoFile as error:
        raise Damaged(str(error)) from None
    return manifest.parse(data, file)


def read_own_manifest(folder: Place) -> dict:
    """The same of a folder of a run. Raises Foreign also where its manifest is that of another step."""
    values = read_manifest(folder)
    name = manifest.step_name(values["step"])
    if name != folder_name(folder):
        raise Foreign(f"{folder} has the manifest of {name}, so it is a copy of that")
    return values


def begin(folder: Place, owner: Owner) -> None:
    """Makes room for a new checkpoint: leftovers of killed saves of this run are removed.

    Raises ValueError where there is a later checkpoint, or this one and of another run or behind a URL: another job
    writes there, on a machine or from a run folder that this run's lock does not reach.
    """
    where, name = storage.parent(folder), folder_name(folder)
    finished = complete(where)
    for later in finished:
        if _step(later) < _step(folder):
            continue
        try:
            values = read_own_manifest(later)
        except Foreign:
            continue
        except Damaged:
            values = {}
        if later == folder and not storage.remote(folder) and owner.owns(folder, values):
            remove(folder)  # a loop of one's own saves a step twice
            continue
        raise ValueError(
            f"{later} has come to be while this run was at {name}: another job writes there. Stop one of them, or give "
            "them different checkpoint.dir"
        )
    for found in _by_step(storage.glob(where, "step_*")):
        if found not in finished and _unfinished_by(found) == owner.run:
            remove(found)
    if not storage.remote(folder):
        with suppress(OSError):
            folder.rmdir()  # left empty by a kill between the next lines
    if storage.glob(where, name):
        moved = set_aside(folder, "other")
        print(f"warning: {one_line(folder)} is not known to be of this run: moved to {moved}", file=sys.stderr)
    text = json.dumps({"format": manifest.FORMAT, "run": owner.run})
    if storage.remote(folder):
        storage.write(storage.join(folder, UNFINISHED), text.encode())
    else:
        folder.mkdir(parents=True)
        (folder / UNFINISHED).write_text(text)


def _unfinished_by(folder: Place) -> str | None:
    """The id of the run that began to write the folder; None where that is not known."""
    file = storage.join(folder, UNFINISHED)
    try:
        values = parse_json(storage.read(file, 1000), file)
    except (FileNotFoundError, ValueError):
        return None
    except OSError:
        if storage.remote(folder):  # which may answer another time
            raise
        return None
    return values.get("run") if isinstance(values, dict) and values.get("format") == manifest.FORMAT else None


def abandon(folder: Place, owner: Owner) -> None:
    """Removes what a save that failed has written; what cannot be removed is left to the next one."""
    try:
        if _unfinished_by(folder) == owner.run and folder not in complete(storage.parent(folder)):
            remove(folder)
    except OSError:
        return


def set_aside(folder: Place, why: str = "damaged") -> Place:
    """Renames a folder to <why>_<its name>, so that it is no checkpoint any more; the new one."""
    where, name = storage.parent(folder), f"{why}_{folder_name(folder)}"
    taken = {folder_name(one) for one in storage.glob(where, f"{name}*")}
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    free = next(one for one in names if one not in taken)
    to = storage.join(where, free)
    storage.move(folder, to)
    return to


def prune(where: Place, owner: Owner, keep: int) -> None:
    """Deletes all checkpoints of this run but the newest `keep`. Others stay, and so do links and damaged ones."""
    own = []
    for folder in complete(where):
        try:
            if owner.owns(folder, read_own_manifest(folder)):
                own.append(folder)
        except (ValueError, FileNotFoundError):
            continue
    for old in own[:-keep]:
        remove(old)


def owner_here(where: Place, run: str | None = None) -> Owner:
    """Who goes on from the newest checkpoint in `where`: the run that it is of.

    Where none says so it is `run`, the one that began to write one there, or a new one.
    """
    without: set[str] = set()
    for folder in reversed(complete(where)):
        try:
            values = read_own_manifest(folder)
        except ValueError:
            continue
        if "run" in values:
            return Owner(values["run"], frozenset(values.get("adopted", ())) | without)
        without.add(folder_name(folder))
    begun = filter(manifest.is_run_id, map(_unfinished_by, _by_step(storage.glob(where, "step_*"))))
    return Owner(run or next(begun, None) or new_id(), frozenset(without))


def new_id() -> str:
    """Of a run, from the system's randomness: runs of one seed have different ids."""
    return secrets.token_hex(8)


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of an error in its body which file could not be written, and how much room there is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        disk = os.statvfs(path.parent)
        free = disk.f_bavail * disk.f_frsize / 2**20
        raise OSError(
            f"cannot write {path} ({error}); {free:,.0f} MiB are free there: make room, or give another "
            "checkpoint.dir. The checkpoint before it stays the latest"
        ) from error


def settle(path: Path, folder: Place) -> dict:
    """Makes a file that was just written last in `folder`, where it is or which it is moved to; its manifest entry."""
    entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    if storage.remote(folder):
        storage.upload(path, storage.join(folder, path.name))
        path.unlink()
    else:
        with writing(path), open(path, "rb") as file:
            os.fsync(file.fileno())
    return entry


def finish(folder: Place, text: str, entries: list[dict]) -> None:
    """Writes the manifest `text`, and so makes the checkpoint. Raises OSError where a store lacks some of its files.

    What cannot be done after that, as to write `latest`, which is for people, is said and is no error.
    """
    where, latest = storage.parent(folder), folder_name(folder) + "\n"
    if not storage.remote(folder):
        with writing(folder / MANIFEST):
            write_atomically(folder / MANIFEST, text, lasting=True)
        with _said():
            (folder / UNFINISHED).unlink(missing_ok=True)
        with _said():
            write_atomically(where / "latest", latest, lasting=True)
        return
    there = storage.sizes(folder)
    missing = [entry["name"] for entry in entries if there.get(entry["name"]) != entry["bytes"]]
    if missing:
        raise OSError(
            f"{folder} lacks {', '.join(missing)}, or has it at another size: does another job write there? The "
            "checkpoint before it stays the latest"
        )
    storage.write(storage.join(folder, MANIFEST), text.encode())
    with _said():
        storage.remove(storage.join(folder, UNFINISHED))
    with _said():
        storage.write(storage.join(where, "latest"), latest.encode())


@contextmanager
def _said() -> Iterator[None]:
    """Says of an error in its body that the checkpoint is complete without it."""
    try:
        yield
    except OSError as error:
        print(f"warning: {one_line(error)}; the checkpoint is complete without it", file=sys.stderr)


def remove(folder: Place) -> None:
    """Deletes a checkpoint, its manifest first: half deleted it must not look complete. Leftovers are no error.

    A link stays, and what it leads to.
    """
    if not storage.remote(folder):
        if folder.is_symlink():
            return
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
    Raises Damaged for a file that is missing or is not what the manifest says.
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
    """Raises Damaged if the file is missing or not what the manifest says."""
    path = folder / entry["name"]
    _compare(path, entry, path)


def read(folder: Place, entry: dict) -> bytes:
    """The bytes of a small file, verified."""
    file = storage.join(folder, entry["name"])
    try:
        if not storage.remote(file):
            _check_size(file, entry, file)
        data = storage.read(file, entry["bytes"])
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{file} is missing") from None
    except NoFile as error:
        raise Damaged(str(error)) from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise Damaged(f"{file} is damaged: its SHA-256 is not the manifest's")
    return data


def _fetch(folder: str, entry: dict, to: Path) -> None:
    url, path = storage.join(folder, entry["name"]), to / entry["name"]
    try:
        storage.download(url, path)
    except FileNotFoundError:
        raise Damaged(f"{url} is missing") from None
    _compare(path, entry, url)


def _compare(path: Path, entry: dict, shown: Place) -> None:
    try:
        _check_size(path, entry, shown)
        if sha256_of(path) != entry["sha256"]:
            raise Damaged(f"{shown} is damaged: its SHA-256 is not the manifest's")
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{shown} is missing") from None


def _check_size(path: Path, entry: dict, shown: Place) -> None:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{shown} is no regular file")
    if found.st_size != entry["bytes"]:
        raise Damaged(f"{shown} has {found.st_size} bytes, the manifest says {entry['bytes']}")
