"""What someone else made: YAML without its traps, JSON and fields that are named, sizes that are bounded."""

import json
import os
import re
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from partial_fc import storage, strict_yaml
from partial_fc.backbone import build, build_trained
from partial_fc.config_file import load_config, save_config
from partial_fc.documents import parse_json, read_bytes
from partial_fc.evaluate.evaluation_file import read_evaluation
from partial_fc.export.model import load_backbone
from partial_fc.files import one_line, sha256_of, shortened, write_atomically
from partial_fc.parallel import distributed
from partial_fc.prepare.folder import images_below
from partial_fc.report.runs import load_run
from partial_fc.schema import Document, fits
from tests.conftest import REPOSITORY
from tests.test_mutated import seal_export, write_config, write_export, write_run

# ---- YAML


def test_plain_words_and_numbers():
    text = (
        "a: 1e-4\nb: 1:30\nc: 2026-11-30\nd: 28_000\ne: 0x1f\nf: 0o17\ng: .5\nno: ~\nh: 'yes'\ni: <<\nj: [.inf, true]"
    )
    wanted = dict(a=1e-4, b="1:30", c="2026-11-30", d=28000, e=31, f=15, g=0.5, no=None, h="yes", i="<<")
    assert strict_yaml.parse(text, "f") == wanted | {"j": [float("inf"), True]}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim: {lr: 1}\nrun: {}\noptim: {power: 2}", "f, line 3: the key 'optim' is on line 1 too: make them one"),
        ("a: 010", "f, line 1: 010 is octal in YAML 1.1, decimal in 1.2"),
        ("\na: [No]", "f, line 2: No is false in YAML 1.1, text in 1.2: write false, or quote it"),
        (BOMB, "f, line 1: &a: anchors and aliases are not read: write the value out"),
        ("a: *b", "f, line 1: *b: anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "is not read: leave it out"),
        ("[" * 3000, "f, line 1: more than 32 sections or lists in each other"),
        ("- " * 3000, "f, line 1: more than 32 sections or lists in each other"),
        ("a: " + "9" * 5000, "f, line 1: 999999999999999999999999999999 is no integer of 64 bits"),
        ("a: [1", "f, line 1 is no YAML: "),
        ("a: \0", "f is no YAML: unacceptable character"),
        ("#" * 300_000, "f has 300,000 characters, wanted at most 262,144"),
    ],
    ids=range(12),
)
def test_what_surprises_or_harms_is_an_error(text, message):
    began = time.process_time()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        strict_yaml.parse(text, "f")
    assert time.process_time() - began < 5 and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "word", ["1e5", "010", "08", "0o17", "yes", "1:30", "2026-11-30", "28_000", "", "&x", "a: b", "\n"]
)
def test_what_is_written_is_read_by_both_versions(word):
    values = {"dir": word, "number": 1e-08, "list": [1.0, None, True, 3]}
    text = strict_yaml.dump(values)
    assert strict_yaml.parse(text, "f") == yaml.safe_load(text) == values
    assert text == yaml.safe_dump(values) or word in ("1e5", "010", "08", "0o17")


def test_a_config_of_a_name_like_a_number(tmp_path):
    write_config(tmp_path)
    config = load_config(tmp_path / "config.yaml", ["run.dir='1e5'", "optim.lr=1e-4"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config and config.run.dir == "1e5" and config.optim.lr == 1e-4


# ---- JSON, tensors, run folders


class Versioned(Document):
    version: int


def test_json_names_its_file():
    for data in (b"{", b"[" * 9000, b"9" * 5000, b"\xff", b'"\\ud800"'):
        with pytest.raises(ValueError, match=r"^manifest\.json is no"):
            parse_json(data, "manifest.json")


def test_only_files_of_some_size_are_read(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="large has more than 10 bytes"):
        read_bytes(tmp_path / "large", 10)
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it
    os.mkdir(tmp_path / "folder")
    os.symlink("/dev/zero", tmp_path / "zeros")
    opened = os.listdir("/proc/self/fd")
    said_of = {"pipe": "no regular file", "folder": "a folder, wanted a file", "zeros": "no regular file"}
    for name, said in said_of.items():
        for read in (lambda path: read_bytes(path, 10), sha256_of):
            with pytest.raises(ValueError, match=f"^{tmp_path}/{name} is {said}"):
                read(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path}/folder is a folder"):
        load_config(tmp_path / "folder")  # which may be a pipe
    assert os.listdir("/proc/self/fd") == opened


def test_no_more_memory_is_asked_for_than_a_file_has(tmp_path):
    (tmp_path / "small").write_bytes(b"x")
    assert read_bytes(tmp_path / "small", 10**15) == storage.read(tmp_path / "small", 10**15) == b"x"


def test_a_file_is_written_as_a_whole(tmp_path, monkeypatch):
    file, opened = tmp_path / "file", os.listdir("/proc/self/fd")
    for lasting in (False, True):
        write_atomically(file, "é\n", lasting=lasting)
        assert file.read_bytes() == "é\n".encode()
        write_atomically(file, b"\xff", lasting=lasting)
        assert file.read_bytes() == b"\xff" and os.listdir(tmp_path) == ["file"]

    def broken(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(file, "new", lasting=True)
    assert os.listdir("/proc/self/fd") == opened


@pytest.mark.parametrize("value", [[["x" * 99] * 99] * 99, {"a": [{"b": [[{"c": [1] * 9}] * 9]}] * 9}, "\x1b" * 999])
def test_what_an_error_shows_is_short(value):
    assert len(shortened(value)) <= 80 and len(one_line(str(value), 40)) <= 40
    with pytest.raises(ValueError, match=r"^f: version: got .{,80}, wanted a valid integer") as caught:
        fits(Versioned, {"version": value}, "f")
    assert "\x1b" not in str(caught.value)


def test_a_field_of_an_evaluation_is_named(tmp_path):
    write_run(tmp_path)
    file = tmp_path / "evaluation.json"
    values = json.loads(file.read_text())
    values["models"]["trained"]["P1"]["rank1"] = "high"
    del values["models"]["trained"]["P2"]["roc"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError) as caught:
        read_evaluation(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: models.trained.P1.rank1: got 'high', wanted a valid number")
    assert "models.trained.P2.roc is missing" in said
    # the same words where ranks read it together
    with pytest.raises(distributed.RunError) as together, distributed.together("reading"):
        read_evaluation(file)
    assert str(together.value) == f"reading failed: {said}"


@pytest.mark.parametrize("value, got", [("0.5", "'0.5'"), (10**200, "1000"), (True, "True"), ([1], r"\[1\]")])
def test_a_number_of_the_metrics_is_named(tmp_path, value, got):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": value}) + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=rf"metrics.jsonl, line 1: loss: got {got}.*, wanted a number or null"):
        load_run(tmp_path)


def test_errors_of_files_read_the_same_on_ranks(tmp_path):
    for error in (FileNotFoundError(2, "No such file", "there"), NotADirectoryError("x is no folder")):
        assert distributed.message(error) == str(error)
    assert distributed.message(OSError(28, "No space left")) == "OSError: [Errno 28] No space left"
    assert distributed.message(KeyError("name")) == "KeyError: 'name'"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("backbone", {"name": "smallnet", "embedding_dim": 10**12}, "backbone: got .*, wanted a name and an embedding"),
        (
            "backbone",
            {"name": "smallnet", "embedding_dim": 65536},
            r"wanted float32 \(65536, .*: the parameters are not",
        ),
        ("backbone", {"name": "iresnet200", "embedding_dim": 16}, "the parameters are not those of the iresnet200"),
        ("image_size", [65536, 65536], r"linear.weight, wanted float32 \(16, \d{7,}\)"),
        ("image_size", "32", "image_size: got '32', wanted height and width"),
        ("mean", [1, 2, float("nan")], r"mean: got \[1, 2, nan\], wanted three numbers"),
        ("std", [1, 2, 0], r"std: got \[1, 2, 0\], wanted three numbers above 0"),
        ("flip", 1, "flip: got 1, wanted true or false"),
        ("version", None, "version: got None, wanted a whole number"),
    ],
)
def test_a_field_of_an_exported_folder_is_named(tmp_path, field, value, message):
    """And what it asks for is compared with the file before memory is: 65,536 pixels a side would take 4 TB."""
    write_export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_exported_model_of_another_kind_or_none(tmp_path):
    write_export(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"linear.bias": tensors["linear.bias"].double()}, weights)
    seal_export(tmp_path)
    with pytest.raises(ValueError, match=r"got float64 \(16,\) for linear.bias, wanted float32 \(16,\)"):
        load_backbone(tmp_path)
    weights.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    seal_export(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file that can be read"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("name", ["smallnet", "iresnet18", "mobilefacenet"])
def test_trained_parameters_are_those_that_were_given(name):
    torch.manual_seed(3)
    wanted = build(name, 8, (32, 32)).state_dict()
    drawn = torch.random.get_rng_state()
    got = build_trained(name, 8, (32, 32), wanted, "f").state_dict()
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert torch.equal(drawn, torch.random.get_rng_state())


# ---- images and folders


def png_bomb(side: int) -> bytes:
    """A PNG of side x side gray pixels, all 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


DECODING = """
import resource, sys
from partial_fc.data.reader import decode
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = decode(data)
print(None if image is None else image.shape)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "setting, shape",
    [
        pytest.param("", "None", marks=pytest.mark.slow),
        pytest.param("200000000", "(12000, 12000, 3)", marks=pytest.mark.soak("mutated")),
        pytest.param("100", "None", marks=pytest.mark.soak("mutated")),
    ],
)
def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, setting, shape):
    """144 million pixels in 150 kB: 432 MB decoded, where the limit, which is a setting, lets it."""
    (tmp_path / "bomb.png").write_bytes(png_bomb(12000))
    environment = {key: value for key, value in os.environ.items() if key != "OPENCV_IO_MAX_IMAGE_PIXELS"}
    environment |= {"PYTHONPATH": str(REPOSITORY)} | ({"OPENCV_IO_MAX_IMAGE_PIXELS": setting} if setting else {})
    command = [sys.executable, "-c", DECODING, str(tmp_path / "bomb.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said, more = done.stdout.splitlines()  # of a process that has never had more: its peak tells
    assert said == shape and (int(more) < 100 << 10) == (shape == "None"), more


def test_folders_as_deep_as_it_goes(tmp_path):
    os.chdir(tmp_path)
    try:
        for _ in range(300):
            os.mkdir("d")
            os.chdir("d")
        with pytest.raises(ValueError, match="has folders more than 100 levels deep: is it the right one"):
            images_below(str(tmp_path))
    finally:
        for _ in range(300):  # pytest's own way to delete it calls itself
            os.chdir("..")
            os.rmdir("d")
        os.chdir(REPOSITORY)


def test_what_the_repository_holds_is_read():
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        assert strict_yaml.parse(path.read_text(), path) == yaml.safe_load(path.read_text()), path


def test_a_name_with_a_null_byte_is_named():
    with pytest.raises(ValueError, match=r"'a\\x00b' is no name of a file: it has a null byte"):
        read_bytes(Path("a\0b"), 100)
