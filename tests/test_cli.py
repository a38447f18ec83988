"""partial-fc as it is typed: an own folder into shards, a run evaluated on it, a report."""

import argparse
import ast
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from partial_fc import cli
from partial_fc.data.reader import images_in_order
from partial_fc.data.shards import load_index
from tests.conftest import REPOSITORY, run_ranks
from tests.processes import run_program
from tests.test_train import train_here


def partial_fc(*arguments: str | Path, code: int = 0) -> str:
    """What the command says."""
    done = run_program("partial-fc", *arguments, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(glyphs_ci, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("cli") / "run"
    run_ranks(train_here, 1, run, glyphs_ci / "train", "run.steps=5", "evaluate.untrained=false")
    return run


@pytest.fixture(scope="module")
def folder(glyphs_ci, tmp_path_factory) -> Path:
    """A folder of images per identity, larger than wanted, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    index = load_index(glyphs_ci / "test_seen")
    samples = np.flatnonzero(index.label < 25)
    numbers = iter(range(len(samples)))
    for batch in images_in_order(index, samples, 256, 0):
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            path = folder / f"person {label}" / f"{next(numbers)}.jpg"
            path.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(path), cv2.resize(image.transpose(1, 2, 0), (48, 48)))
    (folder / "person 0" / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.slow
def test_prepare_evaluate_report(run, folder, tmp_path):
    said = partial_fc("prepare", "folder", folder, tmp_path / "shards", "--size", "32", "--min-samples", "2")
    assert "25 identities" in said and "1 undecodable" in said
    index = load_index(tmp_path / "shards")
    assert index.num_classes == 25 and index.prepared["image_size"] == [32, 32]

    (run / "report.html").write_text("of the evaluation before")
    said = partial_fc("evaluate", run, "--data", f"mine={tmp_path}/shards", "--untrained")
    assert "TAR@1e-3" in said and "mine            untrained" in said
    assert f"report: {run}/report.html" in said and "<h3>mine</h3>" in (run / "report.html").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["config"]["optim"]["lr"] == 0.02 and set(evaluation["config"]["run"]) == {"seed"}
    assert evaluation["step"] == 5 and set(evaluation["models"]) == {"trained", "untrained"}
    assert evaluation["models"]["trained"]["mine"]["num_identities"] == 25

    assert f"report: {tmp_path}/page.html" in partial_fc("report", run, "--out", tmp_path / "page.html")
    assert "mine" in (tmp_path / "page.html").read_text()


def test_version_and_overrides_with_dashes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["partial-fc", "--version"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"partial_fc {project['version']}\n"
    given = []
    monkeypatch.setattr(cli.commands, "doctor", lambda arguments: given.extend(arguments.overrides))
    monkeypatch.setattr(sys, "argv", ["partial-fc", "doctor", "a.yaml", "--optim.lr=0.1", "run.steps=3"])
    cli.main()
    assert given == ["optim.lr=0.1", "run.steps=3"]


@pytest.mark.slow
def test_evaluate_takes_the_folder_of_one_checkpoint(run, glyphs_ci):
    checkpoint = run / "checkpoints" / "step_00000005"
    said = partial_fc("evaluate", checkpoint, "--data", glyphs_ci / "test_unseen")
    assert "test_unseen" in said and (checkpoint / "evaluation.json").exists()


@pytest.mark.slow
def test_a_set_that_cannot_be_evaluated_is_named(run, folder, tmp_path):
    partial_fc("prepare", "folder", folder, tmp_path / "large", "--size", "48")
    said = partial_fc("evaluate", run, "--data", f"big={tmp_path}/large", code=1)
    assert "evaluation set big: " in said and "images of (48, 48) pixels, the backbone is trained on (32, 32)" in said
    for person in folder.iterdir():
        (tmp_path / "single" / person.name).mkdir(parents=True)
        first = min(person.glob("[0-9]*.jpg"))
        (tmp_path / "single" / person.name / "a.jpg").write_bytes(first.read_bytes())
    partial_fc("prepare", "folder", tmp_path / "single", tmp_path / "one", "--size", "32")
    said = partial_fc("evaluate", run, "--data", f"one={tmp_path}/one", code=1)
    assert "evaluation set one: " in said and "25 identities of at most 1 samples" in said


@pytest.mark.slow
def test_distractors_that_are_in_the_set_are_pointed_out(run, glyphs_ci):
    said = partial_fc("evaluate", run, "--data", f"P={glyphs_ci}/test_seen,{glyphs_ci}/test_unseen")
    assert "warning: evaluation set P: " in said and "evaluating the trained backbone on P" in said


@pytest.mark.slow
def test_prepare_glyphs(tmp_path):
    options = ("--size", "16", "--ranges", "0041-005A", "--min-samples", "4", "--hold-out", "STIX")
    said = partial_fc("prepare", "glyphs", "letters", tmp_path / "letters", *options)
    assert f"{tmp_path}/letters/train: " in said and "left out: " in said
    assert load_index(tmp_path / "letters" / "train").prepared["image_size"] == [16, 16]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("prepare", "folder", "nowhere", "out"), "error: nowhere is no folder"),
        (
            ("prepare", "glyphs", "nowhere", "out"),
            "error: got the source 'nowhere', wanted small, medium, large, letters or a folder",
        ),
        (("evaluate", "nowhere"), "error: evaluating nowhere failed: nowhere holds no complete checkpoint"),
    ],
)
def test_errors_are_one_line(arguments, message):
    assert message in partial_fc(*arguments, code=1)


@pytest.mark.slow
def test_the_console_script():
    """The installed one, in an interpreter of its own."""
    command = [Path(sys.executable).with_name("partial-fc"), "report", "nowhere"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nowhere is no run folder")


# Forked after the imports, which take 3 s; a child ends as an interpreter does, down to the flush of its stdout.
WITHOUT_A_READER = """
import io, os, sys
from partial_fc import cli
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
table = ["study", "table", "configs/study/table1.yaml"]
short = ["study", "--help"]  # flushed at the end alone
for arguments, buffered in ((table, True), (short, False), (short, True), (["report", "nowhere"], True)):
    listening, saying = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(saying, 2)
        if not buffered:  # as PYTHONUNBUFFERED=1 makes it
            sys.stdout = sys.__stdout__ = io.TextIOWrapper(open(1, "wb", 0, closefd=False), write_through=True)
        sys.argv = ["partial-fc", *arguments]
        cli.main()
        break
    os.close(saying)
    with open(listening) as heard:
        text = heard.read()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), repr(text), file=sys.stderr)
else:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
"""


@pytest.mark.slow
def test_it_ends_quietly_when_its_reader_has_gone():
    """As in `partial-fc study table PLAN | head -1`, buffered and not; errors are said all the same."""
    command = [sys.executable, "-c", WITHOUT_A_READER]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    ends = [line.split(maxsplit=1) for line in done.stderr.splitlines()]
    assert done.returncode == 0 and done.stdout == "" and len(ends) == 4, done.stderr
    assert {code for code, _ in ends} <= {"0", "1"}, ends  # 120 is the interpreter's own complaint
    table, unbuffered, short, error = (ast.literal_eval(said) for _, said in ends)
    assert table == unbuffered == short == ""
    assert error.startswith("error: nowhere is no run folder") and error.count("\n") == 1


@pytest.mark.parametrize("stdout", [None, io.StringIO()], ids=["closed", "no descriptor"])
def test_a_broken_pipe_that_is_not_stdout_is_an_error(monkeypatch, tmp_path, stdout):
    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.commands, "report", broken)
    monkeypatch.setattr(sys, "argv", ["partial-fc", "report", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit, match="error: .*Broken pipe"):
        cli.main()


def test_an_interrupt_ends_it_without_a_traceback_and_cleans_up(monkeypatch, tmp_path):
    def interrupted(arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            (tmp_path / "partial").unlink()

    (tmp_path / "partial").touch()
    monkeypatch.setattr(cli.commands, "report", interrupted)
    monkeypatch.setattr(sys, "argv", ["partial-fc", "report", str(tmp_path)])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as end:  # the second would end pytest
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert getattr(end.value, "code", None) == 130 and not list(tmp_path.iterdir())


U = "s3://bucket/x"


def arguments_of(parser: argparse.ArgumentParser, *words: str) -> Iterator[tuple[str, argparse.Action, list[str]]]:
    """Every argument of every subcommand: how it is called, itself, and a command that gives it a URL."""
    places: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from arguments_of(below, *words, name)
            continue
        option = action.option_strings[:1]
        yield " ".join([*words, *(option or [action.dest])]), action, [*words, *places, *option, U]
        places += [] if option else ["x"]


ARGUMENTS = list(arguments_of(cli._parser()))
PATHS = {name: words for name, action, words in ARGUMENTS if action.type in (cli._path, cli._kind_or_path)}


def test_every_path_is_one_that_refuses_a_url():
    assert not [name for name, action, _ in ARGUMENTS if action.type is Path]
    known = {"prepare glyphs source", "doctor config", "report runs", "embed out", "study table --ledger"}
    assert known <= PATHS.keys() and not PATHS.keys() & {"evaluate path", "figures --runs", "embed model"}


@pytest.mark.parametrize("argument", PATHS)
def test_a_url_where_only_a_path_works_is_refused_by_name(argument, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["partial-fc", *PATHS[argument]])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    *command, name = argument.split()
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert re.search(
        rf"partial-fc {' '.join(command)}: error: argument {name}: {U} is a URL, and this takes a path", said
    )


def test_a_url_of_evaluation_data_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["partial-fc", "evaluate", "run", "--data", f"P1={U}"])
    with pytest.raises(SystemExit, match="error: s3://bucket/x is a URL, and this takes a path"):
        cli.main()


def test_a_table_of_a_ledger_that_is_not_there_is_refused(monkeypatch, tmp_path):
    words = ["study", "table", "configs/study/table1.yaml", "--ledger", str(tmp_path / "typo.jsonl")]
    monkeypatch.setattr(sys, "argv", ["partial-fc", *words])
    with pytest.raises(SystemExit, match="error: --ledger: .*typo.jsonl does not exist: give .*configs/study/ledger.j"):
        cli.main()


@pytest.mark.parametrize("sets, name", [(("A/test", "B/test"), "test"), (("P1=A", "P1=B,C"), "P1")])
def test_two_sets_of_one_name_are_refused(sets, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["partial-fc", "evaluate", "run", *(f"--data={text}" for text in sets)])
    with pytest.raises(SystemExit, match=f"error: --data: two sets are called {name}: give NAME=DIR"):
        cli.main()
