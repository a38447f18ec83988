"""partial-fc benchmark backbone: what engine options do to a training step's time and memory, beside plain fp32."""

from dataclasses import asdict

import torch
from tqdm import tqdm

from partial_fc import backbone
from partial_fc.backbone.net import EmbeddingNet
from partial_fc.benchmark.backbone_steps import OPTIONS, Backbone, Cell, data, measure_memory, settings_of
from partial_fc.benchmark.compare import Measuring, begin, finish, paired, times_in_turn
from partial_fc.benchmark.ranks import on_ranks
from partial_fc.benchmark.table import print_backbone, print_header
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import check_engine

PLAIN = "fp32"
# partial-fc benchmark backbone --backbone smallnet --size 32 --variants fp16: 11 times fp32's time (torch 2.14, Zen 5)
NOT_ON_A_CPU = ("tf32", "fp16")
TOGETHER = ("bf16+channels_last", "bf16+channels_last+compile")
NOTES = (
    "a step: the backbone's forward, backward and SGD update on one random batch, without head and reader",
    "MiB: kept between steps + peak of a step, the rank's that has most. loss: of the last round; without rounding it "
    "is the same for all",
)


def benchmark_backbone(cell: Cell, variants: list[str] | None, measuring: Measuring) -> dict:
    """Measures a backbone's training step under each variant, prints a table, and returns (and writes) it as a dict.

    Time: all variants live in one process (one group of processes), and every round each makes a step, in an order
    that rotates; a ratio is the median of the rounds' ratios. Memory: a process (group) of its own for each variant.
    variants: engine options joined by +; None: all that can run. fp32 is always among them.

    Raises ValueError for unknown variants, backbones and sizes, RunError for a rank that failed.
    """
    net = _check(cell)
    device, threads = measuring.device, measuring.threads
    for variant in variants or ():
        check_engine(settings_of(variant), torch.device(device))
    speaks = distributed.rank() == 0
    compiles = variants is None or any(settings_of(variant).compile for variant in variants)
    header, compiler = begin(measuring, compiles=compiles)
    variants = _runnable(variants, device, net, compiler)
    if speaks:
        print_header(header, NOTES, measuring.markdown)
    group = [(cell, variant) for variant in variants]
    measured = times_in_turn(Backbone, data, group, header["clock"], measuring)
    plain = measured[0]
    for variant, result in zip(tqdm(variants, "memory", leave=False, disable=not speaks), measured, strict=True):
        result["time_ratio"] = paired(result, plain)
        held = on_ranks(measure_memory, cell.ranks, device, cell, variant, threads, device)
        result["kept"], result["peak"] = max(held, key=lambda rank: rank[0] + (rank[1] or 0))
        result["memory_ratio"] = None
        if result["peak"] is not None:
            result["memory_ratio"] = (result["kept"] + result["peak"]) / (plain["kept"] + plain["peak"])
    report = {"header": header, **asdict(cell), "variants": dict(zip(variants, measured, strict=True))}
    if speaks:
        print_backbone(cell, report["variants"], measuring.markdown)
    finish(report, measuring)
    return report


def _check(cell: Cell) -> EmbeddingNet:
    """Raises ValueError for names and sizes that there are not, before anything is measured; the net, without data."""
    if min(cell.size, cell.ranks) < 1:
        raise ValueError(f"--size and --ranks are {cell.size} and {cell.ranks}; both must be positive")
    if cell.batch % cell.ranks or cell.batch < 2 * cell.ranks:
        raise ValueError(f"--batch {cell.batch} on {cell.ranks} ranks; wanted equal batches of 2 images or more")
    if distributed.world_size() not in (1, cell.ranks):
        raise ValueError(
            f"got {cell.ranks} ranks in a job of {distributed.world_size()}; under torchrun leave out --ranks, or run "
            "without torchrun: the command starts its ranks itself"
        )
    with torch.device("meta"):
        return backbone.build(cell.name, cell.dim, (cell.size, cell.size))


def _runnable(variants: list[str] | None, device: str, net: EmbeddingNet, compiler: bool) -> list[str]:
    """The variants to measure, plain fp32 first: those that were asked for, or all that can run here."""
    if variants is None:
        left_out = set(NOT_ON_A_CPU) if device == "cpu" else set()
        try:
            net.checkpoint_activations()
        except AssertionError:  # what timm's models say that cannot
            left_out.add("checkpoint_activations")
        if not compiler:
            left_out.add("compile")
        variants = [variant for variant in (*OPTIONS, *TOGETHER) if not left_out & set(variant.split("+"))]
    for variant in variants:
        if settings_of(variant).compile and not compiler:
            raise ValueError(f"--variants: torch.compile finds no compiler here; leave out {variant}")
    different: dict[str, str] = {}
    for variant in (PLAIN, *variants):
        different.setdefault(settings_of(variant).model_dump_json(), variant)
    return list(different.values())
