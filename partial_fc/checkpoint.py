"""Checkpoints: atomic, by global class index, for any number of ranks, no pickle.

checkpoints/step_00001200/
    centers_000000000000_000000050000.safetensors   rows [0, 50000) of the centers' state and the sampler's tables
    history.safetensors                             for catching up rows; the count of updates; margin statistics
    backbone.safetensors  optimizer.safetensors     the engine's, and average and loss_scale where it has such
    classes.txt
    manifest.json                                   written last; without it there is no checkpoint: see `manifest`
checkpoints/latest                                  the newest one's name
checkpoints/damaged_step_00001100/                  one that was damaged, kept aside

With checkpoint.dir set the step folders are in that folder or at that URL, and also hold config.yaml, metrics.jsonl and
wandb_id. Files on their way to a URL, or from it, are in a local scratch folder in between.
"""

import json
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from partial_fc import checkpoint_files, storage
from partial_fc.checkpoint_files import Owner
from partial_fc.config import Config, check_config
from partial_fc.config_file import saved_checkpoint_dir
from partial_fc.files import one_line, shortened
from partial_fc.head.centers import MissedUpdates, catch_up
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.partition import class_range
from partial_fc.head.sampling import tables
from partial_fc.manifest import FORMAT, VERSION, Damaged, Foreign, Missing, parse, step_name
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine
from partial_fc.progress import DIVERGED
from partial_fc.storage import Place
from partial_fc.tensor_files import load_tensors

STATISTICS = "statistics."  # before a name in history.safetensors: the margin's
KINDS = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32"}  # of what is kept by class, in safetensors
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)  # of a statistic
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

    @property
    def run(self) -> str | None:
        """The id of the run that wrote it; None in early checkpoints."""
        return self.manifest.get("run")

    def files(self) -> list[dict]:
        return self.manifest["files"]

    def entry(self, name: str) -> dict | None:
        return next((entry for entry in self.files() if entry["name"] == name), None)

    def classes(self) -> list[str]:
        """The class map: the name of every class, as the data had it. Raises Damaged, a ValueError."""
        text = self.read("classes.txt")
        with _advice(self):
            try:
                names = (b"" if text is None else text).decode("utf-8").split("\n")[:-1]
            except UnicodeDecodeError as error:
                raise Damaged(f"{self.path}: classes.txt is no UTF-8 ({error})") from None
            if len(names) != self.manifest["num_classes"]:
                raise Damaged(
                    f"{self.path}: classes.txt names {len(names)} classes, the checkpoint has "
                    f"{self.manifest['num_classes']} class centers: wanted a line a class"
                )
        return names

    def read(self, name: str) -> bytes | None:
        """One of its small files, verified; None if it has none of that name. Raises Damaged, a ValueError."""
        entry = self.entry(name)
        if entry is None:
            return None
        with _advice(self):
            return checkpoint_files.read(self.path, entry)

    def config(self) -> Config:
        """The config of the run. Raises ValueError where it is none, as in a checkpoint of one's own loop."""
        values = self.setting("config")
        return check_config(values, f"{self.path}/manifest.json: settings.config")

    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that the backbone was trained on."""
        size = self.manifest["settings"].get("image_size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**15 for n in size)):
            raise ValueError(
                f"{self.path}/manifest.json: settings.image_size: got {shortened(size)}, wanted [height, width]"
            )
        return size[0], size[1]

    def setting(self, name: str) -> dict[str, Any]:
        """What the trainer keeps under settings. Raises ValueError where there is no object of that name."""
        value = self.manifest["settings"].get(name)
        if not isinstance(value, dict):
            raise ValueError(
                f"{self.path}/manifest.json: settings.{name}: got {shortened(value)}, wanted an object, as training "
                "writes it: was this checkpoint saved by a loop of your own?"
            )
        return value


class DamagedCheckpoint(distributed.RunError):
    """A checkpoint of which a file is missing or is not what its checksum says, on all ranks. what: the damage.

    Head and engine are as they were.
    """

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


def complete(path: Place) -> list[Place]:
    """The folders of a run that look like complete checkpoints, oldest first.

    path: the run folder, whose config.yaml may name another place (checkpoint.dir), or that place itself.
    """
    if storage.remote(path):
        return checkpoint_files.complete(path)
    elsewhere = saved_checkpoint_dir(path)
    if elsewhere is not None:
        where = storage.place(elsewhere)
        if storage.remote(where) and distributed.rank() == 0:  # the folder may be somebody else's
            print(f"{one_line(path)}/config.yaml names {one_line(where)}: reading checkpoints there", flush=True)
        return checkpoint_files.complete(where)
    return checkpoint_files.complete(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def complete_checkpoints(path: Place) -> Iterator[Checkpoint]:
    """The complete checkpoints of a run, newest first; `path` is what `complete` takes.

    A folder whose manifest is of another step, or of something else, is left out and said.
    Raises ValueError for a damaged manifest and a newer format.
    """
    for folder in reversed(complete(path)):
        try:
            yield Checkpoint(folder, checkpoint_files.read_own_manifest(folder))
        except Foreign as error:
            if distributed.rank() == 0:
                print(f"{one_line(error)}; it is left alone", file=sys.stderr, flush=True)
        except Missing:
            continue  # deleted meanwhile
        except Damaged as error:
            raise Damaged(error.what, folder, _others(folder)) from None


def find_latest(path: Place) -> Checkpoint | None:
    """The newest complete checkpoint of a run; None without one. `path` is what `complete` takes.

    Raises ValueError for a damaged manifest and a newer format.
    """
    found = next(complete_checkpoints(path), None)
    # a run that is being trained may have replaced its only one since it was listed
    return found or next(complete_checkpoints(path), None)


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


def find_for_all(path: Place, doing: str) -> Checkpoint:
    """`find_checkpoint` by rank 0, for all ranks: a run that is being trained may save another one meanwhile.

    doing: what for, as "evaluating runs/a", for errors.

    A collective. Raises RunError on all ranks where `find_checkpoint` raises.
    """
    found = None
    with distributed.together(doing):
        if distributed.rank() == 0:
            found = find_checkpoint(path)
    return distributed.gather_objects(found)[0]


def open_checkpoint(path: Place) -> Checkpoint:
    """Reads and checks a manifest. Raises ValueError for what is no checkpoint, or one of a newer format."""
    return Checkpoint(path, checkpoint_files.read_manifest(path))


@contextmanager
def _advice(checkpoint: Checkpoint) -> Iterator[None]:
    """Adds to a Damaged what to do about it."""
    try:
        yield
    except Damaged as error:
        raise Damaged(error.what, checkpoint.path, what_to_do(checkpoint)) from None


def what_to_do(checkpoint: Checkpoint) -> str:
    """About damage in it: it may have been replaced by a newer one while it was read."""
    path = checkpoint.path
    try:
        now: dict | None = checkpoint_files.read_manifest(path)
    except (ValueError, OSError):
        now = None
    if now != checkpoint.manifest:
        return f"{path} was replaced or deleted while it was read: try again"
    return _others(path)


def _others(path: Place) -> str:
    others = [one for one in checkpoint_files.complete(storage.parent(path)) if one != path]
    if not others:
        return f"there is no other checkpoint beside {path}"
    return f"name another one, as {others[-1]}, or rename {path} to go on from the checkpoint before it"


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
    owner: Owner | None = None,
    first: Callable[[], None] = lambda: None,
) -> Place:
    """Writes the checkpoint of `step` from all ranks, then deletes all of the run but the newest `keep`. A collective.

    settings: what the run must not change on resume (seed, data set, order), kept in the manifest. where: the folder or
    URL that checkpoints go into; None: run/checkpoints. beside: files that go along where they exist. owner: the run,
    on rank 0; None: the one that the newest checkpoint there is of, or a new one. first: called on rank 0 before
    anything is written.

    A failure on any rank is raised on all of them, as RunError, and leaves the checkpoints that were there; so is state
    that is not finite. Raises ValueError for `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, wanted 1 or more checkpoints that stay")
    where = run / "checkpoints" if where is None else where
    folder = storage.join(where, step_name(step))
    state = engine.state()
    _check_finite(step, head, state)
    with distributed.together(f"saving {folder}"):
        if distributed.rank() == 0:
            first()
            owner = owner or checkpoint_files.owner_here(where)
            checkpoint_files.begin(folder, owner)
    try:
        _save(
            run,
            step,
            folder,
            head,
            state,
            {"classes.txt": classes, **{p.name: p for p in beside or []}},
            settings,
            owner,
        )
    except distributed.RunError:
        if owner is not None and distributed.rank() == 0:
            checkpoint_files.abandon(folder, owner)
        raise
    with distributed.together(f"deleting old checkpoints in {where}"):
        if owner is not None and distributed.rank() == 0:
            checkpoint_files.prune(where, owner, keep)
    return folder


def _check_finite(step: int, head: PartialFC, state: dict[str, dict[str, Tensor]]) -> None:
    """Raises RunError, on all ranks, for NaN and infinity in what a checkpoint would keep. Reads it once.

    A loss may be finite where the gradient is not, so a step's loss does not tell.
    """
    parts = {"class centers": state_by_class(head), "statistics": _history(head)}
    if distributed.rank() == 0:
        parts |= state
    wrong = next((f"{part}: {name}" for part, ts in parts.items() for name, t in ts.items() if not _finite(t)), None)
    found = [name for name in distributed.gather_objects(wrong) if name is not None]
    if found:
        raise distributed.RunError(
            f"{DIVERGED}: after step {step} the {found[0]} is not finite: a gradient was infinite or NaN. Nothing is "
            "saved, earlier checkpoints stay. Lower optim.lr, raise optim.warmup_steps or give optim.clip; the same "
            "command goes on from the latest checkpoint"
        )


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _save(
    run: Path,
    step: int,
    folder: Place,
    head: PartialFC,
    state: dict[str, dict[str, Tensor]],
    copies: dict[str, Path],
    settings: dict,
    owner: Owner | None,
) -> None:
    """Writes all files, the manifest last; owner: on rank 0. A collective."""
    written = _of_all_ranks(_write_all(run, folder, head, state, copies), folder)
    with distributed.together(f"saving {folder}"):
        if owner is not None and distributed.rank() == 0:
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "run": owner.run,
                **({"adopted": sorted(owner.adopted)} if owner.adopted else {}),
                "step": step,
                "num_classes": head.num_classes,
                "embedding_dim": head.embedding_dim,
                "dtype": str(head.dtype).removeprefix("torch."),
                "center_state": _kinds(head),
                "sub_centers": head.sub_centers,
                "settings": settings,
                "files": written,
            }
            text = json.dumps(manifest, indent=1)
            parse(text.encode(), storage.join(folder, checkpoint_files.MANIFEST))  # settings may be anything
            checkpoint_files.finish(folder, text, written)


def load(checkpoint: Checkpoint, *, head: PartialFC, engine: BaseEngine, near: Path | None = None) -> None:
    """Restores head and engine at this number of ranks, whatever number wrote it. A collective.

    From a URL a rank fetches the parts that hold classes of its own, and what all ranks need, into `near` for the time
    of the call; None: where temporary files go.

    Raises RunError on all ranks for another class count, embedding size or dtype; its kind DamagedCheckpoint for a file
    that is missing or is not what its checksum says, before anything is loaded. A file that has its checksum and other
    tensors than are wanted is a RunError while they are loaded: head and engine are of no use then.
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
    wanted = _needed(checkpoint, head.classes)
    with ExitStack() as stack:
        here = _verified(checkpoint, wanted, near, stack)
        rows: dict[str, Tensor] = {}
        with distributed.together(f"loading {path}"):
            rows = _load_from(here, checkpoint, wanted, head, engine)
    per_rank = len(class_range(head.num_classes, 0, distributed.world_size()))
    for name, table in tables(head).items():  # every rank keeps all of it
        table.copy_(distributed.gather_rows(rows[name], per_rank, head.num_classes))


def _verified(checkpoint: Checkpoint, wanted: list[dict], near: Path | None, stack: ExitStack) -> Path:
    """A folder with the files `wanted`, verified, until the stack is closed. A collective; raises DamagedCheckpoint."""
    path, here = checkpoint.path, Path()
    damage: tuple[str, str] | None = None
    with distributed.together(f"loading {path}"):
        try:
            with _advice(checkpoint):
                if not storage.remote(path):  # each file by one rank; of a URL each rank verifies what it fetches
                    for entry in checkpoint.files()[distributed.rank() :: distributed.world_size()]:
                        checkpoint_files.verify(path, entry)
                here = stack.enter_context(checkpoint_files.at_hand(path, wanted, near=near, verified=True))
        except Damaged as error:
            damage = str(error), error.what
    found = [one for one in distributed.gather_objects(damage) if one is not None]
    if found:
        message, what = found[0]
        raise DamagedCheckpoint(f"loading {path} failed: {message}", what)
    return here


def _load_from(
    here: Path, checkpoint: Checkpoint, wanted: list[dict], head: PartialFC, engine: BaseEngine
) -> dict[str, Tensor]:
    """Loads all but the sampler's tables, of which this rank's rows are returned. No collective."""
    history, statistics = _read_history(here / "history.safetensors")
    updates = len(history["history"])

    def read(name: str, out: Tensor) -> bool:
        found = _read_rows(here, wanted, name, head.classes, out)
        if name == "last_update" and found:
            _check_last_update(out, updates, here)
        elif not found and name != "last_update":
            raise Damaged(f"{here}: its parts have no {name} {tuple(out.shape[1:])} for classes {head.classes}")
        return found

    head.centers.load(read, **history)
    for name, tensor in _feature_centers(head).items():  # without them they begin where a new run's do
        _read_rows(here, wanted, name, head.classes, tensor)
    known = head.first_statistics()
    head.set_statistics(known | {name: value for name, value in statistics.items() if name in known})
    rows: dict[str, Tensor] = {}
    for name, table in tables(head).items():
        rows[name] = table[head.classes.start : head.classes.stop].clone()
        if not _read_rows(here, wanted, name, head.classes, rows[name]):
            rows[name].fill_(-1)  # written with another sampler: nothing until the next refresh
    head.step_count = checkpoint.step
    names = {entry["name"] for entry in checkpoint.files()}
    kept = [name for name in engine.files if f"{name}.safetensors" in names]
    try:
        engine.load({name: read_tensors(here / f"{name}.safetensors") for name in kept})
    except (KeyError, RuntimeError) as error:  # of names and shapes
        raise Damaged(f"{here}: {', '.join(kept)} are not of this backbone and optimizer: {error}") from None
    return rows


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises Damaged, a ValueError, where it is none."""
    try:
        return load_tensors(path)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except ValueError as error:
        raise Damaged(str(error)) from None


def _read_history(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What Centers.load takes, and the margin's statistics, by name."""
    values = read_tensors(path)
    statistics = {n.removeprefix(STATISTICS): values.pop(n) for n in [*values] if n.startswith(STATISTICS)}
    history = values.get("history")
    if history is None or history.dtype != torch.float64 or history.ndim != 2 or history.shape[1] != 3:
        got = None if history is None else f"{history.dtype} {tuple(history.shape)}"
        raise Damaged(f"{path}: history: got {got}, wanted float64 (updates, 3)")
    updates = values.get("updates")  # early checkpoints have none
    for name, value in statistics.items():
        if value.numel() != 1 or value.dtype not in NUMBERS:
            raise Damaged(f"{path}: {name}: got {value.dtype} {tuple(value.shape)}, wanted one number")
    if updates is not None and (updates.numel() != 1 or updates.dtype != torch.int64):
        raise Damaged(f"{path}: updates: got {updates.dtype} {tuple(updates.shape)}, wanted one int64")
    if updates is not None and int(updates) < 0:
        raise Damaged(f"{path}: updates: got {int(updates)}, wanted 0 or more")
    return {name: value for name, value in (("history", history), ("updates", updates)) if value is not None}, {
        name: value.reshape(()) for name, value in statistics.items()
    }


def _check_last_update(rows: Tensor, updates: int, here: Path) -> None:
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) <= updates:
        raise Damaged(
            f"{here}: last_update: got {int(rows.min())} to {int(rows.max())}, wanted 0 to {updates}, the updates in "
            "history.safetensors"
        )


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
                with checkpoint_files.writing(local / name):
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
        if (
            max(entry["classes"][0], classes.start) < min(entry["classes"][1], classes.stop)
            if "classes" in entry
            else entry["name"].endswith(".safetensors")
        )
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
        path = folder / entry["name"]
        try:
            with safe_open(path, framework="pt") as part:
                if name not in part.keys():  # noqa: SIM118 - no mapping, it only has keys()
                    return False
                rows = part.get_slice(name)
                shape = rows.get_shape()
                if shape[1:] != list(out.shape[1:]):
                    return False
                kind = rows.get_dtype()
                if kind != KINDS.get(out.dtype):
                    raise Damaged(f"{path}: {name}: got {kind}, wanted {KINDS.get(out.dtype)}")
                if shape[:1] != [last - first]:
                    raise Damaged(f"{path}: {name}: got the shape {shape}, wanted {last - first} rows")
                out[start - classes.start : stop - classes.start] = rows[start - first : stop - first].to(out)
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except SafetensorError as error:
            raise Damaged(f"{path} is no safetensors file: {error}") from None
    return True


def _check_parts(checkpoint: Checkpoint, num_classes: int) -> None:
    owned = sorted(entry["classes"] for entry in checkpoint.files() if "classes" in entry)
    ends = [0, *(stop for _, stop in owned)]
    if [start for start, _ in owned] != ends[:-1] or ends[-1] != num_classes:
        raise ValueError(
            f"{checkpoint.path}: its parts hold classes {owned}, which do not tile the {num_classes} there are"
        )


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with checkpoint_files.writing(path):
        path.touch()
        mode = path.stat().st_mode  # by the umask; safetensors lets nobody else read what it writes
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
        path.chmod(mode)


def read_backbone(checkpoint: Checkpoint, averaged: bool = False) -> dict[str, Tensor] | None:
    """The backbone's tensors alone, or their moving average's, verified; None where there is no average.

    Raises Damaged, a ValueError.
    """
    name = "average.safetensors" if averaged else "backbone.safetensors"
    entry = checkpoint.entry(name)
    if entry is None:
        if not averaged:
            raise Damaged(f"{checkpoint.path} lists no {name}: it is damaged; take another checkpoint")
        return None
    with _advice(checkpoint), checkpoint_files.at_hand(checkpoint.path, [entry]) as here:
        return read_tensors(here / entry["name"])


def load_backbone(net: nn.Module, checkpoint: Checkpoint, averaged: bool = False) -> bool:
    """Loads what `read_backbone` gives into `net`; False where there is no average. Raises Damaged for another net."""
    state = read_backbone(checkpoint, averaged)
    if state is None:
        return False
    try:
        net.load_state_dict(state)
    except RuntimeError as error:  # of names and shapes
        raise Damaged(f"{checkpoint.path}: the backbone is not the one that its config names: {error}") from None
    return True


def read_centers(checkpoint: Checkpoint, classes_at_once: int) -> Iterator[Tensor]:
    """All class centers in order, caught up: joined they are what `PartialFC.full_weight` of the run gives.

    Yields (n, D), or (n, k, D) with k sub-centers, of at most `classes_at_once` classes, in the run's dtype; no more
    is in memory, and no process group is needed. Every file is verified first. Those of a URL are together where
    temporary files go (TMPDIR) until the last rows are read. Raises ValueError for a damaged one.
    """
    wanted = _needed(checkpoint, range(checkpoint.manifest["num_classes"]))
    wanted = [entry for entry in wanted if "classes" in entry or entry["name"] == "history.safetensors"]
    _check_parts(checkpoint, checkpoint.manifest["num_classes"])
    with ExitStack() as stack:
        with _advice(checkpoint):
            here = stack.enter_context(checkpoint_files.at_hand(checkpoint.path, wanted, bar="verifying class centers"))
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
    history = _read_history(path / "history.safetensors")[0]["history"]
    oldest = len(history)
    for rows in (read("last_update", classes, dtype=torch.int32) for classes in slices):
        if rows is not None:
            _check_last_update(rows, len(history), path)
            oldest = min(oldest, int(rows.min()))
    missed.replay(history, len(history) - oldest)

    width, dtype = manifest["embedding_dim"], getattr(torch, manifest["dtype"])
    for classes in slices:
        weight = read("weight", classes, width, dtype=dtype)
        if weight is None:
            raise Damaged(f"{path} has no class centers of {width} numbers for classes {classes.start} and on")
        last_update = read("last_update", classes, dtype=torch.int32)
        if last_update is not None:  # else every row is current
            momentum = read("momentum", classes, width, dtype=dtype)
            if momentum is None:
                raise Damaged(f"{path} has last_update and no momentum for classes {classes.start} and on")
            lag = missed.updates - last_update.flatten().long()
            matrices = missed.matrices(lag).to(dtype).flatten(1).T.contiguous()
            catch_up(weight.view(-1, width), momentum.view(-1, width), matrices, None)
        yield weight
