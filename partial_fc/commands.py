"""What each subcommand of partial-fc does, given its parsed arguments.

What draws is imported where it is needed: --help should not wait for matplotlib.
"""

import argparse
import sys
from pathlib import Path

from partial_fc import storage
from partial_fc.benchmark import backbone, backbone_steps, head, sampler, stream
from partial_fc.benchmark.compare import Measuring
from partial_fc.benchmark.index import benchmark_index as measure_index
from partial_fc.config import EvaluationSet
from partial_fc.data.shards import LEFT_OUT, load_index, verify
from partial_fc.doctor import run as doctor_run
from partial_fc.evaluate.runs import can_be_kept, evaluate_run
from partial_fc.export.embed import embed_images
from partial_fc.export.run import export_run
from partial_fc.parallel import distributed
from partial_fc.prepare import glyphs, shuffle, tars
from partial_fc.prepare.pairs import prepare_pair_tars
from partial_fc.prepare.tar_places import names_shards
from partial_fc.storage import local_path
from partial_fc.study import table
from partial_fc.study.run import default_ledger, run_study


def prepare_images(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in arguments.options}
    arguments.kind(arguments.source, arguments.out, **options)


def prepare_pairs(arguments: argparse.Namespace) -> None:
    source = arguments.source
    if not names_shards(source):
        arguments.source = Path(source)
        return prepare_images(arguments)
    if arguments.columns:
        raise ValueError(f"got --columns for the shards {source}, wanted none: a text has columns")
    options = {name: getattr(arguments, name) for name in ("size", "keep_damaged")}
    prepare_pair_tars(source, arguments.out, **options)


def prepare_index(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in ("label", "last_dot", "close_gaps", "workers")}
    tars.prepare_index(arguments.source, arguments.out, **options)


def prepare_shuffled(arguments: argparse.Namespace) -> None:
    made = shuffle.prepare_shuffled(arguments.source, arguments.out, seed=arguments.seed, scratch=arguments.scratch)
    print(f"{arguments.out}: {made.num_samples:,} samples of {made.num_classes:,} identities in random order")


def prepare_glyphs(arguments: argparse.Namespace) -> None:
    indexes = glyphs.prepare_glyphs(
        arguments.source,
        arguments.out,
        min_samples=arguments.min_samples,
        size=arguments.size,
        seed=arguments.seed,
        ranges=arguments.ranges,
        hold_out=arguments.hold_out,
        validation=arguments.validation,
        identities=arguments.identities,
        detail=arguments.detail,
        blur=arguments.blur,
    )
    for name, index in indexes.items():
        print(f"{arguments.out / name}: {index.num_samples:,} samples of {index.num_classes:,} identities")
    dropped = next(iter(indexes.values())).prepared["dropped"]
    counts = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
    see = f"; all are named in {arguments.out / LEFT_OUT}" if counts else ""
    print(f"left out: {counts}{see}")


def verify_data(arguments: argparse.Namespace) -> None:
    index = load_index(arguments.data, check_labels=False)  # verify names all that is damaged
    verify(index)
    print(
        f"{index.path}: {index.num_samples:,} samples of {index.num_classes:,} identities in "
        f"{len(index.shard_names):,} shards: every file is as it was prepared"
    )


def evaluate(arguments: argparse.Namespace) -> None:
    sets = {}
    for text in arguments.data:
        name, equals, folders = text.partition("=")
        if not equals:
            name, folders = Path(text.partition(",")[0]).name, text
        data, _, distractors = folders.partition(",")
        for folder in filter(None, (data, distractors)):
            local_path(folder)  # said in one line
        if name in sets:
            raise ValueError(f"--data: two sets are called {name}: give NAME=DIR")
        sets[name] = EvaluationSet(data=data, distractors=distractors or None)
    with distributed.job() as device:
        evaluate_run(arguments.path, device, sets=sets or None, untrained=arguments.untrained)
        with distributed.together("writing the report again"):
            page_here = not storage.remote(arguments.path) and can_be_kept(arguments.path)
            if distributed.rank() == 0 and page_here:
                from partial_fc.report.page import renew_report

                if said := renew_report(arguments.path):
                    print(said)


def doctor(arguments: argparse.Namespace) -> None:
    with distributed.job(timeout_seconds=60) as device:
        fine = doctor_run.doctor(arguments.config, arguments.overrides, device, trust_code=arguments.trust_code)
    if not fine:
        sys.exit(1)


def report(arguments: argparse.Namespace) -> None:
    from partial_fc.report.page import write_report

    out = arguments.out or arguments.runs[0] / "report.html"
    write_report(arguments.runs, out)
    print(f"report: {out}")


def figures(arguments: argparse.Namespace) -> None:
    from partial_fc.figures.draw import draw_figures

    draw_figures(
        arguments.out,
        only=arguments.only,
        margins=arguments.margins,
        runs=arguments.runs,
        fashion_mnist=arguments.fashion_mnist,
        seed=arguments.seed,
        epochs=arguments.epochs,
        format=arguments.format,
    )
    print(f"page: {arguments.out / 'index.html'}")


def export(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in ("averaged", "gallery", "images")}
    export_run(arguments.path, arguments.out, arguments.formats, **options)


def embed(arguments: argparse.Namespace) -> None:
    with distributed.job() as device:
        embed_images(
            arguments.model,
            arguments.source,
            arguments.out,
            device,
            batch_size=arguments.batch,
            workers=arguments.workers,
            keep_damaged=arguments.keep_damaged,
        )


def _measuring(arguments: argparse.Namespace) -> Measuring:
    markdown = arguments.table == "markdown"
    return Measuring(arguments.rounds, arguments.threads, arguments.device, arguments.json, markdown)


def benchmark_head(arguments: argparse.Namespace) -> None:
    with distributed.job():
        ranks = arguments.ranks or [distributed.world_size()]
        sizes = (arguments.classes, arguments.dim, arguments.batch, arguments.rate, ranks, arguments.precision)
        presets = {"readme": head.README, "gpu": head.GPU, "rows": head.ROWS}
        head.benchmark_head(
            list(presets[arguments.preset]) if arguments.preset else head.sweep(*sizes),
            arguments.variants,
            _measuring(arguments),
            targets=head.TARGETS if arguments.preset == "readme" else (),
            growth=arguments.preset == "rows",
            profile=arguments.profile,
        )


def benchmark_backbone(arguments: argparse.Namespace) -> None:
    with distributed.job():
        backbone.benchmark_backbone(
            backbone_steps.Cell(
                arguments.backbone,
                arguments.dim,
                arguments.size,
                arguments.batch,
                distributed.world_size() if arguments.ranks is None else arguments.ranks,
            ),
            arguments.variants,
            _measuring(arguments),
        )


def benchmark_sampler(arguments: argparse.Namespace) -> None:
    with distributed.job() as device:
        sampler.benchmark_sampler(
            arguments.path,
            device,
            random=arguments.random,
            hard=arguments.hard,
            batches=arguments.batches,
            trust_code=arguments.trust_code,
        )


def benchmark_stream(arguments: argparse.Namespace) -> None:
    names = ("samples", "shard_mb", "mb_per_second", "latency", "use", "cache_mb")
    stream.benchmark_stream(**{name: getattr(arguments, name) for name in names})


def benchmark_index(arguments: argparse.Namespace) -> None:
    measure_index(**{name: getattr(arguments, name) for name in ("samples", "classes", "shards", "batch")})


def study_run(arguments: argparse.Namespace) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # hours long, and mostly into a file
    finished = run_study(
        arguments.plan,
        ledger_file=arguments.ledger,
        runs=arguments.runs,
        jobs=arguments.jobs,
        hours=arguments.hours,
        retry_failed=arguments.retry_failed,
    )
    print(table.study_table(arguments.plan, arguments.ledger or default_ledger(arguments.plan)))
    if not finished:
        sys.exit(2)


def study_table(arguments: argparse.Namespace) -> None:
    if arguments.ledger is not None and not arguments.ledger.exists():
        raise ValueError(
            f"--ledger: {arguments.ledger} does not exist: give that of a study that was run, or leave it out for "
            f"{default_ledger(arguments.plan)}"
        )
    file = arguments.ledger or default_ledger(arguments.plan)
    print(table.study_table(arguments.plan, file, arguments.table == "markdown", arguments.against))
    if arguments.picture is not None:
        from partial_fc.study import picture

        picture.draw_study(table.load_lines(arguments.plan, file, arguments.against), arguments.picture)
        print(f"picture: {arguments.picture}")
