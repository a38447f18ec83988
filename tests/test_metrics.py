"""What a run says."""

import json

import pytest

from partial_fc.config_file import load_config
from partial_fc.metrics import console_line, cut_back, wandb_mode
from tests.conftest import REPOSITORY

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


def test_wandb_key_in_netrc(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(load_config(REPOSITORY / "configs" / "glyphs_ci.yaml")) == "online"
