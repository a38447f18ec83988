"""What SECURITY.md promises of names, checkpoints and code that come from somebody else; and whose checkpoints are."""

import http.server
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from partial_fc import checkpoint, checkpoint_files, commands, manifest, storage
from partial_fc.backbone import build_seeded
from partial_fc.build import build_losses, order_of, restore_beside, say_what_is_imported
from partial_fc.checkpoint_files import Owner
from partial_fc.cli import main
from partial_fc.config import EvaluationSet
from partial_fc.data.shards import load_index
from partial_fc.evaluate.runs import evaluate_run
from partial_fc.export.gallery import write_gallery
from partial_fc.files import one_line, plain_name, printable, sha256_of
from partial_fc.folder_lock import FolderLock
from partial_fc.head.named import source_of
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import DDPEngine
from partial_fc.study.plan import load_plan
from partial_fc.train import the_only_one_in
from tests.conftest import REPOSITORY, run_ranks
from tests.test_checkpoint import CLASSES, NAMES, load_here, save_here, trained
from tests.test_mutated import mutated, put_no_file
from tests.test_train import config_for, rows, train_here

CPU = torch.device("cpu")
US, THEM = Owner("0" * 15 + "1"), Owner("0" * 15 + "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with a checkpoint of step 5; copy it."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    save_here(run)
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def folder_of(run: Path, step: int = 5) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def values_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder: Path, **changes: object) -> dict:
    """The manifest with `changes`; ... takes a field away."""
    values = {name: value for name, value in (values_of(folder) | changes).items() if value is not ...}
    (folder / "manifest.json").write_text(json.dumps(values))
    return values


def save_at(run: Path, step: int, owner: Owner | None = None, **options) -> None:
    head, engine = trained(steps=0)
    (run / "names.txt").write_text("".join(NAMES))
    options = {"settings": {}, "keep": 1, **options}
    checkpoint.save(run, step, head=head, engine=engine, classes=run / "names.txt", owner=owner, **options)


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def test_every_promise_names_a_test_that_is_there():
    """`test_file.py -k "word or word"`: each word is in the name of a test of that file, or of its parameters."""
    text = (REPOSITORY / "SECURITY.md").read_text()
    promises = text.partition("## Promised")[2].partition("## Not promised")[0]
    named = re.findall(r"`(test_\w+\.py) -k (\w+|\"[\w ]+\")`", promises)
    assert len(named) >= promises.count("\n- ") > 10
    for file, words in named:
        source = (REPOSITORY / "tests" / file).read_text()
        tests = " ".join(re.findall(r"def (test_\w+)", source)) + str(re.findall(r"DOORS = \{.*?\n\}", source, re.S))
        assert all(word in tests for word in words.strip('"').split(" or ")), (file, words)


def test_arrays_are_read_without_pickle_and_nothing_else_could_unpickle():
    """prepare/bin_file.py reads a pickle's opcodes, which runs none of them."""
    calls = re.compile(r"torch\.load\b|allow_pickle=True|weights_only=False|pickle\.loads?\b|Unpickler")
    imports = re.compile(r"^\s*(?:from|import) (?:_?pickle|cloudpickle|dill|joblib|marshal|shelve)\b", re.MULTILINE)
    for path in (REPOSITORY / "partial_fc").rglob("*.py"):
        text = path.read_text()
        assert not calls.search(text) and not imports.search(text), path
        assert all("allow_pickle=False" in call for call in re.findall(r"np\.load\([^)]*\)", text)), path


# ---- names


@pytest.mark.parametrize(
    "name",
    ["../a", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "a\n", "\x1b[2J", "\x00", "\ud800", "x" * 256, None, 7],
)
def test_only_a_plain_name_is_taken(name, run):
    with pytest.raises(ValueError, match=r"M: files\[0\].name: got .*, wanted the plain name") as caught:
        plain_name(name, "M", "files[0].name")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 300
    values = values_of(folder_of(run))
    values["files"][2]["name"] = name
    rewrite(folder_of(run), files=values["files"])
    with pytest.raises(manifest.Damaged, match=r"manifest.json(: files\[2\].name: got| is no JSON: .*surrogate)"):
        checkpoint.find_latest(run)


def test_what_is_printed_has_no_control_characters():
    assert printable("a\x1b[31m\x07\u202eb\udcff\nc") == "a\\x1b[31m\\x07\\u202eb\\xff\nc"
    assert one_line("漢字 é\n\u200d") == "漢字 é\\n\u200d"


def test_errors_carry_no_escape_sequences(tmp_path, capsys):
    folder = tmp_path / "a\x1b[31mb"
    folder.mkdir()
    said = [command("export", folder, tmp_path / "out")]
    assert command("evaluate", folder) == 1  # on all ranks of a job
    said.append(capsys.readouterr().err)
    for text in said:
        assert "error: " in text and "a\\x1b[31mb holds no complete checkpoint" in text and "\x1b" not in text


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        self.server.asked.append(self.path)


@pytest.fixture
def web(tmp_path):
    """A folder that is served at a URL."""
    folder = tmp_path / "web"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_checkpoint_behind_a_url_writes_nothing_outside(run, web, tmp_path, monkeypatch, capsys):
    """As `export --gallery` of a run folder that holds nothing but a config.yaml did."""
    server, folder, url = web
    victim = tmp_path / "model.safetensors"
    victim.write_text("mine")
    shutil.copytree(folder_of(run), folder / "step_00000005")
    values = values_of(folder / "step_00000005")
    part = next(entry for entry in values["files"] if "classes" in entry)
    shutil.move(folder / "step_00000005" / part["name"], folder / "payload")
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / "config.yaml").write_text(f"checkpoint: {{dir: '{url}'}}\n")
    for name in (str(victim), f"../{victim.name}", f"../../../../../../..{victim}"):
        part["name"] = name
        rewrite(folder / "step_00000005", files=values["files"])
        with pytest.raises(ValueError, match="name: got .*, wanted the plain name of a file"):
            checkpoint.find_checkpoint(sent)
    assert victim.read_text() == "mine" and not any("payload" in path for path in server.asked)
    assert f"{sent}/config.yaml names {url}: reading checkpoints there" in capsys.readouterr().out
    (folder / "payload").rename(folder / "step_00000005" / "part")
    part["name"] = "part"  # plain, and so it is read
    rewrite(folder / "step_00000005", files=values["files"])
    assert sum(map(len, checkpoint.read_centers(checkpoint.find_checkpoint(sent), 7))) == CLASSES


# ---- the manifest's schema


def test_a_mutated_manifest_is_one_error_that_names_its_file(saved):
    """PARTIAL_FC_MUTATIONS says how many."""
    text, wrong = (folder_of(saved) / "manifest.json").read_bytes(), 0
    source = random.Random(0)
    for _ in range(int(os.environ.get("PARTIAL_FC_MUTATIONS", 400))):
        try:
            manifest.parse(mutated(text, source), "runs/x/manifest.json")
        except ValueError as error:
            wrong += 1
            assert str(error).startswith("runs/x/manifest.json") and len(str(error)) < 400
    assert wrong > 100
    for text in (b"[" * 10**6, b'{"format": ' + b"9" * 10**6, b" " * (manifest.MOST_BYTES + 1)):
        with pytest.raises(manifest.Damaged, match="^M"):
            manifest.parse(text, "M")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(step="5"), "step: got '5', wanted a whole number from 0 to"),
        (dict(num_classes=True), "num_classes: got True, wanted a whole number from 1 to 2147483647"),
        (dict(embedding_dim=2**24), r"bytes: got \d+, wanted .* or more for 23 classes of 1 x 16777216 float64"),
        (dict(dtype="object"), "dtype: got 'object', wanted float32 or float64"),
        (dict(run="../x"), "run: got '../x', wanted 16 hexadecimal digits"),
        (dict(files=...), "files: got nothing, wanted a list of objects"),
        (dict(center_state=["weight", 1]), r"center_state\[1\]: got 1, wanted names of tensors"),
        (dict(settings=[]), r"settings: got \[\], wanted an object"),
    ],
)
def test_every_field_is_checked(run, changes, message):
    rewrite(folder_of(run), **changes)
    with pytest.raises(ValueError, match=f"{folder_of(run)}/manifest.json: .*{message}"):
        checkpoint.open_checkpoint(folder_of(run))


def test_a_cut_manifest_names_its_file_under_together_too(run):
    file = folder_of(run) / "manifest.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(distributed.RunError, match=f"{file} is no JSON: .*there is no other checkpoint"):
        checkpoint.find_for_all(run, "reading it")


def test_what_the_trainer_keeps_is_checked_where_it_is_read(run):
    found = checkpoint.find_latest(run)
    with pytest.raises(ValueError, match="manifest.json: settings.config is no valid config"):
        found.config()
    with pytest.raises(ValueError, match=r"settings.image_size: got None, wanted \[height, width\]"):
        found.image_size()
    with pytest.raises(ValueError, match="settings.progress: got None, wanted .* loop of your own"):
        found.setting("progress")


def with_sum(folder: Path, name: str) -> None:
    """Has the manifest say what the file is now, as one who made it could."""
    values = values_of(folder)
    entry = next(entry for entry in values["files"] if entry["name"] == name)
    data = (folder / name).read_bytes()
    entry |= {"bytes": max(len(data), 10**6), "sha256": "0" * 64}
    entry |= {"bytes": len(data), "sha256": sha256_of(folder / name)}
    rewrite(folder, files=values["files"])


READERS = {
    "a resume": load_here,
    "a gallery": lambda run: torch.cat(list(checkpoint.read_centers(checkpoint.find_latest(run), 7))),
    "the backbone": lambda run: checkpoint.load_backbone(trained(steps=0)[1].backbone, checkpoint.find_latest(run)),
}


def refused_by(run: Path) -> dict[str, str]:
    """Which READERS refuse a checkpoint, and what they say."""
    said = {}
    for name, read in READERS.items():
        try:
            found = read(run)
        except ValueError as error:
            found = str(error)
        if isinstance(found, str):
            said[name] = found
    assert not any(kind in text for text in said.values() for kind in ("KeyError", "TypeError", "RuntimeError")), said
    return said


@pytest.mark.parametrize("kind", ["header", "length", "cut", "without", "shape", "dtype"])
@pytest.mark.parametrize(
    "file, tensor", [("centers_*", "weight"), ("history.*", "history"), ("backbone.*", "0.weight")]
)
def test_safetensors_that_somebody_made_are_no_traceback(run, file, tensor, kind):
    """With the right checksum; read as a resume, an export of the gallery and of the backbone read them."""
    path = next(folder_of(run).glob(file))
    data, tensors = path.read_bytes(), load_file(path)
    if kind == "header":
        path.write_bytes(data[:20] + b"\xff" + data[21:])
    elif kind == "length":
        path.write_bytes(b"\xff" * 8 + data[8:])
    elif kind == "cut":
        path.write_bytes(data[:-3])
    else:
        changed = {"without": {}, "shape": {tensor: torch.zeros(3, 1, 2)}, "dtype": {tensor: tensors[tensor].float()}}
        kept = {name: value for name, value in tensors.items() if name != tensor}
        save_file(kept | changed[kind], path, {"as long": "as the manifest wants: " + "x" * len(data)})
    with_sum(path.parent, path.name)
    others = "the backbone" if file == "backbone.*" else "a gallery"
    # a backbone takes float32 for float64, as torch does
    assert set(refused_by(run)) == (set() if (file, kind) == ("backbone.*", "dtype") else {"a resume", others})


@pytest.mark.parametrize("kind, bits", [("F4", 4), ("BOOL", 8), ("F8_E4M3", 8), ("U64", 64), ("C64", 64), ("BF16", 16)])
@pytest.mark.parametrize("name", ["weight", "momentum", "last_update"])
def test_class_centers_of_another_kind_are_no_class_centers(run, kind, bits, name):
    if CLASSES % 2 and (name, kind) == ("last_update", "F4"):
        kind, bits = "I64", 64  # half a byte is none
    path = next(folder_of(run).glob("centers_*"))
    own = {"weight": ("F64", 64, [CLASSES, 4]), "momentum": ("F64", 64, [CLASSES, 4])}
    own |= {"last_update": ("I32", 32, [CLASSES])}
    header, end = {"__metadata__": {"as long": "as the manifest wants: " + "x" * 9999}}, 0
    for one, (dtype, width, shape) in own.items():
        dtype, width = (kind, bits) if one == name else (dtype, width)
        size = torch.Size(shape).numel() * width // 8
        header[one] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    with_sum(path.parent, path.name)
    said = refused_by(run)
    assert set(said) == {"a resume", "a gallery"}
    assert all(f"{path}: {name}: got {kind}, wanted {own[name][0]}" in text for text in said.values()), said


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.tensor(float("nan")), "got torch.float32 (), wanted one int64"),
        (torch.tensor(1e30, dtype=torch.float64), "got torch.float64 (), wanted one int64"),
        (torch.tensor(True), "got torch.bool (), wanted one int64"),
        (torch.tensor([1, 2]), "got torch.int64 (2,), wanted one int64"),
        (torch.tensor(-5), "got -5, wanted 0 or more"),
    ],
)
def test_the_count_of_updates_is_checked(run, value, message):
    path = folder_of(run) / "history.safetensors"
    save_file(load_file(path) | {"updates": value}, path)
    with_sum(path.parent, path.name)
    said = refused_by(run)
    assert set(said) == {"a resume", "a gallery"} and all(f"{path}: updates: {message}" in one for one in said.values())


@pytest.mark.parametrize("kind", ["folder", "pipe", "zeros", "short"])
@pytest.mark.parametrize("size", [0, 10**15])
def test_a_file_of_a_checkpoint_is_a_file_of_its_size(run, kind, size):
    folder = folder_of(run)
    values = values_of(folder)
    for name in ("classes.txt", "backbone.safetensors"):
        next(entry for entry in values["files"] if entry["name"] == name)["bytes"] = size
        if kind != "short":
            put_no_file(folder / name, kind)
    rewrite(folder, files=values["files"])
    found = checkpoint.find_latest(run)
    said = "has [0-9]+ bytes, the manifest says" if kind == "short" else "is no regular file"
    with pytest.raises(manifest.Damaged, match=f"{folder}/classes.txt {said}"):
        found.classes()
    with pytest.raises(manifest.Damaged, match=f"{folder}/backbone.safetensors {said}"):
        checkpoint.read_backbone(found)


@pytest.mark.parametrize("kind", ["folder", "pipe", "zeros", b"[" * 999, b"\xff", b"[]", b'{"run": 1}'])
def test_an_unfinished_save_of_nobody_stays(tmp_path, kind):
    folder_of(tmp_path, 2).mkdir(parents=True)
    file = folder_of(tmp_path, 2) / checkpoint_files.UNFINISHED
    file.write_bytes(kind) if isinstance(kind, bytes) else put_no_file(file, kind)
    save_at(tmp_path, 4)
    assert steps(tmp_path) == ["step_00000002", "step_00000004"]


def test_the_class_map_is_verified(run, tmp_path):
    file = folder_of(run) / "classes.txt"
    flip(file)
    with pytest.raises(ValueError, match="classes.txt is damaged: its SHA-256"):
        write_gallery(checkpoint.find_latest(run), tmp_path)
    file.write_text("".join(NAMES[:9]))
    with_sum(file.parent, "classes.txt")
    with pytest.raises(ValueError, match="classes.txt names 9 classes, the checkpoint has 23 class centers"):
        write_gallery(checkpoint.find_latest(run), tmp_path)
    assert not (tmp_path / "classes.txt").exists()


# ---- whose checkpoints are


def test_folders_that_are_called_like_checkpoints_stay_and_are_not_gone_on_from(run, capsys):
    owner = Owner(values_of(folder_of(run))["run"])
    shutil.copytree(folder_of(run), run / "checkpoints" / "step_best")
    shutil.copytree(folder_of(run), folder_of(run).with_name("step_00000005_backup"))
    shutil.copytree(folder_of(run), folder_of(run, 7))  # a copy under another step's name
    folder_of(run, 12345).mkdir()
    (folder_of(run, 12345) / "manifest.json").write_text('{"name": "of another tool"}')
    folder_of(run, 2).mkdir()
    (folder_of(run, 2) / "notes").write_text("mine")
    assert checkpoint.find_latest(run).path == folder_of(run)
    said = capsys.readouterr().err
    assert "step_00000007 has the manifest of step_00000005" in said and "manifest.json has format None" in said
    save_at(run, 6, owner)
    kept = ["step_00000002", "step_00000005_backup", "step_00000006", "step_00000007", "step_00012345", "step_best"]
    assert steps(run) == kept and checkpoint.find_latest(run).step == 6
    save_at(run, 7, owner)  # another folder is in the way: it is moved, not deleted
    assert "other_step_00000007" in steps(run) and checkpoint.find_latest(run).step == 7
    assert "moved to" in capsys.readouterr().err


def test_a_run_deletes_its_own_checkpoints_only(tmp_path):
    for step, owner in ((1, US), (2, THEM), (3, US), (4, US)):
        save_at(tmp_path, step, owner, keep=2)
    assert steps(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    link = folder_of(tmp_path, 3).rename(tmp_path / "archived")
    folder_of(tmp_path, 3).symlink_to(link)
    save_at(tmp_path, 5, US)
    assert steps(tmp_path) == ["step_00000002", "step_00000003", "step_00000005"] and len(list(link.iterdir())) > 4


def test_checkpoints_without_an_id_are_gone_on_from_and_deleted_by_that_run_only(run):
    rewrite(folder_of(run), run=...)
    weight = checkpoint.find_latest(run)
    assert weight.run is None and weight.step == 5
    save_at(run, 6, US, keep=1)
    assert steps(run) == ["step_00000005", "step_00000006"]
    shutil.rmtree(folder_of(run, 6))
    ours = checkpoint_files.owner_here(run / "checkpoints")
    assert ours.adopted == {"step_00000005"} and manifest.is_run_id(ours.run)
    save_at(run, 6, ours, keep=2)
    assert values_of(folder_of(run, 6))["adopted"] == ["step_00000005"]
    assert checkpoint_files.owner_here(run / "checkpoints") == ours
    save_at(run, 8, None, keep=2)  # a loop of one's own gives no owner
    assert steps(run) == ["step_00000006", "step_00000008"] and values_of(folder_of(run, 8))["run"] == ours.run


def test_leftovers_of_a_killed_save_go_if_they_are_of_this_run(tmp_path):
    for step, owner in ((2, US), (3, THEM)):
        checkpoint_files.begin(folder_of(tmp_path, step), owner)
        (folder_of(tmp_path, step) / "part").write_text("half")
    save_at(tmp_path, 4, US)
    assert steps(tmp_path) == ["step_00000003", "step_00000004"]
    assert not (folder_of(tmp_path, 4) / checkpoint_files.UNFINISHED).exists()


def test_a_later_checkpoint_that_has_come_to_be_is_another_job(tmp_path):
    save_at(tmp_path, 8, THEM)
    for step in (7, 8):
        with pytest.raises(
            distributed.RunError, match="step_00000008 has come to be while this run was at step_0000000"
        ):
            save_at(tmp_path, step, US)
    assert steps(tmp_path) == ["step_00000008"]


def test_a_deleted_folder_is_locked_again_or_the_run_ends(tmp_path, capsys):
    """rm -rf takes the lock away, and another process may begin there: it is told apart by another file."""
    with the_only_one_in(tmp_path / "run", tmp_path / "disk") as hold:
        hold()
        shutil.rmtree(tmp_path / "run")
        hold()
        assert "run was deleted while this run trained" in capsys.readouterr().err
        assert (tmp_path / "run" / "lock").exists()
    for run, where, setting in (("run/lock", "disk", "run.dir"), ("run", "run/lock", "checkpoint.dir")):
        wanted = f"/run/lock is a file, wanted a folder: give another {setting}"
        with pytest.raises(distributed.RunError, match=wanted), the_only_one_in(tmp_path / run, tmp_path / where):
            pass


@pytest.mark.slow
def test_a_run_whose_folder_was_deleted_and_taken_by_another_ends(tmp_path):
    lock = FolderLock(tmp_path / "run", "another process trains in this folder")
    shutil.rmtree(tmp_path / "run")
    (ready, tell), (wait, done) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        held = FolderLock(tmp_path / "run", "")
        os.write(tell, b"x")
        os.read(wait, 1)
        held.close()
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        with pytest.raises(ValueError, match="another process trains in this folder"):
            lock.renew()
    finally:
        os.write(done, b"x")
        os.waitpid(child, 0)
    lock.renew()


# ---- what is saved


def test_files_of_a_checkpoint_are_for_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_at(tmp_path, 1, US)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder_of(tmp_path, 1).iterdir()}
    assert set(modes.values()) == {0o640} and len(modes) == 6, modes


@pytest.mark.parametrize("where", ["here", "memory://latest/run"])
def test_a_checkpoint_is_complete_without_its_latest(tmp_path, where, monkeypatch, capsys):
    """Which is for people."""
    place = tmp_path / "here" if where == "here" else where
    if where == "here":
        (place / "latest").mkdir(parents=True)
    else:
        write = storage.write

        def all_but_latest(url: str, data: bytes) -> None:
            if url.endswith("latest"):
                raise OSError(f"cannot write {url}")
            write(url, data)

        monkeypatch.setattr(storage, "write", all_but_latest)
    save_at(tmp_path, 3, US, where=place)
    assert checkpoint.find_latest(place).step == 3
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and f"{place}/latest" in said and "the checkpoint is complete without" in said


def test_no_checkpoint_to_keep_is_an_error_before_anything_is_saved(tmp_path):
    with pytest.raises(ValueError, match="keep: got 0, wanted 1 or more"):
        save_at(tmp_path, 3, US, keep=0)
    assert not (tmp_path / "checkpoints").exists()


def test_settings_that_nobody_could_read_are_not_saved(tmp_path):
    save_at(tmp_path, 1, US)
    with pytest.raises(distributed.RunError, match="step_00000002/manifest.json is no JSON"):
        save_at(tmp_path, 2, US, settings={"half a letter": "\ud800"})
    assert steps(tmp_path) == ["step_00000001"]


def test_what_a_checkpoint_brings_along_is_written_as_a_whole(tmp_path):
    (tmp_path / "other").write_text("mine")
    os.link(tmp_path / "other", tmp_path / "metrics.jsonl")
    restore_beside(SimpleNamespace(read=lambda name: b"rows" if name == "metrics.jsonl" else None), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "rows" and (tmp_path / "other").read_text() == "mine"


def test_state_that_is_not_finite_is_not_saved_and_the_good_one_stays(tmp_path):
    save_at(tmp_path, 1, US)
    for which, name in ((0, "class centers: weight"), (1, "backbone: 0.weight")):
        head, engine = trained(steps=1)
        tensor = (head.centers.weight.value, engine.backbone.state_dict()["0.weight"])[which]
        tensor[1, 1] = float("nan") if which else float("inf")
        message = f"training has diverged: after step 2 the {name} is not finite: a gradient was infinite or NaN"
        with pytest.raises(distributed.RunError, match=message):
            checkpoint.save(
                tmp_path, 2, head=head, engine=engine, classes=tmp_path / "names.txt", settings={}, keep=1, owner=US
            )
    assert steps(tmp_path) == ["step_00000001"]
    assert checkpoint.find_latest(tmp_path).step == 1


def test_a_save_that_fails_leaves_nothing_and_names_the_place(tmp_path):
    """A limit of the file size stands for a full disk."""
    save_at(tmp_path, 1, US)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = r"cannot write .*/step_00000002/\w+.safetensors \(.*\); [\d,]+ MiB are free there: make room"
        with pytest.raises(distributed.RunError, match=message):
            save_at(tmp_path, 2, US)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps(tmp_path) == ["step_00000001"] and checkpoint.find_latest(tmp_path).step == 1


# ---- runs


@pytest.fixture(scope="module")
def trained_run(glyphs_ci, tmp_path_factory) -> Path:
    """Four steps of one rank, a checkpoint each; copy it."""
    run = tmp_path_factory.mktemp("trust") / "run"
    train_here(run, glyphs_ci / "train", *ONES, "run.steps=4")
    return run


ONES = ("optim.schedule=constant", "checkpoint.every=1")


def sums(run: Path) -> dict[str, str]:
    return {entry["name"]: entry["sha256"] for entry in checkpoint.find_latest(run).files()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_kept_aside_and_the_one_before_taken(trained_run, glyphs_ci, tmp_path, capsys):
    """One whose part is damaged, one whose manifest is, one whose class map is: three steps back, and bit for bit."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    flip(next(folder_of(run, 4).glob("centers_*")))
    os.truncate(folder_of(run, 3) / "manifest.json", 99)
    flip(folder_of(run, 2) / "classes.txt")
    with pytest.raises(ValueError, match=f"damaged: its SHA-256 .*name another one, as {folder_of(run, 3)}, or rename"):
        list(checkpoint.read_centers(checkpoint.find_latest(run), 99))
    train_here(run, glyphs_ci / "train", *ONES, "run.steps=4")
    said = [line for line in capsys.readouterr().out.splitlines() if "It is kept as" in line]
    assert [line.rpartition("/")[2] for line in said] == ["step_00000002", "step_00000002", "step_00000001"]
    assert f"is damaged: its SHA-256 is not the manifest's. It is kept as {run}/checkpoints/damaged_step_0" in said[0]
    whole = [f"step_0000000{step}" for step in (1, 2, 3, 4)]
    assert steps(run) == [*(f"damaged_{name}" for name in whole[1:]), *whole] and sums(run) == sums(trained_run)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_the_only_checkpoint_stays_though_it_is_damaged(trained_run, glyphs_ci, tmp_path):
    """Without it the run would begin anew."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    for step in (1, 2, 3):
        shutil.rmtree(folder_of(run, step))
    flip(folder_of(run, 4) / "backbone.safetensors")
    with pytest.raises(
        distributed.RunError, match="SHA-256 is not the manifest's; there is no other checkpoint beside"
    ):
        train_here(run, glyphs_ci / "train", *ONES, "run.steps=5")
    assert steps(run) == ["step_00000004"]


@pytest.mark.parametrize("progress", [{"samples": -1}, {"other": 1}, "x"])
def test_counts_that_cannot_be_are_an_error_on_all_ranks(trained_run, glyphs_ci, tmp_path, progress):
    run = shutil.copytree(trained_run, tmp_path / "run")
    rewrite(folder_of(run, 4), settings=values_of(folder_of(run, 4))["settings"] | {"progress": progress})
    with pytest.raises(distributed.RunError, match="^preparing the run failed: .*manifest.json: settings.progress: "):
        train_here(run, glyphs_ci / "train", *ONES, "run.steps=5")


def test_a_runs_id_is_in_its_config_and_goes_along(trained_run, glyphs_ci, tmp_path):
    data = glyphs_ci / "train"
    run = shutil.copytree(trained_run, tmp_path / "renamed")
    ids = {checkpoint.open_checkpoint(folder_of(run, step)).run for step in (1, 2, 3, 4)}
    assert ids == {yaml.safe_load((run / "config.yaml").read_text())["environment"]["run"]}
    train_here(run, data, *ONES, "run.steps=5", "checkpoint.keep=2")
    assert steps(run) == ["step_00000004", "step_00000005"] and {checkpoint.find_latest(run).run} == ids
    train_here(tmp_path / "other", data, *ONES, "run.steps=1")
    assert {checkpoint.find_latest(tmp_path / "other").run} != ids  # of the same seed
    with pytest.raises(distributed.RunError, match="holds checkpoints of the run .*, .*config.yaml is of the run"):
        train_here(tmp_path / "other", data, *ONES, "run.steps=6", f"checkpoint.dir={run}/checkpoints")


def test_an_early_run_without_an_id_goes_on_bit_for_bit(trained_run, glyphs_ci, tmp_path):
    """Its checkpoints and its config.yaml as they were before there were ids."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(folder_of(run, 4))
    for step in (1, 2, 3):
        rewrite(folder_of(run, step), run=...)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["environment"]["run"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    train_here(run, glyphs_ci / "train", *ONES, "run.steps=4", "checkpoint.keep=2")
    assert steps(run) == ["step_00000003", "step_00000004"] and sums(run) == sums(trained_run)


def one_gradient_is_nan(run: Path, data: Path, *overrides: str) -> bool:
    """Trains; at step 3 one number of the backbone's gradient is NaN, the loss is not."""
    with pytest.MonkeyPatch.context() as patch:
        calls = iter(range(99))
        backward = DDPEngine._backward

        def broken(self, loss):
            backward(self, loss)
            if next(calls) == 3:  # the first is the warm-up's
                next(self.backbone.parameters()).grad.view(-1)[0] = float("nan")

        patch.setattr(DDPEngine, "_backward", broken)
        return train_here(run, data, *overrides)


def test_one_nan_gradient_does_not_ruin_a_run_that_keeps_one_checkpoint(trained_run, glyphs_ci, tmp_path):
    run, options = tmp_path / "run", (*ONES, "checkpoint.keep=1", "run.steps=4")
    with pytest.raises(distributed.RunError, match="training has diverged: after step 3 the .* is not finite"):
        one_gradient_is_nan(run, glyphs_ci / "train", *options)
    assert steps(run) == ["step_00000002"]
    train_here(run, glyphs_ci / "train", *options)
    assert sums(run) == sums(trained_run)


def looks_later(run: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 1:
            patch.setattr(checkpoint, "find_checkpoint", lambda path: checkpoint.open_checkpoint(folder_of(run, 3)))
        return checkpoint.find_for_all(run, "reading it").step


@pytest.mark.slow
def test_rank_0_chooses_the_checkpoint(trained_run):
    assert run_ranks(looks_later, 2, trained_run) == [4, 4]


def test_one_that_is_replaced_while_it_is_read_says_try_again(run):
    found = checkpoint.find_latest(run)
    save_at(run, 9, Owner(found.run), keep=1)
    with pytest.raises(ValueError, match="step_00000005 was replaced or deleted while it was read: try again"):
        checkpoint.read_backbone(found)


def test_an_evaluation_that_cannot_be_written_is_printed(trained_run, glyphs_ci, tmp_path, capsys, monkeypatch):
    sets = {"P2": EvaluationSet(data=str(glyphs_ci / "test_unseen"))}
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "evaluation.json.partial").mkdir()
    with pytest.raises(distributed.RunError, match="evaluation.json failed: .*Is a directory"):
        evaluate_run(run, CPU, sets=sets)
    assert "TAR@1e-3" in capsys.readouterr().out
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write everywhere
    (run / "report.html").write_text("of the evaluation before")
    commands.evaluate(Namespace(path=run, data=[f"P2={glyphs_ci}/test_unseen"], untrained=False))
    said = capsys.readouterr().out
    assert f"warning: {run} cannot be written to" in said and "TAR@1e-3" in said
    assert not (run / "evaluation.json").exists()
    assert (run / "report.html").read_text() == "of the evaluation before"


# ---- code

EVIL = """
import pathlib
from dataclasses import dataclass
from partial_fc import CosFace
pathlib.Path(__file__).with_name("ran").write_text("")

@dataclass(frozen=True, kw_only=True)
class Mine(CosFace):
    pass
"""


@pytest.fixture
def evil(trained_run, glyphs_ci, tmp_path, monkeypatch) -> Path:
    """A run folder whose config and checkpoint name evil.Mine, and evil.py in it, where imports look first."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "evil.py").write_text(EVIL)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["head"]["margin"]["name"] = "evil.Mine"
    config["evaluate"] = {"sets": {"P2": {"data": str(glyphs_ci / "test_unseen")}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (1, 2, 3, 4):
        settings = values_of(folder_of(run, step))["settings"]
        settings["config"] |= {"head": config["head"], "evaluate": config["evaluate"]}
        rewrite(folder_of(run, step), settings=settings)
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", ["", str(run), *sys.path])
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    importlib.invalidate_caches()
    yield run
    sys.modules.pop("evil", None)


def command(*arguments: object) -> str | None:
    """partial-fc in this process: what it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["partial-fc", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code
    return None


@pytest.mark.slow
def test_no_command_but_training_imports_what_a_config_names(evil, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments in (
        ("evaluate", evil),
        ("export", evil, out / "exported", "--gallery"),
        ("embed", evil, glyph_images(evil), out / "rows.npy", "--workers", 0),
        ("report", evil, "--out", out / "report.html"),
        ("figures", out / "figures", "--only", "cosines", "--runs", evil),
    ):
        assert command(*arguments) is None, arguments
        assert not (evil / "ran").exists(), arguments
    refused = "head.margin.name: 'evil.Mine' is code outside of partial_fc"
    assert refused in command("benchmark", "sampler", evil, "--batches", 1)
    capsys.readouterr()
    assert command("doctor", evil / "config.yaml") == 1 and refused in capsys.readouterr().out
    assert not (evil / "ran").exists()
    assert command("benchmark", "sampler", evil, "--batches", 1, "--trust-code") is None
    assert (evil / "ran").exists()


def test_the_table_of_a_study_imports_nothing(evil, tmp_path):
    (tmp_path / "base.yaml").write_text((REPOSITORY / "configs" / "glyphs_ci.yaml").read_text())
    (tmp_path / "plan.yaml").write_text("base: base.yaml\nseeds: [1]\nrows: {mine: {head.margin.name: evil.Mine}}\n")
    (row,) = load_plan(tmp_path / "plan.yaml").rows
    assert source_of(row.overrides["head.margin.name"]) == evil / "evil.py" and not (evil / "ran").exists()
    load_plan(tmp_path / "plan.yaml", trust_code=True)
    assert (evil / "ran").exists()


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "hf_hub:owner/name", "local-dir:/tmp"])
def test_a_timm_model_is_one_that_timm_registers(name):
    pytest.importorskip("timm", reason="not run: no timm")
    with pytest.raises(ValueError, match="has no model"):
        build_seeded(f"timm/{name}", 8, (32, 32), seed=0)


def glyph_images(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["evaluate"]["sets"]["P2"]["data"]


def test_training_says_what_it_imports(evil, glyphs_ci, capsys):
    config = config_for(evil, glyphs_ci / "train", "head.margin.name=evil.Mine", "run.steps=4")
    say_what_is_imported(config)
    assert f"importing evil.Mine from {evil}/evil.py: head.margin.name names it" in capsys.readouterr().out
    assert not (evil / "ran").exists() and "evil" not in sys.modules
    order_of(config, load_index(config.data.train), trust_code=True)
    build_losses(config)
    assert (evil / "ran").exists()
