"""What a run says."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from partial_fc.config_file import load_config
from partial_fc.data.remote import Fetches
from partial_fc.head.margins import CosFace
from partial_fc.head.observed import Observed
from partial_fc.head.partial_fc import PartialFC
from partial_fc.metrics import Metrics, RankTimes, console_line, cut_back
from partial_fc.parallel import distributed
from partial_fc.phases import Phases
from partial_fc.progress import Progress
from partial_fc.trackers import start_tensorboard, start_wandb, wandb_mode
from tests.conftest import REPOSITORY, run_ranks

ROW = {
    "step": 40, "epoch": 0.25, "loss": 12.3456, "lr": 0.05, "samples_per_second": 1234.5, "step_time": 0.2,
    "data_wait": 0.01, "target_cosine": 0.31, "memory": 3 * 2**29, "skipped_steps": 0, "undecodable": 0,
}  # fmt: skip


def test_console_line_reads():
    line = console_line(ROW, 1200, 3700)
    assert line == (
        "step   40/1200 | epoch  0.25 | loss 12.3456 | cos  0.310 | lr 5.00e-02 |   1234 samples/s | "
        " 200 ms/step,  5% of it waiting for data | 1.50 GiB | 1:01:40 left"
    )
    troubled = console_line(ROW | {"skipped_steps": 2, "undecodable": 3}, 1200, 5)
    assert troubled.endswith("0:00:05 left | skipped 2 | undecodable 3")


def test_a_row_of_skipped_steps_alone_reads_too():
    line = console_line(ROW | {"loss": None, "target_cosine": None, "skipped_steps": 10}, 1200, 5)
    assert "loss       – | cos      – | lr" in line


def test_cut_back_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_back(path, 5)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6, 8)) + '{"step": 1')
    cut_back(path, 6)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 6}\n'


@pytest.mark.parametrize(
    "line", [b'{"step": 4, "loss', b"\0\0\0", b"[" * 9000, b"[]", b'{"step": "4"}', b"{}", b"\xff"]
)
def test_a_line_that_is_no_row_costs_no_other(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2}\n' + line + b'\n{"step": 6}\n{"step": 8}\n')
    cut_back(path, 6)
    assert path.read_text() == '{"step": 2}\n{"step": 6}\n'


@pytest.mark.parametrize(
    "setting, environment, mode",
    [
        ("null", {}, "offline"),
        ("null", {"WANDB_API_KEY": "k"}, "online"),
        ("null", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "disabled"),
        ("online", {}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_wandb_mode(setting, environment, mode, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", [f"track.wandb={setting}"])) == mode


def test_disabled_wandb_leaves_nothing(tmp_path):
    config = load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", ["track.wandb=disabled"])
    assert start_wandb(config, tmp_path) is None and not list(tmp_path.iterdir())


def test_the_console_names_the_slowest_rank_where_it_matters():
    row = ROW | {"slowest_rank": 3, "slowest_lag": 0.05, "slowest_phase": "data"}
    assert console_line(row, 1200, 5).endswith("0:00:05 left | rank 3 last by 50 ms (data)")
    assert "rank 3" not in console_line(row | {"slowest_lag": 0.01}, 1200, 5)


def test_the_numbers_of_a_batch():
    cosine = torch.linspace(0, 1, 11, dtype=torch.float64)
    lengths = torch.arange(12.0, dtype=torch.float64)
    real = torch.tensor([True] * 11 + [False])
    seen = Observed(torch.cat([cosine, torch.tensor([5.0])]), lengths, 2 * lengths, real)
    assert seen.numbers() == pytest.approx(
        {
            "target_cosine": 0.5,
            "center_norm": 5.0,
            "embedding_norm": 10.0,
            "target_cosine_q10": 0.1,
            "target_cosine_q50": 0.5,
            "target_cosine_q90": 0.9,
        }
    )
    assert seen.mean_cosine().item() == pytest.approx(0.5)
    nobody = seen._replace(real=torch.zeros(12, dtype=torch.bool))
    assert all(math.isnan(value) for value in nobody.numbers().values()) and nobody.mean_cosine() == 0


@pytest.mark.slow
def test_what_a_head_observes_is_true_at_two_ranks():
    for seen, cosine, norm, length in run_ranks(observed, 2):
        assert seen["target_cosine"] == pytest.approx(cosine, abs=1e-6)
        assert seen["center_norm"] == pytest.approx(norm, abs=1e-6)
        assert seen["embedding_norm"] == pytest.approx(length, abs=1e-5)


def observed():
    rank = distributed.rank()
    head = PartialFC(7, 4, CosFace(scale=8, margin=0.1), init_std=0.3)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 6, 6])
    cut = slice(0, 2) if rank == 0 else slice(2, 6)
    head(x[cut].clone().requires_grad_(), labels[cut])
    w = head.full_weight()[labels]
    cosine = torch.nn.functional.cosine_similarity(x, w).mean().item()
    return head.observed.numbers(), cosine, w.norm(dim=1).mean().item(), x.norm(dim=1).mean().item()


def test_tensorboard_of_a_resumed_run_shows_every_step_once(tmp_path):
    config = load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", ["track.tensorboard=true"])
    for start, steps in ((0, range(1, 8)), (4, range(5, 11))):  # the first is killed after 7, its checkpoint is of 4
        writer = start_tensorboard(config, tmp_path, start)
        for step in steps:
            writer.add_scalar("loss", start + step, step)
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(step, step if step <= 4 else 4 + step) for step in range(1, 11)]
    assert start_tensorboard(load_config(REPOSITORY / "configs" / "glyphs_ci.yaml"), tmp_path, 0) is None


def open_metrics(run: Path, wandb: str) -> Metrics:
    config = load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", [f"track.wandb={wandb}"])
    return Metrics(config, run, start_step=0, total_steps=10, steps_per_epoch=10)


def write_row(metrics: Metrics) -> None:
    phases = Phases(torch.device("cpu"))
    phases.begin("data")
    numbers = dict(loss=1.0, lr=0.1, batch={"target_cosine": 0.1}, head={"t": math.nan}, engine={}, progress=Progress())
    metrics.row(10, ranks=RankTimes.gather(phases, Fetches()), **numbers)


@pytest.mark.slow
def test_wandb_that_fails_costs_what_it_tracks_and_not_the_run(tmp_path, capsys):
    metrics = open_metrics(tmp_path, "offline")
    metrics.wandb.finish()  # it raises at every call from now on
    write_row(metrics)
    metrics.close()
    said = capsys.readouterr()
    assert re.search("wandb: .*: nothing more goes to it", said.err) and "step 10/10" in said.out
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 10


def test_a_full_disk_costs_rows_and_not_the_run(tmp_path, capsys):
    metrics = open_metrics(tmp_path, "disabled")
    metrics.file.close()
    metrics.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - metrics closes it
    write_row(metrics)
    metrics.close()
    said = capsys.readouterr()
    assert "metrics: step 10 is not written: [Errno 28]" in said.err and "last rows are not written" in said.err
    assert "step 10/10" in said.out
