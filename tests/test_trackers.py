"""wandb and TensorBoard: what fails in them costs what they track, not the run; a resumed run has each row once."""

import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from partial_fc import trackers
from partial_fc.config_file import load_config
from partial_fc.metrics import Metrics
from partial_fc.trackers import start_wandb, wandb_mode
from tests.conftest import REPOSITORY
from tests.test_train import begin, finish, rows, wait_for_step

CONFIG = REPOSITORY / "configs" / "glyphs_ci.yaml"
KEY = "a" * 40
BLOCK = 32768


def records(file: Path) -> list[bytes]:
    """Of wandb's file, which is LevelDB's log: blocks of parts with crc, length and kind; it may end anywhere."""
    data, found, record = file.read_bytes(), [], b""
    assert data[:4] == b":W&B" or not data
    at = 7
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or at + 7 + length > len(data):
            break
        record = data[at + 7 : at + 7 + length] if kind in (1, 2) else record + data[at + 7 : at + 7 + length]
        if kind in (1, 4):
            found.append(record)
        at += 7 + length
    return found


def tracked(run: Path) -> list[dict]:
    """The rows in all of wandb's offline parts of a run folder, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                found.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return found


@pytest.mark.soak("train")
def test_a_killed_run_goes_on_under_its_id_and_tracks_every_row_once(glyphs_ci, tmp_path):
    """kill -9 past a checkpoint: rows before it are lost on their way, rows past it are logged again."""
    run = tmp_path / "run"
    options = ("run.steps=30", "track.wandb=offline", "evaluate.sets={}")
    process = begin(1, run, *options)
    wait_for_step(run, 14, process)
    os.kill(process.pids[0], signal.SIGKILL)
    finish(process, code=1)
    name, (killed,) = (run / "wandb_id").read_text(), (run / "wandb").glob("offline-run-*")
    said = finish(begin(1, run, *options))
    assert "from the start" not in said and (run / "wandb_id").read_text() == name
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert folder != killed and folder.name.endswith(name.strip())
    found, wanted = tracked(run), rows(run)
    assert [row["step"] for row in wanted] == [*range(1, 31)]
    assert found == wanted


@pytest.mark.soak("train")
@pytest.mark.timeout(1800)
def test_a_run_killed_often_tracks_every_row_once(glyphs_ci, tmp_path):
    options = ("run.steps=600", "checkpoint.every=25", "track.wandb=offline", "evaluate.sets={}")
    moments, run, kills = random.Random(0), tmp_path / "run", 0
    while kills < 20:
        process = begin(1, run, *options)
        time.sleep(moments.uniform(1, 12))
        if process.poll() is not None:
            break
        process.kill()
        kills += 1
        finish(process, code=None)
    print(f"{kills} kills, the last with {len(rows(run))} rows")
    finish(begin(1, run, *options))
    assert [row["step"] for row in tracked(run)] == [*range(1, 601)]
    assert tracked(run) == rows(run)


# ---- errors of wandb


def config_of(*overrides: str):
    return load_config(CONFIG, overrides)


def refusing(kind: str):
    def init(**_):
        import wandb

        errors = {
            "full disk": OSError(28, "No space left on device"),
            "service": wandb.Error("The wandb service\nprocess exited"),
            "fork": BlockingIOError(11, "Resource temporarily unavailable"),
            "usage": wandb.errors.UsageError("api_key not configured (no-tty)"),
            "bug": KeyError("run"),
        }
        raise errors[kind]

    return init


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("kind", ["full disk", "service", "fork", "usage", "bug"])
def test_a_wandb_that_does_not_start_is_left_out(kind, mode, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("wandb.init", refusing(kind))
    monkeypatch.setattr("wandb.teardown", lambda: None)
    metrics = Metrics(config_of(f"track.wandb={mode}"), tmp_path, start_step=0, total_steps=10, steps_per_epoch=10)
    assert metrics.wandb is None
    metrics.close()
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch("wandb: .*, so without it", said[-1]) and len(said) == (2 if mode == "online" else 1)
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_wandb_that_cannot_be_imported_is_left_out(monkeypatch, tmp_path, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert start_wandb(config_of("track.wandb=offline"), tmp_path) is None
    assert re.search("^wandb: .*, so without it$", capsys.readouterr().out)


@pytest.mark.parametrize("left", [b"", b"\n", b"\0\0\0\0\0\0\0\0\0", b"a/b\n"])
def test_an_id_that_a_full_disk_left_is_made_anew(left, tmp_path):
    (tmp_path / "wandb_id").write_bytes(left)
    made = trackers._wandb_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{8}", made) and trackers._wandb_id(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_id"]


@pytest.mark.parametrize("left", ["folder", b"\xff\xfe"])
def test_an_id_that_cannot_be_read_costs_the_tracker(left, tmp_path, capsys):
    path = tmp_path / "wandb_id"
    path.mkdir() if left == "folder" else path.write_bytes(left)
    assert start_wandb(config_of("track.wandb=offline"), tmp_path) is None
    assert re.search("^wandb: .*, so without it$", capsys.readouterr().out)


class Slow:
    """A tracker whose end takes too long, or has wandb's own limit reached."""

    def __init__(self, error: Exception | None):
        self.error = error

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        time.sleep(60)

    close = finish


@pytest.mark.parametrize("error", [None, TimeoutError("Timed out finishing run."), OSError(28, "No space left")])
@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_does_not_end_is_left(name, error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.05)
    config = config_of("track.wandb=disabled")
    metrics = Metrics(config, tmp_path, start_step=0, total_steps=10, steps_per_epoch=10)
    setattr(metrics, name, Slow(error))
    metrics.close()
    said, complaint = capsys.readouterr()
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        assert f"{name}: OSError: [Errno 28] No space left: nothing more goes to it" in complaint
    else:
        assert f"{name}: it has not ended within 0 s, and is left unfinished\n" in said


STOPPED = """
import os, signal, sys, time
from pathlib import Path
from partial_fc import trackers
from partial_fc.metrics import Metrics
from tests.test_trackers import config_of
run = Path(sys.argv[1])
metrics = Metrics(config_of("track.wandb=offline"), run, start_step=0, total_steps=10, steps_per_epoch=10)
assert metrics.wandb is not None and metrics.wandb.settings.finish_timeout == trackers.FINISH_SECONDS
if sys.argv[2] == "stopped":
    trackers.FINISH_SECONDS = 2
    (service,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(service), signal.SIGSTOP)
metrics.wandb.log({"step": 1}, step=1)
metrics.close()
"""


@pytest.mark.slow
@pytest.mark.soak("train")
@pytest.mark.parametrize("service", ["stopped", "alive"])
def test_a_wandb_that_stands_still_does_not_keep_a_finished_run(service, tmp_path):
    """Its service; and of a real interpreter, where it is waited for at the end."""
    command = [sys.executable, "-c", STOPPED, str(tmp_path), service]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert ("is left unfinished" in done.stdout) == (service == "stopped")
    assert (tracked(tmp_path) == [{"step": 1}]) == (service == "alive")


# ---- where the key is


def netrc(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "no UTF-8":
        path.write_bytes(b"\xff\xfe\0machine")
    elif kind == "a loop":
        path.symlink_to(path)
    elif kind != "none":
        host = "api.wandb.ai" if kind == "another user's" else kind
        path.write_text(f"machine {host} login user password {KEY}\n")


@contextmanager
def another_user(file: Path) -> Iterator[None]:
    """To whom `file` cannot be read; root reads everything."""
    file.chmod(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    "kind, environment, mode, reason",
    [
        ("none", {}, "offline", ""),
        ("none", {"WANDB_API_KEY": KEY}, "online", ""),
        ("none", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": KEY}, "offline", ""),
        ("api.wandb.ai", {}, "online", ""),
        ("wandb.example.org", {}, "offline", ""),
        ("wandb.example.org", {"WANDB_BASE_URL": "https://wandb.example.org"}, "online", ""),
        ("api.wandb.ai", {"WANDB_BASE_URL": "https://wandb.example.org"}, "offline", ""),
        ("folder", {}, "offline", "Failed to read netrc file at .*netrc: .*Is a directory"),
        ("no UTF-8", {}, "offline", "^wandb: looking for a key: UnicodeDecodeError: "),
        ("a loop", {}, "offline", "Failed to read netrc file at .*netrc: .*Too many levels"),
        ("another user's", {}, "offline", "Failed to read netrc file at .*netrc: .*Permission denied"),
    ],
)
def test_the_mode_is_online_where_wandb_has_a_key(kind, environment, mode, reason, monkeypatch, tmp_path, capsys):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    netrc(tmp_path / "netrc", kind)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("wandb.sdk.wandb_setup._singleton", None)  # it reads the environment once a process
    config = config_of()
    with another_user(tmp_path / "netrc") if kind == "another user's" else nullcontext():
        assert wandb.__version__ and wandb_mode(config) == mode
    said = "".join(capsys.readouterr())
    assert re.search(reason, said) if reason else not said


def test_a_user_without_a_home(monkeypatch):
    """The id of a container's user that /etc/passwd does not have."""

    def nowhere(self):
        raise RuntimeError("Could not determine home directory.")

    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert wandb_mode(config_of()) == "offline"


# ---- TensorBoard


def test_a_tensorboard_that_cannot_be_written_costs_what_it_tracks(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where its folder goes")
    config = config_of("track.tensorboard=true", "track.wandb=disabled")
    metrics = Metrics(config, tmp_path, start_step=0, total_steps=10, steps_per_epoch=10)
    assert metrics.tensorboard is None
    metrics.close()
    assert re.search("^tensorboard: .*, so without it$", capsys.readouterr().out, re.MULTILINE)
