"""Checkpoints: atomic, by global class index, for any number of ranks, no pickle.

checkpoints/step_00001200/
    centers_000000000000_000000050000.safetensors   rows [0, 50000) of the centers' state and the sampler's tables
    history.safetensors                             for catching up rows; the count of updates; margin statistics
    backbone.safetensors  optimizer.safetensors     the engine's, and average and loss_scale where it has such
    classes.txt
    manifest.json                                   written last; without it there is no checkpoint
checkpoints/latest                                  the newest one's name
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from partial_fc.head.centers import MissedUpdates, catch_up
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.sampling import tables
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine

FORMAT, VERSION = "partial_fc-checkpoint", 1
STATISTICS = "statistics."  # before a name in history.safetensors: the margin's
PART_BYTES = 1 << 30  # a part of the centers; a reader at another world size opens those that overlap its range


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and its manifest."""

    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        """Updates that the run had made."""
        return self.manifest["step"]

    def files(self) -> list[dict]:
        return self.manifest["files"]

    def classes(self) -> list[str]:
        """The class map: the name of every class, as the data had it."""
        return (self.path / "classes.txt").read_bytes().decode("utf-8").split("\n")[:-1]


def find_latest(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run folder, or None. Raises ValueError for a newer format."""
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    complete = (folder for folder in folders if (folder / "manifest.json").exists())
    return next((open_checkpoint(folder) for folder in complete), None)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, or the newest of the run folder `path`. Raises ValueError without one."""
    found = open_checkpoint(path) if (path / "manifest.json").exists() else find_latest(path)
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint; give a run folder or the folder of a checkpoint")
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks a manifest. Raises ValueError for what is no checkpoint, or one of a newer format."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} holds no manifest.json, so it is no complete checkpoint; name another one") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}/manifest.json has format {manifest.get('format')!r}; wanted {FORMAT!r}")
    if manifest["version"] > VERSION:
        raise ValueError(
            f"{path} has checkpoint version {manifest['version']}; this partial_fc reads up to {VERSION}: upgrade it"
        )
    return Checkpoint(path, manifest)


def save(
    run: Path, step: int, *, head: PartialFC, engine: BaseEngine, classes: Path, settings: dict, keep: int
) -> Path:
    """Writes the checkpoint of `step` from all ranks, then deletes all but the newest `keep`. A collective.

    settings: what the run must not change on resume (seed, data set, order), kept in the manifest. A failure on any
    rank is raised on all of them, and leaves the checkpoints that were there.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    with distributed.together(f"saving {folder}"):
        if distributed.rank() == 0:
            _remove_incomplete(folder.parent)  # what killed saves left
            _remove(folder)
            folder.mkdir(parents=True)
    written: list[dict] = []
    state = engine.state()
    with distributed.together(f"saving {folder}"):
        written = _write_centers(folder, head)
        if distributed.rank() == 0:
            written += [_write(folder / f"{name}.safetensors", tensors) for name, tensors in state.items()]
            written.append(_write(folder / "history.safetensors", _history(head)))
            shutil.copyfile(classes, folder / "classes.txt")
            written.append(_entry(folder / "classes.txt"))
    files = [entry for entries in distributed.gather_objects(written) for entry in entries]
    with distributed.together(f"saving {folder}"):
        if distributed.rank() == 0:
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "step": step,
                "num_classes": head.num_classes,
                "embedding_dim": head.embedding_dim,
                "dtype": str(head.dtype).removeprefix("torch."),
                "center_state": _kinds(head),
                "sub_centers": head.sub_centers,
                "settings": settings,
                "files": files,
            }
            _write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1))
            _write_atomically(folder.parent / "latest", folder.name + "\n")
            complete = sorted(f for f in folder.parent.glob("step_*") if (f / "manifest.json").exists())
            for old in complete[:-keep]:
                _remove(old)
    return folder


def load(checkpoint: Checkpoint, *, head: PartialFC, engine: BaseEngine) -> None:
    """Restores head and engine at this number of ranks, whatever number wrote it. A collective.

    Raises RunError on all ranks for a damaged file, another class count, embedding size or dtype.
    """
    manifest, path = checkpoint.manifest, checkpoint.path
    dtype = str(head.dtype).removeprefix("torch.")
    with distributed.together(f"loading {path}"):
        ours = {
            "num_classes": head.num_classes,
            "embedding_dim": head.embedding_dim,
            "dtype": dtype,
            "center_state": _kinds(head),
            "sub_centers": head.sub_centers,
        }
        if manifest["center_state"] != ours["center_state"]:
            raise ValueError(
                f"its class centers were written with {', '.join(manifest['center_state'])}, this run keeps "
                f"{', '.join(ours['center_state'])}: put head.optim.name and head.margin.name back, or give another "
                "run.dir"
            )
        for name, value in ours.items():
            if manifest.get(name, 1) != value:  # early checkpoints do not name their one sub-center
                raise ValueError(
                    f"it was written with {name} {manifest.get(name, 1)}, this run has {value}: continue with the data "
                    "and config that it was written with, or give another run.dir"
                )
        _check_parts(checkpoint, head.num_classes)
        for entry in checkpoint.files()[distributed.rank() :: distributed.world_size()]:
            _verify(path, entry)
    with distributed.together(f"loading {path}"):
        history = load_file(path / "history.safetensors")
        known = head.first_statistics()
        statistics = {
            name.removeprefix(STATISTICS): history.pop(name) for name in [*history] if name.startswith(STATISTICS)
        }
        head.centers.load(lambda name, out: _read_rows(checkpoint, name, head.classes, out), **history)
        for name, tensor in _feature_centers(head).items():  # without them they begin where a new run's do
            _read_rows(checkpoint, name, head.classes, tensor)
        head.set_statistics(known | {name: value for name, value in statistics.items() if name in known})
        for name, table in tables(head).items():  # every rank reads all of it
            if not _read_rows(checkpoint, name, range(head.num_classes), table):
                table.fill_(-1)  # written with another sampler: nothing until the next refresh
        head.step_count = checkpoint.step
        names = {entry["name"] for entry in checkpoint.files()}
        kept = (name for name in engine.files if f"{name}.safetensors" in names)
        engine.load({name: load_file(path / f"{name}.safetensors") for name in kept})


def _history(head: PartialFC) -> dict[str, Tensor]:
    centers = head.centers
    statistics = {f"{STATISTICS}{name}": value for name, value in head.statistics.items()}
    return {"history": centers.missed.history, "updates": torch.tensor(centers.updates), **statistics}


def _feature_centers(head: PartialFC) -> dict[str, Tensor]:
    """Of a center loss, by class."""
    return {} if head.feature_centers is None else head.feature_centers.state()


def _kinds(head: PartialFC) -> list[str]:
    """What margin and optimizer make the centers keep; last_update comes and goes with the sample rate."""
    return sorted(name for name in head.centers.state() if name != "last_update")


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first: half deleted it must not look complete. Leftovers are no error."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_incomplete(folder: Path) -> None:
    for found in folder.glob("step_*"):
        if not (found / "manifest.json").exists():
            _remove(found)


def _write_centers(folder: Path, head: PartialFC) -> list[dict]:
    mine = slice(head.classes.start, head.classes.stop)
    state = head.centers.state() | _feature_centers(head) | {name: table[mine] for name, table in tables(head).items()}
    bytes_per_row = sum(tensor[:1].numel() * tensor.element_size() for tensor in state.values())
    rows_per_part = max(PART_BYTES // max(bytes_per_row, 1), 1)
    entries = []
    for start in range(0, len(head.classes), rows_per_part):
        stop = min(start + rows_per_part, len(head.classes))
        first, last = head.classes.start + start, head.classes.start + stop
        part = {name: tensor[start:stop] for name, tensor in state.items()}
        entry = _write(folder / f"centers_{first:012d}_{last:012d}.safetensors", part)
        entries.append(entry | {"classes": [first, last]})
    return entries


def _read_rows(checkpoint: Checkpoint, name: str, classes: range, out: Tensor) -> bool:
    """Fills `out` with the rows `classes` of one state tensor; False where it has none of that name and width."""
    for entry in checkpoint.files():
        if "classes" not in entry:
            continue
        first, last = entry["classes"]
        start, stop = max(first, classes.start), min(last, classes.stop)
        if start >= stop:
            continue
        with safe_open(checkpoint.path / entry["name"], framework="pt") as part:
            if name not in part.keys():  # noqa: SIM118 - no mapping, it only has keys()
                return False
            rows = part.get_slice(name)
            if rows.get_shape()[1:] != list(out.shape[1:]):
                return False
            out[start - classes.start : stop - classes.start] = rows[start - first : stop - first].to(out)
    return True


def _check_parts(checkpoint: Checkpoint, num_classes: int) -> None:
    owned = sorted(entry["classes"] for entry in checkpoint.files() if "classes" in entry)
    ends = [0, *(stop for _, stop in owned)]
    if [start for start, _ in owned] != ends[:-1] or ends[-1] != num_classes:
        raise ValueError(
            f"{checkpoint.path}: its parts hold classes {owned}, which do not tile the {num_classes} there are"
        )


def _write(path: Path, tensors: dict[str, Tensor]) -> dict:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    return _entry(path)


def _entry(path: Path) -> dict:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _verify(folder: Path, entry: dict) -> None:
    path = folder / entry["name"]
    advice = f"delete {folder} to go on from the checkpoint before it"
    if not path.exists():
        raise ValueError(f"{path} is missing; {advice}")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}; {advice}")
    if _sha256(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's; {advice}")


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


def read_backbone(checkpoint: Checkpoint, averaged: bool = False) -> dict[str, Tensor] | None:
    """The backbone's tensors alone, or their moving average's, verified; None where there is no average."""
    name = "average.safetensors" if averaged else "backbone.safetensors"
    entry = next((entry for entry in checkpoint.files() if entry["name"] == name), None)
    if entry is None:
        return None
    _verify(checkpoint.path, entry)
    return load_file(checkpoint.path / entry["name"])


def read_centers(checkpoint: Checkpoint, classes_at_once: int) -> Iterator[Tensor]:
    """All class centers in order, caught up: joined they are what `PartialFC.full_weight` of the run gives.

    Yields (n, D), or (n, k, D) with k sub-centers, of at most `classes_at_once` classes, in the run's dtype; no more
    is in memory, and no process group is needed. Every file is verified first. Raises ValueError for a damaged one.
    """
    manifest, path = checkpoint.manifest, checkpoint.path
    num_classes, k = manifest["num_classes"], manifest.get("sub_centers", 1)
    _check_parts(checkpoint, num_classes)
    wanted = [entry for entry in checkpoint.files() if "classes" in entry or entry["name"] == "history.safetensors"]
    for entry in tqdm(wanted, desc="verifying class centers", unit=" files", mininterval=1, delay=2):
        _verify(path, entry)
    per_class = () if k == 1 else (k,)
    slices = [
        range(start, min(start + classes_at_once, num_classes)) for start in range(0, num_classes, classes_at_once)
    ]

    def read(name: str, classes: range, *width: int, dtype: torch.dtype) -> Tensor | None:
        out = torch.empty(len(classes), *per_class, *width, dtype=dtype)
        return out if _read_rows(checkpoint, name, classes, out) else None

    # The least updated row tells how far the table of missed updates has to reach back; 4 bytes a row.
    missed = MissedUpdates()
    history = load_file(path / "history.safetensors")["history"]
    last_updates = (read("last_update", classes, dtype=torch.int32) for classes in slices)
    oldest = min((int(rows.min()) for rows in last_updates if rows is not None), default=len(history))
    missed.replay(history, len(history) - oldest)

    width, dtype = manifest["embedding_dim"], getattr(torch, manifest["dtype"])
    for classes in slices:
        weight = read("weight", classes, width, dtype=dtype)
        if weight is None:
            raise ValueError(f"{path} has no class centers of {width} numbers for classes {classes.start} and on")
        last_update = read("last_update", classes, dtype=torch.int32)
        if last_update is not None:  # else every row is current
            momentum = read("momentum", classes, width, dtype=dtype)
            lag = missed.updates - last_update.flatten().long()
            matrices = missed.matrices(lag).to(dtype).flatten(1).T.contiguous()
            catch_up(weight.view(-1, width), momentum.view(-1, width), matrices, None)
        yield weight
