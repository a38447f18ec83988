"""partial-fc doctor: all checks, in the order in which a run would fail."""

import math
from pathlib import Path

import torch

from partial_fc.build import agree_on_start, check_memory, head_wants
from partial_fc.checkpoint import Checkpoint
from partial_fc.config import Config
from partial_fc.config_file import load_config
from partial_fc.data.groups import Groups
from partial_fc.data.order import Order
from partial_fc.data.reader import image_size
from partial_fc.data.shards import Index
from partial_fc.doctor import machine, ranks, run_folder, speed
from partial_fc.doctor.sheet import Found, Sheet
from partial_fc.memory import size_text
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine
from partial_fc.parallel.engine import check_engine
from partial_fc.trackers import check_tensorboard


def doctor(
    path: Path | None, overrides: list[str], device: torch.device, seconds: float = 6.0, *, trust_code: bool = False
) -> bool:
    """Prints a line a check, on rank 0. True, on all ranks, where there is no problem. A collective.

    path: a config; None: the machines alone. seconds: of each of the two measurements of speed. trust_code: import what
    the config names as module.Class. Leaves nothing behind. Raises RunError where the ranks cannot reach each other.
    """
    sheet = Sheet()
    sheet.add("ranks", ranks.collectives(device))
    if distributed.world_size() > 1:
        sheet.add("clocks", ranks.clocks())
    ranks_here = ranks.ranks_of_this_machine()
    sheet.check("packages", machine.packages)
    sheet.check("device", machine.device_of, device)
    config = None
    if path is not None and (valid := sheet.check("config", _config, path, overrides)):
        config = valid.value
    sheet.check("cpu", machine.cpu, ranks_here, config)
    index, batch_bytes = None, 0
    if config is not None and (opened := sheet.check("data", run_folder.data_set, config)):
        index = opened.value
        batch_bytes = local_batch_size(config) * 3 * math.prod(image_size(index))
    sheet.check("shared memory", machine.shared_memory, ranks_here, config, batch_bytes)
    if index is not None:
        _run(sheet, config, index, device, ranks_here, seconds, trust_code)
    return sheet.end()


def local_batch_size(config: Config) -> int:
    """The largest number of samples of a batch that any rank has."""
    return -(-config.data.global_batch_size // distributed.world_size())


def _config(path: Path, overrides: list[str]) -> Found:
    if "=" in str(path) and not path.exists():
        raise ValueError(f"{path} stands where the config should: give CONFIG.yaml first, then section.key=value")
    config = load_config(path, overrides)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)  # as the run does
    return Found(f"{path} is valid; run.dir is {config.run.dir}", value=config)


def _run(
    sheet: Sheet,
    config: Config,
    index: Index,
    device: torch.device,
    ranks_here: int,
    seconds: float,
    trust_code: bool,
) -> None:
    """What is to be known of a run once its data set is open."""
    sheet.check("engine", _engine, config, device)
    sheet.check("images", run_folder.images, index)
    if index.hosts():
        sheet.check("stores", speed.stores, index, first_rank_only=True)
    order = sheet.check("batches", run_folder.batches, config, index, trust_code)
    if order is not None:
        sheet.check("mixing", run_folder.mixed, order.value, index, first_rank_only=True)
    length = None if order is None else sheet.check("schedule", run_folder.schedule, config, order.value)
    found = sheet.check("checkpoint", run_folder.latest_checkpoint, config, index)
    if found is not None and distributed.world_size() > 1:
        sheet.add("agreement", _agreement(config, index, found.value))
    sheet.check("evaluation sets", run_folder.evaluation_sets, config, index)
    sheet.check("margin", run_folder.margin, config, index.num_classes, trust_code)
    latest = None if found is None else found.value
    head = sheet.check("head", run_folder.head_bytes, config, index.num_classes, device, trust_code, latest)
    if head is not None:
        sheet.add("memory", _memory(config, index, device, trust_code))
    engine = sheet.check("backbone", speed.engine_of, config, index, None if order is None else order.value, device)
    if head is not None and engine is not None:
        sheet.check("disk", run_folder.disk, config, head.value, engine.value, first_rank_only=True)
    if sheet.counts["problem"]:
        sheet.add("speed", Found("not measured while there are problems"))
    else:
        rate = _speed(sheet, config, index, order.value, engine.value, ranks_here, seconds)
        if rate is not None:
            left = length.value - (0 if latest is None else latest.step)
            sheet.add("time", speed.duration(left * order.value.global_batch_size / rate, left))


def _engine(config: Config, device: torch.device) -> Found:
    check_engine(config.engine, device)
    check_tensorboard(config)
    return Found(f"{config.engine.name} works here")


def _agreement(config: Config, index: Index, found: Checkpoint | None) -> Found:
    try:
        agree_on_start(config, index, found)
    except distributed.RunError as error:  # on all ranks
        return Found(str(error), "problem")
    return Found("all ranks see the same config, data and checkpoint")


def _memory(config: Config, index: Index, device: torch.device, trust_code: bool) -> Found:
    try:
        with distributed.together("looking at the memory"):
            wants = head_wants(config, index.num_classes, device, trust_code=trust_code)
        check_memory(wants)
    except distributed.RunError as error:  # on all ranks
        return Found(str(error), "problem")
    pool, needed = max(wants, key=lambda want: want[1] / max(want[0].free, 1))
    return Found(f"class centers take {size_text(needed)} a rank of {pool.what}, {size_text(pool.free)} are available")


def _speed(
    sheet: Sheet,
    config: Config,
    index: Index,
    order: Order | Groups,
    engine: BaseEngine,
    ranks_here: int,
    seconds: float,
) -> float | None:
    """Samples/s of the run at best; None where they were not measured.

    Both measurements run on all ranks at once, as in a run, and share what the ranks share.
    """
    speed.wait_for("measuring the reader", seconds)
    reader = sheet.check("reader", speed.reader_speed, config, index, order, seconds)
    speed.wait_for("measuring the backbone", seconds)
    computed = sheet.check("step", speed.backbone_speed, config, engine, image_size(index), seconds)
    if reader is None or computed is None:
        return None
    reads, computes = zip(*distributed.gather_objects((reader.value, computed.value)), strict=True)
    spare = speed.spare_cores(config, ranks_here)
    sheet.add("speed", speed.verdict(reads, computes, config, spare, engine.device.type == "cpu"))
    return len(reads) * min(*reads, *computes)
