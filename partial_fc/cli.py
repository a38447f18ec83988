"""partial-fc: one subcommand a task, what each takes."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import partial_fc
from partial_fc.parallel.process import end_with_torchrun, ended_where_nobody_reads, nobody_reads

if __name__ == "__main__":  # before torch is imported: that takes seconds, in which torchrun may end
    end_with_torchrun()

from partial_fc import commands
from partial_fc.benchmark import backbone_steps
from partial_fc.benchmark.head_steps import LABELS
from partial_fc.config_file import without_dashes
from partial_fc.export.formats import FORMATS
from partial_fc.figures import EPOCHS, NAMES
from partial_fc.files import printable
from partial_fc.prepare.folder import prepare_folder
from partial_fc.prepare.listing import prepare_list
from partial_fc.prepare.pairs import prepare_bin, prepare_pairs
from partial_fc.prepare.recordio import prepare_recordio
from partial_fc.storage import local_path, place

KEEP_DAMAGED = "take JPEGs that have lost data, too: some of their pixels are made up"
RUN = "run folder, folder of one checkpoint, or the URL of either"


def main() -> None:
    with ended_where_nobody_reads():
        try:
            arguments = _parser().parse_args(without_dashes(sys.argv[1:]))
            arguments.run(arguments)
        except KeyboardInterrupt:
            sys.exit(130)  # as a shell says it of SIGINT; what was held has been let go
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError) and nobody_reads():
                raise
            sys.exit(printable(f"error: {error}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="partial-fc",
        description="Data, checks, evaluation, reports, figures, exports, benchmarks, studies of partial_fc.",
    )
    parser.add_argument("--version", action="version", version=f"partial_fc {partial_fc.__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = subcommands.add_parser("prepare", help="turn images or fonts into shards")
    kinds = prepare.add_subparsers(required=True, metavar="KIND")

    pair = "a text with a pair a line: two image files, relative to its folder, and 1 for one identity or 0; or shards"
    for name, kind, what, source in (
        ("folder", prepare_folder, "a folder of images per identity", "SOURCE/<identity>/<images>"),
        (
            "recordio",
            prepare_recordio,
            "InsightFace's data sets, without MXNet",
            "a .rec file or a folder with train.rec; or its URL",
        ),
        ("list", prepare_list, "images named in a text", "a text with a line an image: file, identity"),
        ("bin", prepare_bin, "InsightFace's verification sets", "lfw.bin and its like; or its URL"),
        ("pairs", prepare_pairs, "a list of pairs, for verification", pair),
    ):
        images = kinds.add_parser(name, help=what)
        anywhere = {"recordio": place, "bin": place, "pairs": str}
        images.add_argument("source", type=anywhere.get(name, _path), help=source)
        images.add_argument("out", type=_path, help="new folder for the shards")
        images.add_argument(
            "--size", type=_size, metavar="HxW", help="112 or 112x96; unset: all images have one size already"
        )
        of_identities = kind in (prepare_folder, prepare_recordio, prepare_list)
        if of_identities:
            images.add_argument("--min-samples", type=int, default=1, help="leave out identities with fewer images")
            images.add_argument("--seed", type=int, default=0, help="of the samples' order")
        images.add_argument("--keep-damaged", action="store_true", help=KEEP_DAMAGED)
        of_columns = kind in (prepare_list, prepare_pairs)
        if of_columns:
            held = "image,identity" if kind is prepare_list else "image,image,same"
            images.add_argument(
                "--columns",
                type=_names,
                metavar="NAME,...",
                help=f"what the columns hold; other names are skipped; unset: {held}, or what the first line says",
            )
        images.set_defaults(
            run=commands.prepare_pairs if kind is prepare_pairs else commands.prepare_images,
            kind=kind,
            options=["size", "keep_damaged"] + ["min_samples", "seed"] * of_identities + ["columns"] * of_columns,
        )

    tars = kinds.add_parser("index", help="WebDataset shards that someone else wrote, where they lie")
    tars.add_argument("source", help="'shards/{000..099}.tar', a folder, a wildcard, or wids' list in .json")
    tars.add_argument("out", type=_path, help="new folder for the index and links to the shards")
    tars.add_argument(
        "--label", metavar="FIELD", help="cls, txt, folder, or a field of .json as person.id; unset: what is there"
    )
    tars.add_argument(
        "--last-dot", action="store_true", help="a key ends at the last dot: s2.0.png is 0.png of s2 else"
    )
    tars.add_argument("--close-gaps", action="store_true", help="number integer labels anew, without empty classes")
    tars.add_argument("--workers", type=int, metavar="N", help="shards read at a time; unset: as many as cores")
    tars.set_defaults(run=commands.prepare_index)

    shuffled = kinds.add_parser("shuffle", help="a prepared data set again, its samples in random order")
    shuffled.add_argument("source", type=place, help="folder of shards with their index, or its URL; it stays as it is")
    shuffled.add_argument(
        "out", type=place, help="new folder, or its URL; OUT.scratch takes as much as the images meanwhile"
    )
    shuffled.add_argument(
        "--scratch", type=_path, metavar="DIR", help="where OUT is a URL: takes twice as much; unset: the cache"
    )
    shuffled.add_argument("--seed", type=int, default=0, help="the order is a function of it; 0")
    shuffled.set_defaults(run=commands.prepare_shuffled)

    glyphs = kinds.add_parser("glyphs", help="characters as identities, fonts as photos")
    glyphs.add_argument(
        "source",
        type=_kind_or_path,
        help="small, medium or large (fetched), letters (no download), or a folder of fonts",
    )
    glyphs.add_argument("out", type=_path, help="new folder for train, test_seen, test_unseen and distractors")
    glyphs.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    glyphs.add_argument("--min-samples", type=int, help="faces that must draw an identity")
    glyphs.add_argument("--hold-out", type=_names, metavar="NAME,...", help="beginnings of the held-out faces' names")
    glyphs.add_argument("--ranges", type=_ranges, metavar="4E00-9FFF,...", help="code points that are identities")
    glyphs.add_argument(
        "--validation", type=float, default=0.0, metavar="SHARE", help="of the identities, for sets to tune on"
    )
    glyphs.add_argument("--identities", type=int, metavar="N", help="for training, at most; unset: all")
    glyphs.add_argument("--detail", type=int, metavar="PIXELS", help="low resolution: reduced to this, enlarged again")
    glyphs.add_argument("--blur", type=float, default=0.0, metavar="PIXELS", help="deviation of a Gaussian; unset: 0")
    glyphs.add_argument("--seed", type=int, default=0, help="of the split and the samples' order")
    glyphs.set_defaults(run=commands.prepare_glyphs)

    check = subcommands.add_parser("verify", help="compare every byte of a data set with its checksums")
    check.add_argument("data", type=_path, help="prepared data set")
    check.set_defaults(run=commands.verify_data)

    evaluate = subcommands.add_parser(
        "evaluate", help="verification and identification of a run, on all ranks of torchrun"
    )
    evaluate.add_argument("path", type=place, help=RUN)
    evaluate.add_argument(
        "--data", action="append", default=[], metavar="NAME=DIR[,DISTRACTORS]", help="instead of the run's sets"
    )
    evaluate.add_argument("--untrained", action="store_true", help="the backbone as it was initialized, too")
    evaluate.set_defaults(run=commands.evaluate)

    checks = subcommands.add_parser("doctor", help="what would go wrong in a run, on all ranks of torchrun")
    checks.add_argument("config", nargs="?", type=_path, help="unset: the machines and their network alone")
    checks.add_argument("overrides", nargs="*", metavar="section.key=value")
    _add_trust(checks)
    checks.set_defaults(run=commands.doctor)

    report = subcommands.add_parser("report", help="one HTML page about a run, or about several compared")
    report.add_argument("runs", type=_path, nargs="+", help="run folders")
    report.add_argument("--out", type=_path, help="unset: report.html in the first run folder")
    report.set_defaults(run=commands.report)

    figures = subcommands.add_parser("figures", help="the pictures of the margin-softmax papers, for any margins")
    figures.add_argument("out", type=_path, help="folder for the pictures and the page that shows them")
    figures.add_argument("--only", type=_names, metavar="NAME,...", help=f"some of {','.join(NAMES)}")
    figures.add_argument(
        "--margins",
        metavar="NAME:PARAMETER=VALUE,...;...",
        help='"cosface:margin=0.35,scale=30;my_losses.Mine"',
    )
    figures.add_argument(
        "--runs", type=place, nargs="+", default=[], metavar="RUN", help="run folders, for quality, cosines and roc"
    )
    figures.add_argument("--fashion-mnist", type=_path, metavar="DIR", help="its four files; unset: fetched (31 MB)")
    figures.add_argument("--epochs", type=int, default=EPOCHS, help=f"of the small networks; unset: {EPOCHS}")
    figures.add_argument("--format", choices=("png", "svg"), default="png")
    figures.add_argument("--seed", type=int, default=0)
    figures.set_defaults(run=commands.figures)

    export = subcommands.add_parser("export", help="a run's backbone in a folder that others can load")
    export.add_argument("path", type=place, help=RUN)
    export.add_argument("out", type=_path, help="new folder: model.safetensors, config.json, README.md")
    export.add_argument(
        "--formats", type=_names, default=["safetensors"], metavar="NAME,...", help=f"some of {','.join(FORMATS)}"
    )
    export.add_argument("--averaged", action="store_true", help="the moving average of the weights (engine.ema)")
    export.add_argument("--gallery", action="store_true", help="class centers and class names, too")
    export.add_argument("--images", type=_path, help="folder or data set to check with; unset: the run's own data")
    export.set_defaults(run=commands.export)

    embed = subcommands.add_parser("embed", help="embeddings of images into a file, on all ranks of torchrun")
    embed.add_argument("model", help=f"exported folder, owner/name on the hub, {RUN}")
    embed.add_argument("source", type=_path, help="an image, a folder of images in any layout, or a prepared data set")
    embed.add_argument(
        "out", type=_path, help="new .safetensors or .npy; what the rows are goes into a .jsonl beside it"
    )
    embed.add_argument("--batch", type=int, default=256, help="images embedded at once by a rank; unset: 256")
    embed.add_argument("--workers", type=int, default=2, help="reader processes of a rank, for a data set; unset: 2")
    embed.add_argument("--keep-damaged", action="store_true", help=KEEP_DAMAGED)
    embed.set_defaults(run=commands.embed)

    benchmark = subcommands.add_parser("benchmark", help="what a part costs, beside what it replaces")
    parts = benchmark.add_subparsers(required=True, metavar="PART")
    head = parts.add_parser("head", help="time, memory and traffic of a training step; comma lists are swept")
    head.add_argument(
        "--classes", type=_numbers(int), default=[100_000], metavar="C,...", help="numbers of classes; unset: 100000"
    )
    head.add_argument("--dim", type=_numbers(int), default=[512], metavar="D,...", help="embedding sizes; unset: 512")
    head.add_argument(
        "--batch", type=_numbers(int), default=[256], metavar="B,...", help="global batch sizes; unset: 256"
    )
    head.add_argument("--rate", type=_numbers(float), default=[1.0], metavar="R,...", help="sample rates; unset: 1")
    head.add_argument(
        "--ranks", type=_numbers(int), metavar="W,...", help="processes, started here; unset: 1, or torchrun's"
    )
    head.add_argument(
        "--preset",
        choices=("readme", "gpu", "rows"),
        help="the README's sizes, on a CPU and on a GPU; 10^5 rows of 10^6, 10^7 classes",
    )
    head.add_argument(
        "--precision",
        type=_names,
        default=["float32"],
        metavar="P,...",
        help="of the products of all variants: float32,tf32,bfloat16; unset: float32",
    )
    head.add_argument("--variants", type=_names, metavar="NAME,...", help=f"some of {','.join(LABELS)}")
    head.add_argument("--profile", action="store_true", help="also where the time of a step goes, by torch's profiler")
    _add_measuring(head)
    head.set_defaults(run=commands.benchmark_head)

    net = parts.add_parser("backbone", help="what engine options do to a training step's time and memory")
    net.add_argument("--backbone", default="iresnet18", metavar="NAME", help="as backbone.name; unset: iresnet18")
    net.add_argument("--dim", type=int, default=512, help="embedding size; unset: 512")
    net.add_argument("--size", type=int, default=112, help="height and width of the images in pixels; unset: 112")
    net.add_argument("--batch", type=int, default=32, help="global batch size; unset: 32")
    net.add_argument("--ranks", type=int, help="processes, started here; unset: 1, or torchrun's")
    net.add_argument(
        "--variants",
        type=_names,
        metavar="NAME,...",
        help=f"each one of {', '.join(backbone_steps.OPTIONS)}, or several joined by +, as bf16+channels_last; unset: "
        "all that can run here, and two that join some",
    )
    _add_measuring(net)
    net.set_defaults(run=commands.benchmark_backbone)

    sampler = parts.add_parser("sampler", help="how much of the full softmax's negatives samplers hold, in a run")
    sampler.add_argument("path", type=place, help=f"{RUN}; it stays as it is")
    sampler.add_argument(
        "--random", type=_numbers(float), default=[0.05, 0.1, 0.2], metavar="R,...", help="rates, 0.05,0.1,0.2"
    )
    sampler.add_argument(
        "--hard",
        type=_hard,
        default=[(3, 0.02), (3, 0.01), (16, 0.01)],
        metavar="K:R,...",
        help="neighbours:rate, 3:0.02,3:0.01,16:0.01",
    )
    sampler.add_argument("--batches", type=int, default=10, help="of the run's training data")
    _add_trust(sampler)
    sampler.set_defaults(run=commands.benchmark_sampler)

    stream = parts.add_parser("stream", help="how long a reader of remote shards waits at a bandwidth, and fetches")
    for name, value, unit in (
        ("samples", 60_000, "images of noise, 112 x 112, about 11 kB each in a shard"),
        ("shard-mb", 8.0, "MB of a shard"),
        ("mb-per-second", 20.0, "bandwidth of the server"),
        ("latency", 0.05, "seconds before each answer"),
        ("use", 0.8, "share of the bandwidth that the consumer wants"),
        ("cache-mb", 400.0, "MB that copies take at most"),
    ):
        stream.add_argument(f"--{name}", type=type(value), default=value, metavar="N", help=f"{unit}; {value:g}")
    stream.set_defaults(run=commands.benchmark_stream)

    large = parts.add_parser("index", help="what an index of millions costs: to open, a batch, a reader's memory")
    for name, count in (("samples", 42_500_000), ("classes", 2_000_000), ("shards", 4000), ("batch", 4096)):
        large.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"{count:,}")
    large.set_defaults(run=commands.benchmark_index)

    study = subcommands.add_parser(
        "study", help="many runs that differ in a few settings, tuned alike, and their table"
    )
    parts = study.add_subparsers(required=True, metavar="PART")
    trials = parts.add_parser("run", help="what the ledger lacks; then the table")
    trials.add_argument("plan", type=_path, help="rows, grids and seeds, as configs/study/table1.yaml")
    trials.add_argument("--ledger", type=_path, metavar="FILE", help="unset: ledger.jsonl beside the plan")
    trials.add_argument("--runs", type=_path, default=Path("runs/study"), metavar="DIR", help="unset: runs/study")
    trials.add_argument("--jobs", type=int, default=1, help="runs side by side, one core each")
    trials.add_argument("--hours", type=float, help="then runs save and stop; the same command goes on")
    trials.add_argument("--retry-failed", action="store_true", help="run those again that failed")
    trials.set_defaults(run=commands.study_run)
    table = parts.add_parser("table", help="mean and range of the seeds, and differences from the reference row")
    table.add_argument("plan", type=_path, help="a plan that was run, or is running")
    table.add_argument("--ledger", type=_path, metavar="FILE", help="unset: ledger.jsonl beside the plan")
    table.add_argument("--against", metavar="ROW", help="that all rows are compared with; unset: the plan's")
    table.add_argument("--table", choices=("plain", "markdown"), default="plain")
    table.add_argument("--picture", type=_path, metavar="FILE", help="draws it: .png or .svg")
    table.set_defaults(run=commands.study_table)
    return parser


def _path(text: str) -> Path:
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _kind_or_path(text: str) -> str:
    return text if "/" not in text else str(_path(text))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 112, or height x width as 112x96") from None


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-code", action="store_true", help="import losses that the config names as module.Class: that runs them"
    )


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks that take steps in turn have in common."""
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each variant; unset: 7")
    parser.add_argument("--threads", type=int, default=1, help="of each rank; unset: 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="unset: cpu")
    parser.add_argument("--json", type=_path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--table", choices=("plain", "markdown"), default="plain", help="unset: plain")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(kind: type) -> Callable[[str], list]:
    def numbers(text: str) -> list:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; give one, or more as 1,2") from None

    return numbers


def _hard(text: str) -> list[tuple[int, float]]:
    try:
        return [(int(neighbours), float(rate)) for neighbours, rate in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of neighbours:rate; give 3:0.02,16:0.01") from None


def _ranges(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(first, 16), int(last, 16)) for first, last in (part.split("-") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ranges; give 4E00-9FFF,3400-4DBF") from None


if __name__ == "__main__":
    main()
