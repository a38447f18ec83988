"""Files that someone else may have made, changed at random: each is read, or refused with words that name it.

A format is a line of FORMATS: a good input, which files of it are changed, and how it is read, as the command does. An
input is a function of format and seed. A failing one is printed with the command that makes and reads it again:

    python -m tests.test_mutated "a run's config.yaml" 17
"""

import gzip
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml

from partial_fc import PartialFC, checkpoint
from partial_fc.backbone import build_seeded
from partial_fc.config_file import load_config, saved_checkpoint_dir
from partial_fc.data import reader
from partial_fc.data.reader import images_in_order
from partial_fc.data.shards import load_index, verify
from partial_fc.evaluate.protocol import evaluate_sets
from partial_fc.export.gallery import write_gallery
from partial_fc.export.model import Embedder, load_backbone, open_model, save_backbone
from partial_fc.metrics import cut_back
from partial_fc.parallel.distributed import RunError
from partial_fc.parallel.engine import DDPEngine
from partial_fc.phases import NAMES as PHASES
from partial_fc.prepare.fashion_mnist import load_fashion_mnist
from partial_fc.prepare.folder import prepare_folder
from partial_fc.prepare.listing import prepare_list
from partial_fc.prepare.pairs import prepare_bin, prepare_pairs
from partial_fc.prepare.recordio import prepare_recordio
from partial_fc.prepare.tars import prepare_index
from partial_fc.report.page import write_report
from partial_fc.report.runs import load_run
from partial_fc.study.table import study_table
from tests.conftest import REPOSITORY
from tests.processes import context
from tests.test_embed import OPTIONS, backbone, write_images
from tests.test_figures import some_images, write_idx
from tests.test_prepare_folder import put

CPU_SECONDS = 20  # of an input; the slowest good one, a page with its plots, takes one
MEMORY = 1 << 30  # bytes of address space that reading an input may take beyond what the process has
WAITS = 10  # seconds after which reading what is no file is taken to wait for ever
SILENCE = 300  # seconds without a word after which a reading process is taken to hang
INPUTS = 100_000  # over all formats, in the soak part; MUTATED=0.1 in the environment makes it a tenth
QUICK = 20  # inputs of a format in `make test`


class Format(NamedTuple):
    name: str
    make: Callable[[Path], object]  # a good input in this folder
    files: tuple[str, ...]  # of it; one of them is changed
    read: Callable[[Path], object]  # as the command does
    share: float = 1.0  # of the inputs, relative to the others
    seal: Callable[[Path], object] | None = None  # puts the checksums right, or they alone would be tested


# ---- good inputs


CONFIG = {
    "run": {"steps": 5},
    "data": {"train": "train", "global_batch_size": 8, "streams": 2, "workers": 0, "affine": {"degrees": 5}},
    "backbone": {"name": "smallnet", "embedding_dim": 16},
    "head": {
        "margin": {"name": "cosface", "scale": 30, "margin": 0.2},
        "embedding_losses": {"center": {"weight": 0.1}},
    },
    "optim": {"schedule": "step", "milestones": [3, 4], "lr": 0.1},
    "evaluate": {"sets": {"seen": {"data": "seen", "note": "some"}}},
}


def write_config(folder: Path) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"environment": {"torch": "2.14.0"}}, sort_keys=False))


def config_of(folder: Path) -> None:
    load_config(folder / "config.yaml", ["run.seed=3"])


@cache
def evaluation() -> str:
    """Of real images, by an untrained backbone."""
    with TemporaryDirectory() as folder:
        index = write_images(Path(folder) / "set", identities=24, samples=3)
        found = evaluate_sets(backbone(), {"P1": (index, None), "P2": (index, None)}, batch_size=72, **OPTIONS)
    for result in found.values():
        result |= {"data": "gone", "note": "shapes"}
        result["roc"], result["cmc"] = result["roc"][:8], result["cmc"][:5]
        result["examples"] = {group: pairs[:1] for group, pairs in result["examples"].items()}
    return json.dumps({"format": "partial_fc-evaluation", "version": 2, "step": 5, "models": {"trained": found}})


def write_run(folder: Path) -> None:
    write_config(folder)
    (folder / "evaluation.json").write_text(evaluation())
    numbers = {
        "loss": 3.5,
        "lr": 0.1,
        "samples_per_second": 90.0,
        "data_wait": 0.1,
        "step_time": 0.4,
        "memory": 1 << 30,
    }
    numbers |= {"target_cosine": None, "engine.gradient_norm": 1.5} | {f"phase.{name}": 0.03 for name in PHASES}
    rows = [{"step": step, "epoch": step / 4} | numbers | {"slowest_phase": "head"} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_of(folder: Path) -> None:
    load_run(folder)
    saved_checkpoint_dir(folder)
    if (folder / "metrics.jsonl").exists():
        cut_back(folder / "metrics.jsonl", 3)


def report_of(folder: Path) -> None:
    write_report([folder], folder / "out" / "report.html")


def write_plan(folder: Path) -> None:
    base = CONFIG | {"run": {"epochs": 3}, "optim": {"lr": 0.1}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    plan = {
        "base": "base.yaml",
        "reference": "plain",
        "seeds": [1, 2],
        "tuning": {"seed": 0, "shorter": 3, "sets": {"seen": "tune"}, "grids": {"g": {"optim.lr": [0.1, 0.2, 0.3]}}},
        "rows": {"plain": {"head.margin.margin": 0.1, "grid": "g"}, "more": {"head.margin.margin": 0.3}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    data = {name: [f"sum of {name}", 100] for name in ("train", "seen", "tune")}
    entry = {"status": "done", "data": data, "seconds": 9.0, "commit": "0123456789", "device": "cpu"}
    result = {"tar_at_far": {"0.0001": 0.4}, "dir_at_far": {"0.01": 0.3}, "rank1": 0.8}
    lines = [entry | {"digest": digest, "result": {"seen": result}} for digest in digests(folder / "plan.yaml", data)]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def digests(file: Path, data: dict) -> list[str]:
    """Of the trials of the first row's tuning and seeds, so that the table has something to show."""
    from partial_fc.study.plan import load_plan

    plan = load_plan(file, data)
    trials = [trial for row in plan.rows for trial in plan.tuning_trials(row)]
    return [trial.digest for trial in [*trials, *plan.final_trials(plan.rows[0], trials[0].tuned)]]


def table_of(folder: Path) -> None:
    study_table(folder / "plan.yaml", folder / "ledger.jsonl")


def write_export(folder: Path) -> None:
    net = build_seeded("smallnet", 16, (32, 32), seed=0)
    mean, std = [127.5] * 3, [128.0] * 3
    described = {"name": "smallnet", "embedding_dim": 16}
    config = {"format": "partial_fc-backbone", "version": 1, "backbone": described, "image_size": [32, 32]}
    config |= {"mean": mean, "std": std, "flip": False, "weights": "trained", "step": 3}
    save_backbone(Embedder(net, mean, std, False, config), folder)


def seal_export(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def write_photos(folder: Path) -> None:
    for number, kind in enumerate(("jpg", "png", "webp", "bmp", "tiff", "ppm")):
        put(folder / "photos" / f"person {number % 2}" / f"{number}.{kind}", number)
    put(folder / "photos" / "person 2" / "whole.jpg", 99)


def photos_of(folder: Path) -> None:
    prepare_folder(folder / "photos", folder / "out", size=(16, 12))


def write_list(folder: Path) -> None:
    write_photos(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    (folder / "list.txt").write_text("".join(f'"{name}",identity {place % 2}\n' for place, name in enumerate(names)))


def write_pairs(folder: Path) -> None:
    write_photos(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    lines = [f"{one}\t{other}\t{place % 2}\n" for place, (one, other) in enumerate(zip(names, names[1:], strict=False))]
    (folder / "pairs.txt").write_text("".join(lines))


def write_bin(folder: Path) -> None:
    """Twice: plain, and with arrays of NumPy's."""
    images = [put(folder / f"{number}.png", number, (16, 12)) for number in range(6)]
    same = [True, False, True]
    (folder / "plain.bin").write_bytes(pickle.dumps((images, same), protocol=2))
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    (folder / "arrays.bin").write_bytes(pickle.dumps((arrays, np.array(same)), protocol=4))


def bins_of(folder: Path) -> None:
    for name in ("plain", "arrays"):
        prepare_bin(folder / f"{name}.bin", folder / "out" / name)


def write_fashion(folder: Path) -> None:
    for name, array in zip(("images-idx3", "labels-idx1"), some_images(20, 0), strict=True):
        write_idx(folder / f"train-{name}-ubyte.gz", array)
    unpacked = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    (folder / "train-labels-idx1-ubyte").write_bytes(unpacked)


def write_set(folder: Path) -> None:
    write_images(folder / "set", identities=6, samples=2)


def samples_of(folder: Path) -> None:
    """Opened and read as `embed`, an evaluation and a report do; without the pauses before another try."""
    index = load_index(folder / "set")
    index.classes()
    with patch.object(reader, "RETRY_SECONDS", ()):
        for batch in images_in_order(index, np.arange(min(index.num_samples, 32)), 8, 0):
            [index.key(sample) for sample in range(len(batch.images))]


def write_list_of_pairs(folder: Path) -> None:
    (folder / "source").mkdir()
    write_pairs(folder / "source")
    with redirect_stdout(None):
        prepare_pairs(folder / "source" / "pairs.txt", folder / "set", size=(16, 16))


def seal_set(folder: Path) -> None:
    """The checksums of the arrays and of classes.txt in index.json, where that still has such."""
    file = folder / "set" / "index.json"
    described = json.loads(file.read_text())
    sums = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "set" / "index").iterdir()}
    described |= {f"{name}_sha256": value for name, value in sums.items() if f"{name}_sha256" in described}
    described["arrays"] = {name: sums[name] for name in described["arrays"]}
    described["classes_sha256"] = hashlib.sha256((folder / "set" / "classes.txt").read_bytes()).hexdigest()
    file.write_text(json.dumps(described))


def verified_of(folder: Path) -> None:
    samples_of(folder)
    verify(load_index(folder / "set"))


def write_checkpoint(folder: Path) -> None:
    (folder / "classes.txt").write_text("".join(f"person {number}\n" for number in range(12)))
    (folder / "wanted.yaml").write_text(yaml.safe_dump(CONFIG))
    config = load_config(folder / "wanted.yaml")
    net = build_seeded("smallnet", 16, (32, 32), seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    engine = DDPEngine(net, optimizer, torch.device("cpu"))
    settings = {"order": {}, "config": config.model_dump(mode="json"), "image_size": [32, 32], "progress": {}}
    head = PartialFC(12, 16, sample_rate=0.5)
    checkpoint.save(
        folder / "run", 5, head=head, engine=engine, classes=folder / "classes.txt", settings=settings, keep=1
    )
    part = next((folder / "run" / "checkpoints" / "step_00000005").glob("centers_*"))
    assert part.name == CENTERS


STEP = "run/checkpoints/step_00000005"
CENTERS = "centers_000000000000_000000000012.safetensors"


def checkpoint_of(folder: Path) -> None:
    """As `export --gallery` reads it."""
    found = checkpoint.find_checkpoint(folder / "run")
    open_model(folder / "run")
    found.classes()
    (folder / "out").mkdir()
    write_gallery(found, folder / "out")


def seal_checkpoint(folder: Path) -> None:
    manifest = json.loads((folder / STEP / "manifest.json").read_text())
    for entry in manifest["files"]:
        data = (folder / STEP / entry["name"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / STEP / "manifest.json").write_text(json.dumps(manifest))


RECORDS = REPOSITORY / "tests" / "insightface.rec"
ARRAYS = tuple(f"set/index/{name}.npy" for name in ("shard", "offset", "size", "label", "crc32", "name", "name_offset"))

FORMATS = [
    Format("a config", write_config, ("config.yaml",), config_of, 2),
    Format("a run's config.yaml", write_run, ("config.yaml",), run_of),
    Format("a run's metrics.jsonl", write_run, ("metrics.jsonl",), run_of, 2),
    Format("a run's evaluation.json", write_run, ("evaluation.json",), run_of, 2),
    Format("a report", write_run, ("config.yaml", "metrics.jsonl", "evaluation.json"), report_of, 0.1),
    Format("a study", write_plan, ("plan.yaml", "base.yaml", "ledger.jsonl"), table_of),
    Format("an exported config.json", write_export, ("config.json",), lambda f: load_backbone(f), 2),
    Format("an exported model", write_export, ("model.safetensors",), lambda f: load_backbone(f), 2, seal_export),
    Format("images", write_photos, tuple(f"photos/person {n % 2}/{n}.{kind}" for n, kind in enumerate(
        ("jpg", "png", "webp", "bmp", "tiff", "ppm"))), photos_of, 2),
    Format("a list", write_list, ("list.txt",), lambda f: prepare_list(f / "list.txt", f / "out", size=(16, 12))),
    Format("pairs", write_pairs, ("pairs.txt",), lambda f: prepare_pairs(f / "pairs.txt", f / "out", size=(16, 12))),
    Format("a .bin", write_bin, ("plain.bin", "arrays.bin"), bins_of, 2),
    Format("a .rec", lambda f: shutil.copy(RECORDS, f / "a.rec"), ("a.rec",),
        lambda f: prepare_recordio(f / "a.rec", f / "out"), 2),
    Format("Fashion-MNIST", write_fashion, ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
        load_fashion_mnist),
    Format("shards", write_set, ("set/shard-000000.tar",), samples_of, 2),
    Format("shards of others", write_set, ("set/shard-000000.tar",),
        lambda f: prepare_index(str(f / "set" / "shard-000000.tar"), f / "out", workers=1), 2),
    Format("index.json", write_set, ("set/index.json",), samples_of, 2),
    Format("index arrays", write_set, (*ARRAYS, "set/classes.txt"), samples_of, 2, seal_set),
    Format("pairs of a data set", write_list_of_pairs, ("set/index/pairs.npy",), verified_of, 1, seal_set),
    Format("a checkpoint's manifest", write_checkpoint, (f"{STEP}/manifest.json",), checkpoint_of, 2),
    Format("a checkpoint's tensors", write_checkpoint, tuple(f"{STEP}/{name}" for name in (
        "backbone.safetensors", "history.safetensors", CENTERS)), checkpoint_of, 2, seal_checkpoint),
]  # fmt: skip
BY_NAME = {one.name: one for one in FORMATS}


# ---- what is changed


DEEP = "nested as deep as it goes"  # stands for 5,000 lists in each other, which json does not write
VALUES = [None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, -0.5, 1e308, math.nan, math.inf, "", "x", "\0",
    "\ud800", "../../etc/passwd", "/etc/passwd", "é" * 300, "1", [], {}, [[]], {"": None}, DEEP]  # fmt: skip
WORDS = [b"", b"0", b"-1", b"1e400", b"99999999999999999999", b"010", b"yes", b"null", b"{}", b"[]", b"[" * 3000,
    b"&a ", b"*a", b"!!python/name:os.system", b"'", b'"', b":", b"\t", b"\x00", b"\xff\xfe", b"\xf0\x9f\x98\x80",
    b"~", b"- " * 99, b"2147483648", b".inf", b"a" * 5000, b"../x", b"%YAML 1.1\n", b"? ", b",", b"1:30",
    b"9" * 5000]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some change: of a value where it is JSON, lines of it, YAML or safetensors; else, and at times, of bytes."""
    if rng.random() < 0.6:
        head, text, tail = in_parts(data, rng)
        values = parsed(text)
        if isinstance(values, dict | list):
            for _ in range(rng.choice((1, 1, 2, 4))):
                values = change_value(values, rng)
            new = json.dumps(values).replace(json.dumps(DEEP), "[" * 5000 + "]" * 5000).encode()
            return (len(new).to_bytes(8, "little") if len(head) == 8 else head) + new + tail
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = rng.choice(CHANGES)(data, rng)
    return data


@lru_cache
def yaml_of(text: bytes) -> str:
    return json.dumps(yaml.safe_load(text))


def parsed(text: bytes) -> object:
    """JSON, or YAML of sections, which then becomes JSON; None for anything else."""
    try:
        return json.loads(text)
    except ValueError:
        if not re.match(rb"\w+:", text):
            return None
    try:
        return json.loads(yaml_of(text))
    except (ValueError, yaml.YAMLError):
        return None


def in_parts(data: bytes, rng: random.Random) -> tuple[bytes, bytes, bytes]:
    """What is before a JSON text, the text, what is behind it: all of a file, a line of it, a safetensors header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) > 8 and data[8:9] == b"{" and length <= len(data) - 8:
        return data[:8], data[8 : 8 + length], data[8 + length :]
    if data.startswith(b"{") and data.count(b"\n{"):
        lines = data.splitlines(keepends=True)
        place = rng.randrange(len(lines))
        return b"".join(lines[:place]), lines[place].rstrip(b"\n"), b"\n" + b"".join(lines[place + 1 :])
    return b"", data, b""


def change_value(values: dict | list, rng: random.Random) -> dict | list:
    places = []

    def walk(container: dict | list) -> None:
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                walk(container[key])

    walk(values)
    if not places:
        return rng.choice([{}, [], {"": values}])
    container, key = rng.choice(places)
    what = rng.randrange(8)
    if what == 0:
        del container[key]
    elif what == 1:
        other, its = rng.choice(places)
        container[key] = json.loads(json.dumps(other[its])) if its in other or isinstance(other, list) else None
    elif what == 2:
        container[key] = [container[key]]
    elif what == 3 and isinstance(container, dict):
        container[rng.choice(["", "x", "name", key + "_"])] = container.pop(key)
    elif what == 4 and isinstance(container[key], int | float):
        container[key] = rng.choice([container[key] + 1, -container[key], container[key] * 1000, str(container[key])])
    elif what == 5 and isinstance(container[key], list):
        container[key] *= rng.choice([2, 100])
    else:
        container[key] = rng.choice(VALUES)
    return values


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) or 1)
    return data[:place] + bytes(one ^ 1 << rng.randrange(8) for one in data[place : place + 1]) + data[place + 1 :]


def flip_early_bit(data: bytes, rng: random.Random) -> bytes:
    """In the first bytes, where headers are."""
    return flip_bit(data[:64], rng) + data[64:]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def take_out(data: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
    return data[:place] + data[place + length :]


def zero(data: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 100))
    return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]


def put_number(data: bytes, rng: random.Random) -> bytes:
    """Of 2, 4 or 8 bytes, at a place where one may be."""
    size = rng.choice((2, 4, 8))
    number = rng.choice((0, 1, -1, 1 << 8 * size - 1, (1 << 8 * size) - 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 2))
    word = (number % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
    place = rng.randrange(min(len(data), rng.choice((64, 1 << 30))) + 1)
    return data[:place] + word + data[place + size :]


def double(data: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(data) + 1), rng.choice((1, 16, 1000))
    return data[: place + length] + data[place:]


def put_word(data: bytes, rng: random.Random) -> bytes:
    """In the place of one, or between two."""
    start = rng.randrange(max(len(data) - 1000, 1))
    words = list(re.compile(rb"[\w.+-]+|[^\w\s]").finditer(data, start, start + 1000))
    if not words:
        return rng.choice(WORDS)
    found = rng.choice(words)
    word = rng.choice(words).group() if rng.random() < 0.3 else rng.choice(WORDS)
    return data[: found.start()] + word + data[found.end() if rng.random() < 0.7 else found.start() :]


def change_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if lines:
        place = rng.randrange(len(lines))
        what = rng.randrange(4)
        if what == 0:
            del lines[place]
        elif what == 1:
            lines.insert(rng.randrange(len(lines)), lines[place])
        elif what == 2:
            lines[place] = b" " * rng.randrange(1, 5) + lines[place]
        else:
            rng.shuffle(lines)
    return b"".join(lines)


CHANGES = [flip_bit, flip_early_bit, cut, take_out, zero, put_number, double, put_word, put_word, change_lines]


# ---- one input


class TooSlow(BaseException):
    """No Exception: nobody shall catch it."""


@contextmanager
def limits() -> Iterator[None]:
    """CPU_SECONDS and MEMORY for the body."""

    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"more than {CPU_SECONDS} s of CPU")

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


def replay(form: Format, seed: int) -> str:
    return f'python -m tests.test_mutated "{form.name}" {seed}'


def make(form: Format, folder: Path) -> None:
    """The good input, read once: what it needs is imported then."""
    good = folder / "good"
    good.mkdir()
    form.make(good)
    shutil.copytree(good, folder / "input")
    if form.seal is not None:
        form.seal(folder / "input")
    form.read(folder / "input")


def read_changed(form: Format, seed: int, folder: Path) -> str:
    """'accepted' or 'refused'; raises what a reader must not."""
    work = folder / "input"
    rng = random.Random(f"{form.name} {seed}")
    changed = rng.choice(form.files)
    shutil.rmtree(work)
    shutil.copytree(folder / "good", work)
    (work / changed).write_bytes(mutated((work / changed).read_bytes(), rng))
    if form.seal is not None:
        form.seal(work)
    try:
        with limits():
            form.read(work)
    except (ValueError, OSError, RunError) as error:  # what the commands say in one line
        if isinstance(error, FloatingPointError | UnicodeError) or str(work) not in str(error):
            raise AssertionError(f"an error that does not name the file: {type(error).__name__}: {error}") from error
        return "refused"
    return "accepted"


def put_no_file(path: Path, kind: str) -> None:
    """A folder, a pipe that nobody writes to, or a device without an end in a file's place."""
    path.unlink(missing_ok=True)
    {"folder": os.mkdir, "pipe": os.mkfifo, "zeros": lambda place: os.symlink("/dev/zero", place)}[kind](path)


@pytest.mark.parametrize("form", [form for form in FORMATS if form.share >= 1], ids=lambda form: form.name)
@pytest.mark.parametrize("kind", ["folder", "pipe", "zeros"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_file_is_refused_with_words(form, kind, tmp_path):
    """Each file of the format in turn; an alarm, because what waits takes no time of a CPU."""
    form.make(tmp_path)

    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"it waits for {file}")

    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for file in form.files:
            if (form.name, kind) == ("a config", "pipe"):
                continue  # as `<(command)`: one waits for it
            place = tmp_path / file
            place.rename(tmp_path / "aside")
            put_no_file(place, kind)
            signal.alarm(WAITS)
            try:
                with limits():
                    form.read(tmp_path)
            except (ValueError, OSError, RunError) as error:  # what the commands say in one line
                assert str(tmp_path) in str(error), error
            finally:
                signal.alarm(0)
            place.rmdir() if kind == "folder" else place.unlink()
            (tmp_path / "aside").rename(place)
            for made in ("out", "set.partial"):
                shutil.rmtree(tmp_path / made, ignore_errors=True)
    finally:
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("form", [form for form in FORMATS if form.share >= 1], ids=lambda form: form.name)
@pytest.mark.filterwarnings("ignore")
def test_a_changed_file_is_read_or_refused_with_words(form, tmp_path):
    make(form, tmp_path)
    said = Counter()
    for seed in range(QUICK):
        try:
            said[read_changed(form, seed, tmp_path)] += 1
        except BaseException as error:
            raise AssertionError(f"again with: {replay(form, seed)}") from error
    assert said["refused"] + said["accepted"] == QUICK


# ---- many inputs, in a process that may crash


def read_many(form: Format, seeds: range, folder: str, connection) -> None:
    """The child: says each seed before it is read and what came of it."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(folder)
    if not (path / "good").exists():
        make(form, path)
    for seed in seeds:
        connection.send((seed, None))
        try:
            said = read_changed(form, seed, path)
        except BaseException:
            said = traceback.format_exc(limit=-4)
        connection.send((seed, said))
    connection.close()


def soak(form: Format, count: int, folder: Path) -> tuple[Counter, list[str]]:
    """What came of the seeds below `count`, and of each that failed how to see it again and why."""
    said, failures, start = Counter(), [], 0
    while start < count and len(failures) < 20:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=read_named, args=(form.name, range(start, count), str(folder), theirs))
        child.start()
        theirs.close()
        seed = start
        why = "the process died"
        try:
            while True:
                if not ours.poll(SILENCE):
                    why = f"no word for {SILENCE} s: it hangs"
                    break
                seed, word = ours.recv()
                if word in ("accepted", "refused"):
                    said[word] += 1
                elif word is not None:
                    failures.append(f"{replay(form, seed)}\n{word}")
        except EOFError:
            pass
        child.kill() if child.is_alive() and why != "the process died" else child.join()
        child.join()
        start = seed + 1
        if start < count or child.exitcode:
            failures.append(f"{replay(form, seed)}\n{why}, exit code {child.exitcode}")
    return said, failures


def read_named(name: str, seeds: range, folder: str, connection) -> None:
    read_many(BY_NAME[name], seeds, folder, connection)


@pytest.mark.soak("mutated")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_many_changed_files(form, tmp_path, record_property):
    total = INPUTS * float(os.environ.get("MUTATED", 1))
    count = math.ceil(total * form.share / sum(one.share for one in FORMATS))
    said, failures = soak(form, count, tmp_path)
    figures = f"{count:,} tried, {said['refused']:,} refused with words, {said['accepted']:,} accepted"
    record_property("figures", f"{form.name}: {figures}, {len(failures)} failed")
    assert not failures, "\n\n".join(failures)
    assert said["refused"] + said["accepted"] == count


def main() -> None:
    name, seed = sys.argv[1], int(sys.argv[2])
    with TemporaryDirectory() as folder:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            make(BY_NAME[name], Path(folder))
        print(read_changed(BY_NAME[name], seed, Path(folder)))


if __name__ == "__main__":
    main()
