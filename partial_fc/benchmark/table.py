"""What partial-fc benchmark prints."""

from partial_fc.benchmark import backbone_steps
from partial_fc.benchmark.head_steps import LABELS, Cell

BASELINE_COLUMNS = {"dense": "dense", "published": "publ.", "limit": "limit", "limit-ours": "our limit"}
CLOCKS = {
    "cpu": "CPU time of the process",
    "wall": "wall time",
    "device": "device time, between CUDA events",
}


HEAD_NOTES = (
    "/x: over x's, median of the rounds' ratios. MiB: peak beyond the process, the largest rank's, and bytes "
    "a class; /state: over weight + momentum. KiB: of what a step's collectives gather or reduce. loss: of the last "
    "round; published counts a sample at most 69, and below rate 1 each draws negatives of its own",
)


def print_header(header: dict, notes: tuple[str, ...], markdown: bool) -> None:
    lines = [
        f"{header['hardware']}; torch {header['torch']}, {header['libraries']}; threads a rank: {header['threads']}",
        f"ms: {CLOCKS[header['clock']]} of a step, median of {header['rounds']} interleaved rounds, median over ranks",
        *notes,
    ]
    print(*lines, sep="  \n" if markdown else "\n")


def print_backbone(cell: backbone_steps.Cell, results: dict[str, dict], markdown: bool) -> None:
    title = f"{cell.name} D={cell.dim}, {cell.batch} images of {cell.size} x {cell.size}, {_ranks(cell.ranks)}"
    head = ["", "ms", "min-max", "wall ms", "images/s", "time/fp32", "MiB", "memory/fp32", "loss"]
    rows = [
        [
            variant,
            *_times(result),
            f"{1e3 * cell.batch / result['clocks']['wall']['median']:,.1f}",
            _ratio(result["time_ratio"]),
            "-" if result["peak"] is None else f"{result['kept'] / 2**20:,.0f} + {result['peak'] / 2**20:,.0f}",
            _ratio(result["memory_ratio"]),
            f"{result['loss']:.4f}",
        ]
        for variant, result in results.items()
    ]
    _print_table(title, head, rows, markdown)


def print_cell(cell: Cell, results: dict[str, dict], markdown: bool) -> None:
    title = (
        f"C={cell.classes:,} D={cell.dim} B={cell.batch} rate {cell.rate:g}, {cell.precision}, {_ranks(cell.ranks)}, "
        f"{cell.rows:,} rows in use a rank"
    )
    baselines = [name for name in BASELINE_COLUMNS if name in results]
    by_memory = [name for name in baselines if not name.startswith("limit")]
    head = ["", "ms", "min-max", "wall ms", *(f"/{BASELINE_COLUMNS[name]}" for name in baselines)]
    head += ["MiB", "B/class", *(f"/{BASELINE_COLUMNS[name]}" for name in by_memory), "/state"]
    head += ["collectives", "KiB", "loss"]
    rows = [_row(variant, result, baselines, by_memory) for variant, result in results.items()]
    _print_table(title, head, rows, markdown)


def print_profile(variant: str, operations: list[dict], markdown: bool) -> None:
    whole = sum(one["ms"] for one in operations)
    rows = [
        [one["operation"], f"{one['ms']:.1f}", f"{100 * one['ms'] / whole:.0f}", str(one["calls"])]
        for one in operations
    ]
    head = [f"{LABELS[variant]}, {whole:.0f} ms", "ms", "%", "calls"]
    print()
    print(_markdown(head, rows) if markdown else _plain(head, rows), flush=True)


def print_growth(growth: dict) -> None:
    first, *others = growth["classes"]
    print(f"\n{LABELS[growth['variant']]}: the same number of rows in use of more classes")
    for classes, ratio in zip(others, growth["time_ratio"][1:], strict=True):
        print(f"time at C={classes:,} / time at C={first:,}: {ratio:.2f}, wanted at most {growth['at_most']}")


def print_targets(targets: list[dict], markdown: bool) -> None:
    if not targets:
        return
    head = ["what we set out to reach", "ratio", "wanted", "measured", ""]
    rows = []
    for target in targets:
        cell, measured = Cell(**target["cell"]), target["measured"]
        title = f"C={cell.classes:,} D={cell.dim} rate {cell.rate:g}" + (
            f" {cell.ranks} ranks" if cell.ranks > 1 else ""
        )
        figures = ", ".join(f"{LABELS[name].removeprefix('ours ')} {ratio:.2f}" for name, ratio in measured.items())
        reached = "-" if not measured else "yes" if min(measured.values()) <= target["at_most"] else "NO"
        ratio = f"{target['measure']} / {target['against']}"
        rows.append([title, ratio, f"{target['at_most']:.2f}", figures or "nothing", reached])
    print()
    print(_markdown(head, rows) if markdown else _plain(head, rows), flush=True)


def _row(variant: str, result: dict, baselines: list[str], by_memory: list[str]) -> list[str]:
    memory = result["memory"]
    return [
        LABELS[variant],
        *_times(result),
        *(_ratio(result["time_ratio"].get(name)) for name in baselines),
        "-" if memory is None else f"{memory / 2**20:,.0f}",
        "-" if memory is None else f"{result['bytes_per_class']:,.0f}",
        *(_ratio(result["memory_ratio"].get(name)) for name in (*by_memory, "state")),
        str(sum(result["collectives"].values())),
        f"{result['bytes'] / 2**10:,.0f}",
        "-" if result["loss"] is None else f"{result['loss']:.4f}",
    ]


def _times(result: dict) -> list[str]:
    time = result["time"]
    return [_ms(time["median"]), f"{_ms(time['low'])}-{_ms(time['high'])}", _ms(result["clocks"]["wall"]["median"])]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _print_table(title: str, head: list[str], rows: list[list[str]], markdown: bool) -> None:
    print(f"\n**{title}**\n" if markdown else f"\n{title}")
    print(_markdown(head, rows) if markdown else _plain(head, rows), flush=True)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _plain(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
