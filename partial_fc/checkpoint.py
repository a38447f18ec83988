"""Checkpoints: atomic, by global class index, for any number of ranks, no pickle.

checkpoints/step_00001200/
    centers_000000000000_000000050000.safetensors   rows [0, 50000) of the centers' state and the sampler's tables
    history.safetensors                             for catching up rows; the count of updates; margin statistics
    backbone.safetensors  optimizer.safetensors     the engine's, and average and loss_scale where it has such
    classes.txt
    manifest.json                                   written last; without it there is no checkpoint
checkpoints/latest                                  the newest one's name

With checkpoint.dir set the step folders are in that folder or at that URL, and also hold config.yaml, metrics.jsonl and
wandb_id. Files on their way to a URL, or from it, are in a local scratch folder in between.
"""

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from partial_fc import checkpoint_files, storage
from partial_fc.config_file import saved_checkpoint_dir
from partial_fc.head.centers import MissedUpdates, catch_up
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.partition import class_range
from partial_fc.head.sampling import tables
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine
from partial_fc.storage import Place

FORMAT, VERSION = "partial_fc-checkpoint", 1
STATISTICS = "statistics."  # before a name in history.safetensors: the margin's
PART_BYTES = 1 << 30  # a part of the centers; a reader at another world size opens those that overlap its range


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder or URL, and its manifest."""

    path: Place
    manifest: dict

    @property
    def step(self) -> int:
        """Updates that the run had made."""
        return self.manifest["step"]

    def files(self) -> list[dict]:
        return self.manifest["files"]

    def classes(self) -> list[str]:
        """The class map: the name of every class, as the data had it."""
        text = self.read("classes.txt")
        if text is None:
            raise ValueError(f"{self.path} lists no classes.txt: it is damaged; take another checkpoint")
        return text.decode("utf-8").split("\n")[:-1]

    def read(self, name: str) -> bytes | None:
        """One of its small files, of a URL verified; None if it has none of that name."""
        entry = next((entry for entry in self.files() if entry["name"] == name), None)
        if entry is None:
            return None
        data = storage.read(storage.join(self.path, name))
        return checkpoint_files.check(data, self.path, entry) if storage.remote(self.path) else data


def complete(path: Place) -> list[Place]:
    """The complete checkpoints of a run, oldest first.

    path: the run folder, whose config.yaml may name another place (checkpoint.dir), or that place itself.
    """
    if storage.remote(path):
        return checkpoint_files.complete(path)
    elsewhere = saved_checkpoint_dir(path)
    if elsewhere is not None:
        return checkpoint_files.complete(storage.place(elsewhere))
    return checkpoint_files.complete(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def find_latest(path: Place) -> Checkpoint | None:
    """The newest complete checkpoint of a run; None without one. `path` is what `complete` takes.

    Raises ValueError for a newer format.
    """
    found = complete(path)
    return open_checkpoint(found[-1]) if found else None


def find_checkpoint(path: Place) -> Checkpoint:
    """The checkpoint that `path` itself is, a folder or URL, or the newest of the run `path`, as in `complete`.

    Raises ValueError without one.
    """
    found = (
        open_checkpoint(path) if storage.exists(storage.join(path, checkpoint_files.MANIFEST)) else find_latest(path)
    )
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint; give a run folder or the folder of a checkpoint")
    return found


def open_checkpoint(path: Place) -> Checkpoint:
    """Reads and checks a manifest. Raises ValueError for what is no checkpoint, or one of a newer format."""
    try:
        manifest = json.loads(storage.read(storage.join(path, checkpoint_files.MANIFEST)))
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
    run: Path,
    step: int,
    *,
    head: PartialFC,
    engine: BaseEngine,
    classes: Path,
    settings: dict,
    keep: int,
    where: Place | None = None,
    beside: list[Path] | None = None,
) -> Place:
    """Writes the checkpoint of `step` from all ranks, then deletes all but the newest `keep`. A collective.

    settings: what the run must not change on resume (seed, data set, order), kept in the manifest. where: the folder or
    URL that checkpoints go into; None: run/checkpoints. beside: files that go along where they exist. A failure on any
    rank is raised on all of them, and leaves the checkpoints that were there.
    """
    folder = storage.join(run / "checkpoints" if where is None else where, f"step_{step:08d}")
    with distributed.together(f"saving {folder}"):
        if distributed.rank() == 0:
            checkpoint_files.begin(folder)
    state = engine.state()
    copies = {"classes.txt": classes, **{path.name: path for path in beside or []}}
    written = _of_all_ranks(_write_all(run, folder, head, state, copies), folder)
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
                "files": written,
            }
            checkpoint_files.finish(folder, json.dumps(manifest, indent=1), written)
            for old in checkpoint_files.complete(storage.parent(folder))[:-keep]:
                checkpoint_files.remove(old)
    return folder


def load(checkpoint: Checkpoint, *, head: PartialFC, engine: BaseEngine, near: Path | None = None) -> None:
    """Restores head and engine at this number of ranks, whatever number wrote it. A collective.

    From a URL a rank fetches the parts that hold classes of its own, and what all ranks need, into `near` for the time
    of the call; None: where temporary files go.

    Raises RunError on all ranks for a damaged file, another class count, embedding size or dtype.
    """
    manifest, path = checkpoint.manifest, checkpoint.path
    dtype = str(head.dtype).removeprefix("torch.")
    with distributed.together(f"loading {path}"):
        ours = {
            "num_classes": head.num_classes,
            "embedding_dim": head.embedding_dim,
            "dtype": dtype,
            "sub_centers": head.sub_centers,
        }
        check_kinds(checkpoint, head)
        for name, value in ours.items():
            if manifest.get(name, 1) != value:  # early checkpoints do not name their one sub-center
                raise ValueError(
                    f"it was written with {name} {manifest.get(name, 1)}, this run has {value}: continue with the data "
                    "and config that it was written with, or give another run.dir"
                )
        _check_parts(checkpoint, head.num_classes)
        if not storage.remote(path):  # each file by one rank; of a URL each rank verifies what it fetches
            for entry in checkpoint.files()[distributed.rank() :: distributed.world_size()]:
                checkpoint_files.verify(path, entry)
    rows: dict[str, Tensor] = {}
    wanted = _needed(checkpoint, head.classes)
    with (
        distributed.together(f"loading {path}"),
        checkpoint_files.at_hand(path, wanted, near=near, verified=True) as here,
    ):
        history = load_file(here / "history.safetensors")
        known = head.first_statistics()
        statistics = {
            name.removeprefix(STATISTICS): history.pop(name) for name in [*history] if name.startswith(STATISTICS)
        }
        head.centers.load(lambda name, out: _read_rows(here, wanted, name, head.classes, out), **history)
        for name, tensor in _feature_centers(head).items():  # without them they begin where a new run's do
            _read_rows(here, wanted, name, head.classes, tensor)
        head.set_statistics(known | {name: value for name, value in statistics.items() if name in known})
        for name, table in tables(head).items():
            rows[name] = table[head.classes.start : head.classes.stop].clone()
            if not _read_rows(here, wanted, name, head.classes, rows[name]):
                rows[name].fill_(-1)  # written with another sampler: nothing until the next refresh
        head.step_count = checkpoint.step
        names = {entry["name"] for entry in checkpoint.files()}
        kept = (name for name in engine.files if f"{name}.safetensors" in names)
        engine.load({name: load_file(here / f"{name}.safetensors") for name in kept})
    per_rank = len(class_range(head.num_classes, 0, distributed.world_size()))
    for name, table in tables(head).items():  # every rank keeps all of it
        table.copy_(distributed.gather_rows(rows[name], per_rank, head.num_classes))


def check_kinds(checkpoint: Checkpoint, head: PartialFC) -> None:
    """Raises ValueError where margin or optimizer make the head keep something else than the checkpoint has."""
    theirs, ours = checkpoint.manifest["center_state"], _kinds(head)
    if theirs != ours:
        raise ValueError(
            f"its class centers were written with {', '.join(theirs)}, this run keeps {', '.join(ours)}: put "
            "head.optim.name and head.margin.name back, or give another run.dir"
        )


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


def _write_all(
    run: Path, folder: Place, head: PartialFC, state: dict[str, dict[str, Tensor]], copies: dict[str, Path]
) -> Generator[dict, None, None]:
    """Writes this rank's files one after the other, as they are asked for; yields their manifest entries."""
    with checkpoint_files.scratch(run) if storage.remote(folder) else nullcontext(folder) as local:
        for (first, last), part in _parts(head):
            path = local / f"centers_{first:012d}_{last:012d}.safetensors"
            _write(path, part)
            yield checkpoint_files.settle(path, folder) | {"classes": [first, last]}
        if distributed.rank() > 0:
            return
        for name, tensors in (state | {"history": _history(head)}).items():
            _write(local / f"{name}.safetensors", tensors)
            yield checkpoint_files.settle(local / f"{name}.safetensors", folder)
        for name, path in copies.items():
            if path.exists() or name == "classes.txt":
                shutil.copyfile(path, local / name)
                yield checkpoint_files.settle(local / name, folder)


def _of_all_ranks(entries: Generator[dict, None, None], folder: Place) -> list[dict]:
    """What the iterators of all ranks give. A collective.

    The ranks meet after every file, so that none waits for longer than another writes or uploads one.
    """
    written: list[dict] = []
    try:
        while True:
            ours: list[dict] = []
            with distributed.together(f"saving {folder}"):
                ours = list(islice(entries, 1))
            theirs = [entry for one in distributed.gather_objects(ours) for entry in one]
            if not theirs:
                return written
            written += theirs
    finally:
        entries.close()  # and with it the scratch folder


def state_by_class(head: PartialFC) -> dict[str, Tensor]:
    """What a checkpoint keeps by class: this rank's rows, (C_r, ...) each."""
    mine = slice(head.classes.start, head.classes.stop)
    return head.centers.state() | _feature_centers(head) | {name: table[mine] for name, table in tables(head).items()}


def _parts(head: PartialFC) -> Iterator[tuple[tuple[int, int], dict[str, Tensor]]]:
    """This rank's classes in parts of PART_BYTES: the half-open range of each, and its rows."""
    state = state_by_class(head)
    bytes_per_row = sum(tensor[:1].numel() * tensor.element_size() for tensor in state.values())
    rows_per_part = max(PART_BYTES // max(bytes_per_row, 1), 1)
    for start in range(0, len(head.classes), rows_per_part):
        stop = min(start + rows_per_part, len(head.classes))
        part = {name: tensor[start:stop] for name, tensor in state.items()}
        yield (head.classes.start + start, head.classes.start + stop), part


def _needed(checkpoint: Checkpoint, classes: range) -> list[dict]:
    """The entries of the parts that hold some of `classes`, and of what does not belong to classes."""
    return [
        entry
        for entry in checkpoint.files()
        if entry["name"].endswith(".safetensors")
        and ("classes" not in entry or max(entry["classes"][0], classes.start) < min(entry["classes"][1], classes.stop))
    ]


def _read_rows(folder: Path, entries: list[dict], name: str, classes: range, out: Tensor) -> bool:
    """Fills `out` with the rows `classes` of one state tensor; False where it has none of that name and width."""
    for entry in entries:
        if "classes" not in entry:
            continue
        first, last = entry["classes"]
        start, stop = max(first, classes.start), min(last, classes.stop)
        if start >= stop:
            continue
        with safe_open(folder / entry["name"], framework="pt") as part:
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


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def read_backbone(checkpoint: Checkpoint, averaged: bool = False) -> dict[str, Tensor] | None:
    """The backbone's tensors alone, or their moving average's, verified; None where there is no average."""
    name = "average.safetensors" if averaged else "backbone.safetensors"
    entry = next((entry for entry in checkpoint.files() if entry["name"] == name), None)
    if entry is None:
        return None
    with checkpoint_files.at_hand(checkpoint.path, [entry]) as here:
        return load_file(here / entry["name"])


def read_centers(checkpoint: Checkpoint, classes_at_once: int) -> Iterator[Tensor]:
    """All class centers in order, caught up: joined they are what `PartialFC.full_weight` of the run gives.

    Yields (n, D), or (n, k, D) with k sub-centers, of at most `classes_at_once` classes, in the run's dtype; no more
    is in memory, and no process group is needed. Every file is verified first. Those of a URL are together where
    temporary files go (TMPDIR) until the last rows are read. Raises ValueError for a damaged one.
    """
    wanted = _needed(checkpoint, range(checkpoint.manifest["num_classes"]))
    wanted = [entry for entry in wanted if "classes" in entry or entry["name"] == "history.safetensors"]
    _check_parts(checkpoint, checkpoint.manifest["num_classes"])
    with checkpoint_files.at_hand(checkpoint.path, wanted, bar="verifying class centers") as here:
        yield from _read_centers(here, wanted, checkpoint.manifest, classes_at_once)


def _read_centers(path: Path, wanted: list[dict], manifest: dict, classes_at_once: int) -> Iterator[Tensor]:
    num_classes, k = manifest["num_classes"], manifest.get("sub_centers", 1)
    per_class = () if k == 1 else (k,)
    slices = [
        range(start, min(start + classes_at_once, num_classes)) for start in range(0, num_classes, classes_at_once)
    ]

    def read(name: str, classes: range, *width: int, dtype: torch.dtype) -> Tensor | None:
        out = torch.empty(len(classes), *per_class, *width, dtype=dtype)
        return out if _read_rows(path, wanted, name, classes, out) else None

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
            if momentum is None:
                raise ValueError(f"{path} has last_update and no momentum for classes {classes.start} and on")
            lag = missed.updates - last_update.flatten().long()
            matrices = missed.matrices(lag).to(dtype).flatten(1).T.contiguous()
            catch_up(weight.view(-1, width), momentum.view(-1, width), matrices, None)
        yield weight
