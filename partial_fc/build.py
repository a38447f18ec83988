"""What a run is built of, from its config and its latest checkpoint; and whether the two belong together."""

import secrets
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from partial_fc import backbone, checkpoint, checkpoint_files, memory, storage
from partial_fc.checkpoint_files import Owner
from partial_fc.config import Backbone, Config
from partial_fc.config_file import save_config, saved_checkpoint_dir, saved_run_id
from partial_fc.data.groups import Groups, build_order
from partial_fc.data.mixing import LEAST, mixing, too_small
from partial_fc.data.order import Order
from partial_fc.data.reader import image_size
from partial_fc.data.sets import open_training_set
from partial_fc.data.shards import Index
from partial_fc.evaluate.runs import open_sets
from partial_fc.files import one_line, write_atomically
from partial_fc.folders import make_folder
from partial_fc.head.embedding_losses import EmbeddingLoss, build_embedding_loss
from partial_fc.head.margin import Margin, WarmUp
from partial_fc.head.margins import build_margin
from partial_fc.head.named import source_of
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.partition import class_range
from partial_fc.head.sampling import HardNegatives
from partial_fc.manifest import Damaged
from partial_fc.metrics import KEPT
from partial_fc.optim import build_optimizer, peak_rate
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine
from partial_fc.parallel.engine import build_engine, check_engine
from partial_fc.parallel.watch import unlimited
from partial_fc.progress import Progress
from partial_fc.seeds import seed_for
from partial_fc.storage import Place

AT_THE_START = ("engine.loss_scale:", "head.init_std:")  # settings that a run looks at once


@dataclass
class Parts:
    """What a run is built of."""

    index: Index
    order: Order | Groups
    head: PartialFC
    engine: BaseEngine
    total_steps: int
    start_step: int
    progress: Progress
    peak_rate: float  # the backbone's learning rate at its peak
    head_rate: float  # the class centers' learning rate, as a multiple of the backbone's
    owner: Owner | None  # the run, as its checkpoints name it; on rank 0

    def labels(self, step: int) -> Tensor:
        """(B,) labels of the whole global batch of a step, from the index: no collective."""
        return torch.from_numpy(self.index.label[self.order.batch(step)])


def build(config: Config, device: torch.device) -> Parts:
    """Data, head, backbone and engine of a run, at the state of its latest checkpoint. A collective."""
    run = Path(config.run.dir)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with distributed.together("preparing the run"):
        check_engine(config.engine, device)
        index = training_data(config)
        size = image_size(index)
        say_what_is_imported(config)
        order = order_of(config, index, trust_code=True)
        net = backbone.build_seeded(config.backbone.name, config.backbone.embedding_dim, size, config.run.seed)
        check_batch_norm(config, net, order)
        total_steps = length_of(config, order)
        sets = open_sets(
            config.evaluate.sets, size, index.cache
        )  # what is wrong with them is said now, not after the training
        wants = head_wants(config, index.num_classes, device, trust_code=True)
    check_memory(wants)
    found = start_of(config, index, total_steps)
    with distributed.together("preparing the run"):
        head = build_head(config, index.num_classes, device, trust_code=True)
        net.to(device).train()
    agree_on_start(config, index, found)
    check_shared(checkpoints_of(config), "checkpoint.dir" if config.checkpoint.dir else "run.dir")
    batch_sizes = micro_batch_sizes(config)
    with unlimited("building the engine"):  # DeepSpeed may compile
        engine = build_engine(
            net,
            build_optimizer(net, config.optim),
            device,
            config.engine,
            accumulate=config.data.accumulate,
            clip=config.optim.clip,
            batch_sizes=batch_sizes,
        )
    # compiled code is made for a batch size
    images = max(batch_sizes) if config.engine.compile else 2
    with unlimited("the warm-up"):  # which compiles
        engine.warm_up(torch.zeros(images, 3, *size, device=device))
    while found is not None:
        try:
            with unlimited("loading the checkpoint"):
                checkpoint.load(found, head=head, engine=engine, near=run)
            break
        except checkpoint.DamagedCheckpoint as error:
            go_back(found.path, error.what, str(error))
            found = start_of(config, index, total_steps)
    start_step = 0 if found is None else found.step
    owner: Owner | None = None
    progress = Progress()
    with distributed.together("preparing the run"):
        if found is not None:
            progress = Progress.restored(found.setting("progress"), found.path)
        if distributed.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            (run / "preempted").unlink(missing_ok=True)
            owner = owner_of(config)
            if config.checkpoint.dir and found is not None:
                restore_beside(found, run)
            if start_step < total_steps or not (run / "config.yaml").exists():
                name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
                save_config(config, run / "config.yaml", name, owner.run)
            print_summary(config, index, order, head, total_steps, found)
            for caution in (*schedule_cautions(config, total_steps), *data_cautions(config, index, sets)):
                print(f"warning: {one_line(caution)}", flush=True)
    peak, _ = peak_rate(config.optim, order.global_batch_size)
    head_rate = _first(config.head.optim.lr, config.optim.lr) / config.optim.lr
    return Parts(index, order, head, engine, total_steps, start_step, progress, peak, head_rate, owner)


def checkpoints_of(config: Config) -> Place:
    """The folder or URL of the run's checkpoints."""
    return storage.place(config.checkpoint.dir or Path(config.run.dir) / "checkpoints")


def latest_of(config: Config, index: Index) -> checkpoint.Checkpoint | None:
    """The checkpoint that the run goes on from. Raises ValueError where config and data do not go together with it."""
    run, where = Path(config.run.dir), checkpoints_of(config)
    if storage.remote(where):  # said now, not at the first save
        storage.check_writable(where, f"written_by_rank_{distributed.rank()}")
    found = checkpoint.find_latest(where)
    if found is None:
        check_nothing_elsewhere(run, where)
    else:
        check_unchanged(found, config, index)
    return found


def start_of(config: Config, index: Index, total_steps: int) -> checkpoint.Checkpoint | None:
    """The checkpoint that the run goes on from; one whose manifest or class map is damaged is passed over.

    A collective. Raises RunError on all ranks, as `latest_of` and `check_something_is_trained`.
    """
    while True:
        found: checkpoint.Checkpoint | None = None
        damage: Damaged | None = None
        with distributed.together("preparing the run"):
            try:
                found = latest_of(config, index)
                if distributed.rank() == 0:
                    owner_of(config)
                if found is not None:
                    check_something_is_trained(found, config, total_steps)
            except Damaged as error:
                damage = error
        seen = distributed.gather_objects(damage and (str(damage), damage.what, damage.folder))
        first = next((one for one in seen if one is not None), None)
        if first is None:
            return found
        message, what, folder = first
        if seen[0] is None or folder is None:  # ranks that see different files are no reason to move any
            raise distributed.RunError(f"preparing the run failed: {message}")
        go_back(folder, what, message)


def go_back(folder: Place, what: str, message: str) -> None:
    """Renames a damaged checkpoint, so that the one before it is the newest, and says so. A collective.

    what, message: the damage, without advice and with it. Raises RunError on all ranks where there is no other one.
    """
    with distributed.together("going back to an earlier checkpoint"):
        if distributed.rank() == 0:
            before = sound_before(folder)
            if before is None or not storage.exists(storage.join(folder, checkpoint_files.MANIFEST)):
                raise ValueError(message)
            aside = checkpoint_files.set_aside(folder)
            text = f"warning: {what}. It is kept as {aside}, and the run goes on from {before}"
            print(one_line(text), flush=True)


def sound_before(folder: Place) -> Place | None:
    """The newest checkpoint beside a damaged one whose manifest is sound."""
    for one in reversed(checkpoint_files.complete(storage.parent(folder))):
        with suppress(ValueError):
            if one != folder and checkpoint_files.read_own_manifest(one):
                return one
    return None


def owner_of(config: Config) -> Owner:
    """The run, as its checkpoints name it. Raises ValueError where checkpoint.dir has those of another one."""
    run, where = Path(config.run.dir), checkpoints_of(config)
    known = saved_run_id(run)
    owner = checkpoint_files.owner_here(where, known)
    if known is not None and owner.run != known:
        raise ValueError(
            f"{where} holds checkpoints of the run {owner.run}, {run}/config.yaml is of the run {known}: give this run "
            "a checkpoint.dir of its own, or go on with that one in another run.dir"
        )
    return owner


def check_nothing_elsewhere(run: Path, where: Place) -> None:
    """Raises ValueError where the run had its checkpoints in another place: from there it should go on."""
    own = run / "checkpoints"
    for before in dict.fromkeys((storage.place(saved_checkpoint_dir(run) or own), own)):
        if before != where and checkpoint.find_latest(before) is not None:
            raise ValueError(
                f"{where} holds no complete checkpoint, {before}, where this run had them, does: put checkpoint.dir "
                "back, or copy them there, or start anew in another run.dir"
            )


def restore_beside(found: checkpoint.Checkpoint, run: Path) -> None:
    """Puts the files that a checkpoint brought along into the run folder: another machine's, or older here."""
    for name in KEPT:
        data = found.read(name)
        if data is not None:
            write_atomically(run / name, data)


def order_of(config: Config, index: Index, *, trust_code: bool) -> Order | Groups:
    """Which sample comes when; trust_code: see `build_losses`.

    Raises ValueError for a global batch that data, streams or ranks do not allow.
    """
    order = build_order(config.data, index, config.run.seed)
    smallest_part = order.global_batch_size // distributed.world_size()
    if 0 < smallest_part < config.data.accumulate:  # of less than one sample a rank the reader speaks
        raise ValueError(
            f"data.accumulate {config.data.accumulate} leaves micro-batches empty: a rank has {smallest_part} "
            "samples of a step; lower it, or raise data.global_batch_size"
        )
    pairs = [name for name, loss in _embedding_losses(config, trust_code).items() if loss.compares]
    if pairs and config.data.accumulate > 1:
        raise ValueError(
            f"head.embedding_losses {', '.join(sorted(pairs))} with data.accumulate {config.data.accumulate}: samples "
            "would be compared inside a micro-batch alone; give data.accumulate=1, or, where a loss of yours looks at "
            "single samples, compares = False in its class"
        )
    return order


def check_batch_norm(config: Config, net: nn.Module, order: Order | Groups) -> None:
    """Raises ValueError where a rank has micro-batches of one sample and the backbone has batch norm: it takes two."""
    smallest = order.global_batch_size // distributed.world_size() // config.data.accumulate
    if smallest == 1 and has_batch_norm(net):
        raise ValueError(
            f"{config.backbone.name} has batch norm, which wants two samples at least, and a rank has micro-batches of "
            f"one: raise data.global_batch_size {config.data.global_batch_size}, or lower data.accumulate"
        )


def has_batch_norm(net: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def length_of(config: Config, order: Order | Groups) -> int:
    """Steps of the run."""
    return config.run.steps or max(round((config.run.epochs or 0) * order.steps_per_epoch), 1)


def schedule_cautions(config: Config, total_steps: int) -> list[str]:
    """What the run is too short for: the warm-up of the learning rate or of the margin, a milestone."""
    said, optim = [], config.optim
    if optim.warmup_steps >= total_steps:
        said.append(
            f"optim.warmup_steps {optim.warmup_steps} take the whole run of {total_steps:,} steps, in which the "
            "learning rate only rises: lower them, or train longer"
        )
    late = [milestone for milestone in optim.milestones if milestone >= total_steps]
    if late:
        said.append(f"optim.milestones {late} come after the run's {total_steps:,} steps: lower them, or train longer")
    steps = (config.head.margin.warmup or {}).get("steps", 0)
    if steps >= total_steps:
        said.append(
            f"head.margin.warmup.steps {steps:g} take the whole run of {total_steps:,} steps: lower them, or train "
            "longer"
        )
    return said


def data_cautions(config: Config, index: Index, sets: dict[str, tuple[Index, Index | None]]) -> list[str]:
    """Which evaluation sets (see `open_sets`) are the training set, or a copy of it."""
    said = []
    for name, (data, distractors) in sets.items():
        for key, one in (("data", data), ("distractors", distractors)):
            if one is not None and one.fingerprint == index.fingerprint:
                said.append(
                    f"evaluate.sets.{name}.{key} is the training set, {index.path}: its results say nothing about "
                    "other images; give a set that is not trained on"
                )
    return said


def build_losses(config: Config, trust_code: bool = True) -> tuple[Margin | WarmUp, list[EmbeddingLoss]]:
    """What the head is trained with. Raises ValueError for unknown names and parameters.

    trust_code: import what the config names as module.Class, as training does; False: an error.
    """
    margin = build_margin(config.head.margin.name, config.head.margin.parameters, trust_code=trust_code)
    return margin, [*_embedding_losses(config, trust_code).values()]


def _embedding_losses(config: Config, trust_code: bool) -> dict[str, EmbeddingLoss]:
    given = config.head.embedding_losses
    return {name: build_embedding_loss(name, its, trust_code=trust_code) for name, its in given.items()}


def own_code(config: Config) -> dict[str, str]:
    """What the config names as module.Class, by the setting that names it."""
    losses = {f"head.embedding_losses.{name}": name for name in config.head.embedding_losses}
    return {key: name for key, name in ({"head.margin.name": config.head.margin.name} | losses).items() if "." in name}


def say_what_is_imported(config: Config) -> None:
    """Prints, on rank 0, which modules a config has imported, and from where. Imports nothing."""
    for key, name in own_code(config).items() if distributed.rank() == 0 else ():
        print(f"importing {one_line(name)} from {one_line(source_of(name) or 'nowhere')}: {key} names it", flush=True)


def build_head(config: Config, num_classes: int, device: torch.device, *, trust_code: bool) -> PartialFC:
    """The head as it is initialized; trust_code: see `build_losses`. Raises ValueError for settings out of range."""
    hard = config.head.hard_negatives
    margin, embedding_losses = build_losses(config, trust_code)
    return PartialFC(
        num_classes,
        config.backbone.embedding_dim,
        margin,
        config.head.sample_rate,
        dropout=config.head.dropout,
        embedding_losses=embedding_losses,
        optimizer=_first(config.head.optim.name, config.optim.name),
        momentum=_first(config.head.optim.momentum, config.optim.momentum),
        weight_decay=_first(config.head.optim.weight_decay, config.optim.weight_decay),
        betas=_first(config.head.optim.betas, config.optim.betas),
        eps=_first(config.head.optim.eps, config.optim.eps),
        seed=config.run.seed,
        sampler=None if hard is None else HardNegatives(hard.neighbours, hard.every),
        init_std=config.head.init_std,
        chunk=config.head.chunk,
        cache_bytes=config.head.cache_bytes,
        cache_dtype=getattr(torch, config.head.cache_dtype),
        matmul_precision=config.head.matmul_precision,
        compile=config.head.compile,
        check_labels=False,  # all labels were checked when the index was loaded
        device=device,
    )


def bytes_of_a_class(
    config: Config, device: torch.device, found: checkpoint.Checkpoint | None = None, *, trust_code: bool
) -> int:
    """What a checkpoint keeps of a class: its rows, their optimizer's state, tables.

    Measured on a head with one class a rank, that nothing depends on the number of classes in. Raises ValueError for
    settings out of range, and where margin or optimizer are others than those of `found`.
    """
    small = config.head.model_copy(update={"cache_bytes": 0, "compile": False})
    with warnings.catch_warnings():  # cautions about margins are for the real number of classes
        warnings.simplefilter("ignore")
        few = config.model_copy(update={"head": small})
        head = build_head(few, distributed.world_size(), device, trust_code=trust_code)
    if found is not None:
        checkpoint.check_kinds(found, head)
    return sum(tensor.nbytes for tensor in checkpoint.state_by_class(head).values())


def head_wants(
    config: Config, num_classes: int, device: torch.device, *, trust_code: bool
) -> list[tuple[memory.Pool, int]]:
    """What this rank's head takes of which memory, at least. Before anything of it is there."""
    mine = class_range(num_classes, distributed.rank(), distributed.world_size())
    hard = config.head.hard_negatives
    of_tables = 0 if hard is None else 4 * hard.neighbours  # int32, of all classes on the host of every rank
    of_rows = (bytes_of_a_class(config, device, trust_code=trust_code) - of_tables) * len(mine)
    cache = config.head.cache_bytes
    if device.type == "cpu":  # what is not written there takes nothing
        cache = min(cache, 4 * config.data.global_batch_size * len(mine))
    wants = {device: of_rows + cache}
    cpu = torch.device("cpu")
    wants[cpu] = wants.get(cpu, 0) + of_tables * num_classes
    return [(pool, needed) for place, needed in wants.items() for pool in memory.pools(place)]


def check_memory(wants: list[tuple[memory.Pool, int]]) -> None:
    """Raises RunError, on all ranks, where the ranks together want more memory than there is. A collective."""
    short = memory.shortage(distributed.gather_objects(wants))
    if short is not None:
        raise distributed.RunError(
            f"{short}: start more ranks on more devices or machines, which share the classes out; lower "
            "backbone.embedding_dim or head.cache_bytes; take sgd in place of adamw; or allow more memory"
        )


def training_data(config: Config) -> Index:
    """The data set to train on, its labels as they are trained. Raises ValueError for a list of pairs and one class."""
    index = open_training_set(config.data, check_labels=distributed.first_of_node())
    if index.pairs is not None:
        raise ValueError(
            f"data.train: {index.path} is a list of pairs, which does not say who is who: name it in evaluate.sets, "
            "and a set of identities here"
        )
    if index.num_classes < 2:
        raise ValueError(
            f"data.train: {index.path} has one identity, {index.classes()[0]!r}: there is nothing to tell apart; "
            "wanted two or more. Where its images lie in one folder per identity, prepare the folder that holds those"
        )
    return with_label_noise(index, config.data.label_noise, config.run.seed)


def with_label_noise(index: Index, probability: float, seed: int) -> Index:
    """The data set with each label replaced, with this probability, by one of the other classes, equally likely."""
    if not probability:
        return index
    random = np.random.Generator(np.random.Philox(seed_for("label noise", seed)))
    replaced = random.random(index.num_samples) < probability
    other = (index.label + random.integers(1, index.num_classes, index.num_samples)) % index.num_classes
    return replace(index, label=np.where(replaced, other, index.label))


def _first(value: Any | None, default: Any) -> Any:
    return default if value is None else value


def micro_batch_size(config: Config) -> int:
    """The largest number of samples that any rank has in a micro-batch."""
    largest_part = -(-config.data.global_batch_size // distributed.world_size())
    return -(-largest_part // config.data.accumulate)


def micro_batch_sizes(config: Config) -> set[int]:
    """The numbers of samples that this rank's micro-batches have where all can be decoded."""
    own = len(distributed.part(config.data.global_batch_size, distributed.rank(), distributed.world_size()))
    return {len(distributed.part(own, piece, config.data.accumulate)) for piece in range(config.data.accumulate)}


def agree_on_start(config: Config, index: Index, found: checkpoint.Checkpoint | None) -> None:
    """Raises RunError, on all ranks, where they do not see the same config, data and checkpoint."""
    seen = {
        "config": config.model_dump(mode="json"),
        "data set": index.fingerprint,
        "latest checkpoint": None if found is None else found.manifest,
    }
    everyone = distributed.gather_objects(seen)
    for name in seen:
        for other, theirs in enumerate(everyone):
            if theirs[name] != everyone[0][name]:
                raise distributed.RunError(
                    f"ranks 0 and {other} see different things: {name}. All ranks must be given the same config and "
                    "see the same data.train and run.dir: put both on a shared file system, or checkpoints in an "
                    "object store (checkpoint.dir)"
                )


def check_shared(where: Place, setting: str = "run.dir", patience: float = 60.0) -> None:
    """Raises RunError, on all ranks, where one does not see the folder that checkpoints go to: not at the first save.

    setting: what says where that is. patience: seconds; a network file system may remember for so long that a folder
    was not there.
    """
    if storage.remote(where):
        return
    mark = where / distributed.gather_objects(f"seen_by_all_{secrets.token_hex(4)}")[0]
    try:
        with distributed.together("preparing the run"):
            if distributed.rank() == 0:
                make_folder(where, setting)
                mark.touch()
        with distributed.together("preparing the run"):
            deadline = time.monotonic() + patience
            while not mark.exists():
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{where} is not the folder that rank 0 sees there: put run.dir on a file system that all "
                        "ranks share, or checkpoints in an object store (checkpoint.dir)"
                    )
                time.sleep(0.1)
    finally:
        if distributed.rank() == 0:
            with suppress(OSError):  # it could not be made, of which the ranks are told
                mark.unlink()


def settings(config: Config, index: Index, progress: Progress) -> dict:
    """What a checkpoint keeps beside tensors."""
    return {
        "order": order_settings(config, index),
        "config": config.model_dump(mode="json"),
        "image_size": image_size(index),
        "progress": progress.state(),
    }


def order_settings(config: Config, index: Index) -> dict:
    """What decides which sample comes when: a resumed run must not change it unnoticed."""
    return {
        "run.seed": config.run.seed,
        "data.global_batch_size": config.data.global_batch_size,
        "data.streams": config.data.streams,
        "data.shuffle_window": config.data.shuffle_window,
        # checkpoints without these had none, and one
        "data.label_noise": config.data.label_noise or None,
        "data.samples_per_identity": None
        if config.data.samples_per_identity == 1
        else config.data.samples_per_identity,
        "data.train weights": _weights(config),
        "data set": index.fingerprint,
    }


def _weights(config: Config) -> list[float] | None:
    """Of several sets; None where all are 1."""
    weights = [one.weight for one in config.data.train] if isinstance(config.data.train, list) else []
    return weights if set(weights) - {1.0} else None


def check_unchanged(found: checkpoint.Checkpoint, config: Config, index: Index) -> None:
    """Raises ValueError if the checkpoint's classes are not the data's, or its data order is another one."""
    if found.classes() != index.classes():
        raise ValueError(
            f"{found.path} was written with other classes than {index.path}/classes.txt has: its class centers would "
            "stand for the wrong identities. Use the data it was written with, or start anew in another run.dir"
        )
    try:
        net = Backbone.model_validate(found.setting("config").get("backbone"))
    except ValidationError as error:
        raise ValueError(f"{found.path}/manifest.json: settings.config.backbone: {error}") from None
    if net != config.backbone or found.image_size() != image_size(index):
        raise ValueError(
            f"{found.path} was written with {net.name}, embedding_dim {net.embedding_dim}, images of "
            f"{list(found.image_size())} pixels; this run has {config.backbone.name}, embedding_dim "
            f"{config.backbone.embedding_dim}, {list(image_size(index))}: put it back or give another run.dir"
        )
    theirs, ours = found.setting("order"), order_settings(config, index)
    changed = [
        f"{name} was {theirs.get(name)!r}, now {value!r}" for name, value in ours.items() if theirs.get(name) != value
    ]
    if changed and not config.data.restart:
        raise ValueError(
            f"{found.path} was made with another data order: {'; '.join(changed)}. Put it back, or accept the new "
            "order from here on with data.restart=true, or start anew in another run.dir"
        )


def check_something_is_trained(found: checkpoint.Checkpoint, config: Config, total_steps: int) -> None:
    """Raises ValueError if a run at its end is started with another head or optimizer, as if it had them."""
    if found.step < total_steps:
        return
    changed = [
        change
        for change in changes(found.setting("config"), config.model_dump(mode="json"))
        if change.startswith(("head.", "optim."))
    ]
    if changed:
        raise ValueError(
            f"{found.path} is the end of this run of {total_steps} steps, so nothing would be trained with "
            f"{'; '.join(changed)}. Give another run.dir, or go on from there with more run.steps or run.epochs"
        )


def changes(before: dict, now: dict, prefix: str = "") -> list[str]:
    """What differs between two configs, as section.key: before -> now."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found


def print_summary(
    config: Config,
    index: Index,
    order: Order | Groups,
    head: PartialFC,
    total_steps: int,
    found: checkpoint.Checkpoint | None,
) -> None:
    world_size = distributed.world_size()
    compiled = ", compiled" if head.compiled else ""
    pieces = f" in {config.data.accumulate} micro-batches" if config.data.accumulate > 1 else ""
    start = "from the start" if found is None else f"from {one_line(found.path)}"
    print(
        f"{config.run.dir}: {index.num_samples:,} samples of {index.num_classes:,} identities; {world_size} ranks on "
        f"{head.device.type}, {len(head.classes):,} class centers on the first{compiled}; {config.backbone.name} in "
        f"{config.engine.precision}, {config.head.margin.name}; {total_steps:,} steps of {order.global_batch_size} "
        f"samples{pieces} ({total_steps / order.steps_per_epoch:.2f} epochs), {start}",
        flush=True,
    )
    mixed = mixing(order, index.label)
    print(f"{mixed.said()}{'; partial-fc doctor says what helps' * (mixed.share < LEAST)}", flush=True)
    for text in (index.elsewhere(), too_small(order, index.shards, index.cache)):
        if text:
            print(one_line(text), flush=True)
    _, reason = peak_rate(config.optim, order.global_batch_size)
    print(f"learning rate at its peak: {reason}", flush=True)
    if found is not None:
        for change in changes(found.setting("config"), config.model_dump(mode="json")):
            void = " (without effect: the checkpoint has it)" if change.startswith(AT_THE_START) else ""
            print(f"changed since the checkpoint: {one_line(change)}{void}", flush=True)
