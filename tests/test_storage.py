"""Checkpoints in an object store: complete or invisible there too, and all that a machine needs to go on."""

import http.server
import importlib.util
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch

from partial_fc import CosFace, PartialFC, checkpoint, storage
from partial_fc.checkpoint_files import Owner
from partial_fc.config import check_config
from partial_fc.evaluate.runs import evaluate_run
from partial_fc.export.embed import embed_images
from partial_fc.export.model import open_model
from partial_fc.export.run import export_run
from partial_fc.figures import checkpoints
from partial_fc.parallel import distributed
from tests.conftest import run_ranks
from tests.s3_server import BUCKET, s3  # noqa: F401 - a fixture
from tests.test_checkpoint import NAMES, load_here, trained
from tests.test_train import begin, curve, finish, rows, start, train_and_catch, train_here, wait_for, wait_for_step

CPU = torch.device("cpu")


def test_a_place_is_a_path_or_a_url(tmp_path):
    assert storage.place("s3://bucket/run/") == "s3://bucket/run" and storage.place(f"file://{tmp_path}") == tmp_path
    assert storage.place(tmp_path) == tmp_path and storage.place("runs/a") == Path("runs/a")
    assert storage.parent("s3://bucket/run/step") == "s3://bucket/run" and storage.last_name("s3://bucket/run") == "run"


@pytest.mark.parametrize("name", ["[a-z]", "run?", "*"])
def test_a_url_that_stands_for_several_is_none(name):
    """fsspec lists, moves and deletes what is like it."""
    url, files = f"memory://pattern/{name}", fsspec.filesystem("memory")
    other = "memory://pattern/" + {"[a-z]": "b", "run?": "run1", "*": "c"}[name]
    for one in (url, other):
        files.pipe_file(f"{one}/step_00000001/manifest.json", b"{}")
    for act in (
        lambda: storage.place(url),
        lambda: storage.glob(url, "step_*"),
        lambda: storage.remove(url, folder=True),
        lambda: storage.move(url, f"{other}_moved"),
        lambda: storage.move(other, url),
    ):
        with pytest.raises(ValueError, match=r"^got 'memory://pattern/.*', wanted a URL without \* \? \[ \]: give it"):
            act()
    assert files.exists(f"{other}/step_00000001/manifest.json")
    with pytest.raises(ValueError, match=r"  checkpoint.dir: got 'memory://.*'; wanted a URL without"):
        check_config({"run": {"dir": "a"}, "data": {"train": "b"}, "checkpoint": {"dir": url}}, "a config")


def test_a_file_that_a_server_sends_in_pieces_is_read_whole(monkeypatch):
    data = os.urandom(1 << 20)

    class InPieces(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for at in range(0, len(data), 1 << 16):
                self.wfile.write(b"10000\r\n" + data[at : at + (1 << 16)] + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), InPieces) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/part"
        try:
            assert storage.read(url, len(data)) == storage.read(url, 10**15) == storage.read(url) == data
            assert storage.read(url, 99_999) == data[:100_000]
        finally:
            server.shutdown()


def test_what_a_protocol_needs_is_said():
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        storage.read("nowhere://bucket/run")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(ValueError, match="cannot list gs://bucket/run: .*gcsfs"):
            checkpoint.find_latest("gs://bucket/run")


def test_other_tries_follow_a_failed_one_but_not_for_ever(monkeypatch):
    pauses, left = [], [OSError("reset"), TimeoutError("slow"), None]
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def flaky(files, path):
        error = left.pop(0)
        if error:
            raise error
        return "there"

    assert storage._try("read", "memory://retry", flaky) == "there" and pauses == [1.0, 5.0]
    left += [OSError("one"), OSError("two"), OSError("three"), OSError("the last")]
    with pytest.raises(OSError, match="cannot read memory://retry, tried 4 times: OSError: the last"):
        storage._try("read", "memory://retry", flaky)
    left += [OSError("slow")] * 4
    monkeypatch.setattr(storage, "PATIENCE", -1.0)
    with pytest.raises(OSError, match="tried 1 times"):
        storage._try("read", "memory://retry", flaky)


# ---- one process


def save_at(where: storage.Place, run: Path, step: int = 5, keep: int = 2, **options) -> torch.Tensor:
    """The centers of five steps, which a checkpoint holds then."""
    head, engine = trained(**options)
    run.mkdir(exist_ok=True)
    (run / "names.txt").write_text("".join(NAMES))
    settings = {"order": {}, "config": {}}
    checkpoint.save(
        run,
        step,
        head=head,
        engine=engine,
        classes=run / "names.txt",
        settings=settings,
        keep=keep,
        where=where,
        owner=Owner("0123456789abcdef"),
    )
    return head.full_weight()


def test_a_store_holds_what_a_folder_holds(tmp_path):
    url = "memory://bucket/same"
    wanted = save_at(url, tmp_path / "run")
    save_at(None, tmp_path / "run")
    there, here = checkpoint.find_checkpoint(url), checkpoint.find_latest(tmp_path / "run")
    assert there.manifest == here.manifest and there.path == f"{url}/step_00000005"
    assert there.classes() == here.classes() == [name[:-1] for name in NAMES]
    assert storage.read(f"{url}/latest") == b"step_00000005\n"
    weight, backbone, _, step_count = load_here(url)
    assert torch.equal(weight, wanted) and step_count == 5
    assert torch.equal(checkpoint.read_backbone(there)["0.weight"], backbone["0.weight"])
    assert torch.equal(torch.cat(list(checkpoint.read_centers(there, 4))), wanted)
    assert [*(tmp_path / "run" / "scratch").iterdir()] == []


def test_leftovers_go_and_only_the_newest_stay(tmp_path):
    url = "memory://bucket/keep"
    storage.write(f"{url}/step_00000002/backbone.safetensors", b"left by a killed save")
    ours = {"format": "partial_fc-checkpoint", "run": "0123456789abcdef"}
    storage.write(f"{url}/step_00000002/unfinished.json", json.dumps(ours).encode())
    assert checkpoint.find_latest(url) is None
    (tmp_path / "run" / "scratch" / "rank_0").mkdir(parents=True)
    (tmp_path / "run" / "scratch" / "rank_0" / "old").write_text("left by it here")
    for step in (1, 3, 4):
        save_at(url, tmp_path / "run", step)
    assert storage.glob(url, "step_*") == [f"{url}/step_00000003", f"{url}/step_00000004"]
    assert [*(tmp_path / "run" / "scratch").iterdir()] == []
    with pytest.raises(ValueError, match="holds no manifest.json, so it is no complete checkpoint"):
        checkpoint.open_checkpoint(f"{url}/step_00000001")


def test_another_job_in_the_same_place_is_an_error(tmp_path, monkeypatch):
    url = "memory://bucket/two"
    save_at(url, tmp_path / "run", 8)
    with pytest.raises(distributed.RunError, match="step_00000008 has come to be .* another job writes there"):
        save_at(url, tmp_path / "run", 8)
    written = storage.upload

    def beside_another(path, to):
        written(path, to)
        storage.remove(to)

    monkeypatch.setattr(storage, "upload", beside_another)
    with pytest.raises(distributed.RunError, match="lacks .*backbone.safetensors, .* does another job write there"):
        save_at(url, tmp_path / "run", 9)
    assert checkpoint.find_latest(url).step == 8


# ---- several ranks, S3


def at(environment: dict, fn: Callable, *args):
    os.environ.update(environment)
    storage.RETRY_SECONDS = (0.1,)
    return fn(*args)


def on_s3(store, world_size: int, fn: Callable, *args) -> list:
    return run_ranks(at, world_size, store.environment, fn, *args)


@pytest.mark.slow
def test_a_rank_reads_what_overlaps_its_classes(s3, tmp_path):  # noqa: F811
    url = f"{BUCKET}/overlap"
    wanted = on_s3(s3, 3, save_at, url, tmp_path / "run")[0]
    s3.seen.clear()
    for weight, _, _, step_count in on_s3(s3, 2, load_here, url):
        assert torch.equal(weight, wanted) and step_count == 5
    fetched = [key.rpartition("/")[2] for method, key in s3.seen if method == "GET" and ".safetensors" in key]
    parts = [name for name in fetched if name.startswith("centers")]
    first, middle, last = sorted(set(parts))  # of 8, 8 and 7 classes; the readers have 12 and 11
    assert sorted(parts) == [first, middle, middle, last] and fetched.count("backbone.safetensors") == 2
    assert not any(method == "PUT" for method, _ in s3.seen)


@pytest.mark.slow
def test_damage_is_one_error_on_all_ranks(s3, tmp_path):  # noqa: F811
    url = f"{BUCKET}/damaged"
    on_s3(s3, 2, save_at, url, tmp_path / "run")
    part = f"{url}/step_00000005/centers_000000000000_000000000012.safetensors"
    data = storage.read(part)
    for damage, message in (
        (lambda: storage.write(part, data[:-3] + b"\x55" + data[-2:]), f"{part} is damaged: its SHA-256"),
        (lambda: storage.write(part, data[:-8]), f"bytes, the manifest says {len(data)}"),
        (lambda: storage.remove(part), f"{part} is missing"),
    ):
        damage()
        answers = on_s3(s3, 3, load_here, url)
        assert len(set(answers)) == 1 and message in answers[0]
        assert "there is no other checkpoint beside" in answers[0]


def save_and_catch(where: str, run: Path, step: int) -> str:
    try:
        save_at(where, run, step)
    except distributed.RunError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_a_server_that_goes_away_during_a_save_is_one_error_on_all_ranks(s3, tmp_path):  # noqa: F811
    url = f"{BUCKET}/gone"
    on_s3(s3, 2, save_at, url, tmp_path / "run", 5)

    def go_away(method: str, key: str) -> None:
        if method == "PUT" and "/step_00000006/centers_000000000012" in key:
            s3.before = lambda method, key: None
            s3.stop()

    s3.before = go_away
    try:
        answers = on_s3(s3, 2, save_and_catch, url, tmp_path / "run", 6)
    finally:
        s3.start()
    assert len(set(answers)) == 1 and "saving s3://bucket/gone/step_00000006 failed on rank" in answers[0]
    assert "step_00000006/" in answers[0] and "tried 2 times" in answers[0]
    assert checkpoint.find_latest(url).step == 5 and [*(tmp_path / "run" / "scratch").iterdir()] == []
    on_s3(s3, 2, save_at, url, tmp_path / "run", 7)  # the same ranks go on when it is back
    assert storage.glob(url, "step_*") == [f"{url}/step_00000005", f"{url}/step_00000007"]


# ---- the trainer


def checksums(path: storage.Place) -> dict[str, str]:
    """Of the state; what goes along with a checkpoint tells times and folders."""
    files = checkpoint.find_latest(path).files()
    return {one["name"]: one["sha256"] for one in files if one["name"].endswith((".safetensors", "classes.txt"))}


FIVES = ("optim.schedule=constant", "checkpoint.every=5")


@pytest.fixture(scope="module")
def whole(glyphs_ci, tmp_path_factory) -> Path:
    """Ten steps of two ranks, whose checkpoints are in its folder."""
    run = tmp_path_factory.mktemp("storage") / "whole"
    run_ranks(train_here, 2, run, glyphs_ci / "train", *FIVES, "run.steps=10")
    return run


@pytest.mark.slow
def test_another_machine_goes_on_bit_for_bit(s3, glyphs_ci, whole, tmp_path):  # noqa: F811
    data, url = glyphs_ci / "train", f"{BUCKET}/fresh"
    overrides = (*FIVES, f"checkpoint.dir={url}", "track.wandb=offline")
    on_s3(s3, 2, train_here, tmp_path / "run", data, *overrides, "run.steps=5")
    first, name = rows(tmp_path / "run"), (tmp_path / "run" / "wandb_id").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()
    shutil.rmtree(tmp_path / "run")
    on_s3(s3, 2, train_here, tmp_path / "run", data, *overrides, "run.steps=10")
    assert checksums(url) == checksums(whole)
    assert curve(tmp_path / "run") == curve(whole)
    assert rows(tmp_path / "run")[:5] == first and (tmp_path / "run" / "wandb_id").read_text() == name
    assert checkpoint.find_latest(tmp_path / "run").path == f"{url}/step_00000010"  # config.yaml says where
    shutil.rmtree(tmp_path / "run")  # a finished run is finished on yet another machine
    assert on_s3(s3, 2, train_here, tmp_path / "run", data, *overrides, "run.steps=10") == [True, True]
    assert len(rows(tmp_path / "run")) == 10 and (tmp_path / "run" / "config.yaml").exists()
    message = on_s3(s3, 2, train_and_catch, whole, data, *FIVES, f"checkpoint.dir={BUCKET}/none")
    assert message[0] == message[1] and "copy them there" in message[0]
    message = on_s3(s3, 2, train_and_catch, tmp_path / "new", data, *FIVES, "checkpoint.dir=s3://nobucket/a")
    assert message[0] == message[1] and "s3://nobucket/a/" in message[0] and "bucket does not exist" in message[0]


def test_a_folder_of_its_own_for_checkpoints(glyphs_ci, tmp_path):
    overrides = ("optim.schedule=constant", f"checkpoint.dir={tmp_path}/disk")
    train_here(tmp_path / "run", glyphs_ci / "train", *overrides, "run.steps=2")
    shutil.rmtree(tmp_path / "run")
    train_here(tmp_path / "run", glyphs_ci / "train", *overrides, "run.steps=4")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    found = checkpoint.find_checkpoint(tmp_path / "run")
    assert found.path == tmp_path / "disk" / "step_00000004" and checkpoint.find_checkpoint(tmp_path / "disk") == found


@pytest.mark.soak("storage")
def test_a_preempted_run_goes_on_with_nothing_but_the_url(s3, glyphs_ci, tmp_path):  # noqa: F811
    """SIGTERM on two ranks; another machine, which has three, trains, evaluates and reports."""
    run, url = tmp_path / "run", f"{BUCKET}/preempted"
    overrides = ("optim.schedule=constant", "checkpoint.every=100000", f"checkpoint.dir={url}")
    process = start(2, run, *overrides, "run.steps=2000", "data.workers=1")
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=None)
    saved = checkpoint.find_latest(url)
    assert saved is not None and saved.step >= 4, output
    assert (run / "preempted").read_text() == f"step {saved.step}\n"
    before = rows(run)
    shutil.rmtree(run)
    stop = saved.step + 3
    evaluated = f"evaluate.sets={{P2: {{data: {glyphs_ci}/test_unseen}}}}"
    output = finish(start(3, run, *overrides, f"run.steps={stop}", evaluated))
    assert f"from {saved.path}" in output and "TAR@1e-3" in output and (run / "report.html").exists()
    assert rows(run)[: saved.step] == before and rows(run)[-1]["step"] == stop
    run_ranks(train_here, 3, tmp_path / "whole", glyphs_ci / "train", overrides[0], f"run.steps={stop}")
    assert curve(run) == pytest.approx(curve(tmp_path / "whole"), rel=1e-4)
    assert json.loads(storage.read(f"{url}/evaluation.json")) == json.loads((run / "evaluation.json").read_text())


@pytest.mark.soak("storage")
def test_killed_in_the_middle_of_an_upload(s3, glyphs_ci, whole, tmp_path):  # noqa: F811
    run, url = tmp_path / "run", f"{BUCKET}/killed"
    overrides = (*FIVES, f"checkpoint.dir={url}", "run.steps=10")
    uploading, go_on = threading.Event(), threading.Event()

    def wait(method: str, key: str) -> None:
        if method == "PUT" and "/step_00000010/optimizer" in key:
            uploading.set()
            go_on.wait(60)

    s3.before = wait
    process = begin(2, run, *overrides, "evaluate.sets={}")
    wait_for(uploading.is_set, process)
    os.kill(process.pids[0], signal.SIGKILL)
    finish(process, code=1)
    s3.before = lambda method, key: None
    go_on.set()
    assert storage.glob(url, "step_00000010/centers_*") and checkpoint.find_latest(url).step == 5
    shutil.rmtree(run)
    on_s3(s3, 2, train_here, run, glyphs_ci / "train", *overrides)
    assert checksums(url) == checksums(whole) and curve(run) == curve(whole)


# ---- who reads checkpoints


@pytest.mark.slow
def test_a_url_stands_for_a_run(s3, glyphs_ci, tmp_path):  # noqa: F811
    run, url = tmp_path / "run", f"{BUCKET}/readers"
    sets = f"evaluate.sets={{P2: {{data: {glyphs_ci}/test_unseen}}}}"
    train_here(run, glyphs_ci / "train", "run.steps=2", f"checkpoint.dir={url}", sets)
    of_folder = evaluate_run(run, CPU)
    storage.remove(f"{url}/evaluation.json")
    assert evaluate_run(url, CPU) == of_folder == json.loads(storage.read(f"{url}/evaluation.json"))
    for source, out in ((run, "a"), (url, "b"), (f"{url}/step_00000002", "c")):
        export_run(source, tmp_path / out, gallery=True)
    for name in ("model.safetensors", "class_centers.safetensors", "classes.txt", "config.json", "README.md"):
        assert len({(tmp_path / out / name).read_bytes() for out in "abc"}) == 1, name
    assert "git_commit" in str(checkpoint.find_latest(url).read("config.yaml"))
    for source, out in ((url, "there.npy"), (run, "here.npy")):
        embed_images(source, glyphs_ci / "test_unseen", tmp_path / out, CPU, workers=0)
    assert (tmp_path / "there.npy").read_bytes() == (tmp_path / "here.npy").read_bytes()
    assert open_model(url).config["step"] == 2
    assert [one.step for one in checkpoints.complete_checkpoints(url)] == [2]
    there, here = (checkpoints.run_cosines(source, images=20)[2] for source in (url, run))
    assert str(there) == str(here)


@pytest.mark.soak("storage")
def test_what_a_save_costs(request, tmp_path, monkeypatch):
    """1 GB by one rank, locally and to PARTIAL_FC_STORE, a URL (unset: moto in this process); -s shows the seconds."""
    url = os.environ.get("PARTIAL_FC_STORE")
    if url is None:
        request.getfixturevalue("s3")
        # moto takes 15 s to join 512 MB, which is all that s3fs waits
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 300}})
        url = f"{BUCKET}/costs"
    head, (_, engine) = PartialFC(250_000, 512, CosFace()), trained(steps=0)
    (tmp_path / "names.txt").write_text("")
    options = dict(engine=engine, classes=tmp_path / "names.txt", settings={}, keep=1)
    for step in (1, 2, 3):
        for name, where in (("local", None), ("store", url)):
            begun, cpu = time.monotonic(), time.process_time()
            checkpoint.save(tmp_path, step, head=head, where=where, **options)
            saved, cpu_saved = time.monotonic(), time.process_time()
            found = checkpoint.find_latest(where or tmp_path)
            checkpoint.load(found, head=head, engine=engine, near=tmp_path)
            size = sum(entry["bytes"] for entry in found.files())
            print(
                f"{name}: {size / 1e9:.2f} GB saved in {saved - begun:.1f} s ({cpu_saved - cpu:.1f} s of CPU), "
                f"loaded in {time.monotonic() - saved:.1f} s ({time.process_time() - cpu_saved:.1f} s of CPU)"
            )
    storage.remove(url, folder=True)


def test_a_run_that_had_its_checkpoints_elsewhere_does_not_begin_anew(glyphs_ci, tmp_path):
    data, run, elsewhere = glyphs_ci / "train", tmp_path / "run", f"checkpoint.dir={tmp_path / 'elsewhere'}"
    run_ranks(train_here, 1, run, data, "run.steps=2", elsewhere)
    for changed in ((), (f"checkpoint.dir={tmp_path / 'third'}",)):
        with pytest.raises(AssertionError, match="elsewhere, where this run had them, does: put checkpoint.dir back"):
            run_ranks(train_here, 1, run, data, "run.steps=4", *changed)
    assert len(rows(run)) == 2
    run_ranks(train_here, 1, run, data, "run.steps=4", elsewhere)
    assert len(rows(run)) == 4


def test_an_upload_whose_last_answer_is_lost_is_made_again(s3, tmp_path, monkeypatch):  # noqa: F811
    """s3fs then says that the upload does not exist: it asks twice to join the parts of a large file."""
    files = fsspec.filesystem("s3")  # there is one of it
    original = files.put_file
    path, answers, put = tmp_path / "part", [FileNotFoundError("The specified upload does not exist"), None], []

    def put_file(*args):
        put.append(original(*args))
        if (error := answers[len(put) - 1]) is not None:
            raise error

    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.1, 0.1, 0.1))
    monkeypatch.setattr(files, "put_file", put_file)
    path.write_bytes(b"centers")
    storage.upload(path, f"{BUCKET}/part")
    assert len(put) == 2 and storage.read(f"{BUCKET}/part") == b"centers"
    answers += answers[:1] * 4
    with pytest.raises(OSError, match="cannot write s3://bucket/part, tried 4 times: .*upload does not exist"):
        storage.upload(path, f"{BUCKET}/part")
