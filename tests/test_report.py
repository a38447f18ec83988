"""The report of real run folders: complete, half-empty and several; one file that asks for nothing outside."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

from partial_fc.data.shards import load_index
from partial_fc.evaluate.protocol import evaluate_sets
from partial_fc.phases import NAMES
from partial_fc.report import plots
from partial_fc.report.page import renew_report, write_report
from tests.test_embed import OPTIONS, backbone, write_images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a real evaluation of a backbone on real shards."""
    folder = tmp_path_factory.mktemp("report")
    data = write_images(folder / "set", identities=24, samples=3)
    distractors = write_images(folder / "distractors", identities=11, samples=2)
    sets = {"P1": (data, None), "P3": (data, distractors)}
    net = backbone()
    trained = evaluate_sets(net, sets, batch_size=32, **OPTIONS)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    untrained = evaluate_sets(net, sets, batch_size=32, **OPTIONS)
    write_run(folder / "first", {"trained": trained, "untrained": untrained}, lr=0.1)
    return folder / "first"


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The report of that run alone; each costs a second."""
    return report([run], tmp_path_factory.mktemp("page") / "report.html")


def write_run(folder, models, lr):
    folder.mkdir()
    config = {
        "run": {"seed": 7},
        "backbone": {"name": "smallnet"},
        "optim": {"lr": lr, "note": "<script>alert(1)</script>"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": step, "loss": 9 / step, "lr": lr, "samples_per_second": 100.0, "data_wait": 0.1, "step_time": 0.4}
        for step in range(1, 900)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if models is not None:
        evaluation = {"format": "partial_fc-evaluation", "version": 1, "step": 899, "models": models}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))


class Page(HTMLParser):
    """The page's text, its attributes, and whether its tags close in order."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.attributes, self.parts = [], [], []
        self.feed(self.source)
        assert self.open == []
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.parts.append(data)


def report(runs, out):
    write_report(runs, out)
    return Page(out)


def test_a_complete_run(run, page):
    evaluation = json.loads((run / "evaluation.json").read_text())
    for model in ("trained", "untrained"):
        for name in ("P1", "P3"):
            assert f"{100 * evaluation['models'][model][name]['rank1']:.1f}" in page.text
    assert "72 samples of 24 identities" in page.text
    assert "11 distractors" in page.text
    for title in ("Loss", "Learning rate", "Samples per second", "Share of the step", "P1 and P3, trained"):
        assert title in page.text
    assert "mathdefault" not in page.text and "10⁻²" in page.text  # axes of powers of ten
    for label, plots_of_it in (("false accept rate", 1), ("true accept rate", 1), ("share of the pairs", 2)):
        assert len(re.findall(rf"<text[^>]*>{label}</text>", page.source)) == plots_of_it, label
    assert "trained on after" not in page.text and "changed since" not in page.text
    assert "Target cosine" not in page.text  # the metrics have none
    assert "<script>" not in page.source  # what a config says is text
    assert "alert(1)" in page.text


def test_the_page_asks_for_nothing_outside(page):
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert not {tag for tag, *_ in page.attributes} & {"link", "script", "iframe", "object"}
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_the_images_are_those_of_the_data_set(run, page):
    result = json.loads((run / "evaluation.json").read_text())["models"]["trained"]["P1"]
    index = load_index(result["data"])
    shown = [base64.b64decode(v.partition(",")[2]) for tag, name, v in page.attributes if (tag, name) == ("img", "src")]
    wanted = []
    for group in ("right", "wrong", "hardest"):
        for pair in result["examples"][group]:
            for sample in (pair["a"], pair["b"]):
                data = Path(index.shard_of(sample)).read_bytes()
                wanted.append(data[index.offset[sample] : index.offset[sample] + index.size[sample]])
    assert shown == wanted
    assert all(image.startswith(b"\x89PNG") for image in shown)


def test_ids_are_unique_and_references_are_kept(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(ids)
    assert {v[1:] for _, name, v in page.attributes if name == "href"} <= set(ids)


def test_colors_come_from_the_style_sheet(page):
    drawings = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    assert len(drawings) == 7  # four curves, a ROC, two histograms
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "#0" not in re.sub(r'(url\(|href=")#', "", drawing)  # no placeholder is left
        for variable in re.findall(r"var\((--[\w-]+)\)", drawing):
            assert page.source.count(f"{variable}: ") == 2, variable  # light and dark


def test_the_same_runs_give_the_same_bytes(run, page, tmp_path):
    write_report([run], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page.source


def test_several_runs_are_compared(run, tmp_path):
    models = json.loads((run / "evaluation.json").read_text())["models"]
    write_run(tmp_path / "second", models, lr=0.2)
    page = report([run, tmp_path / "second"], tmp_path / "report.html")
    assert "2 runs compared" in page.text
    assert "optim.lr 0.1 0.2" in page.text
    assert "first, untrained" in page.text
    assert "second, untrained" in page.text
    assert "P1 and P3, second" in page.text


@pytest.mark.slow
def test_runs_evaluated_on_different_data_are_not_passed_off_as_comparable(run, page, tmp_path):
    models = json.loads((run / "evaluation.json").read_text())["models"]
    assert "different data" not in page.text
    for sets in models.values():
        sets["P1"]["num_samples"] = 71
    write_run(tmp_path / "other", models, lr=0.1)
    page = report([run, tmp_path / "other"], tmp_path / "report.html")
    assert page.text.count("evaluated on different data") == 1
    assert "71 samples of 24 identities" in page.text
    first, second = page.source.split("<h3>P1</h3>")[1].split("<h3>P3</h3>")
    assert "value best" not in first and "value best" in second.split("</table>")[0]


def test_a_run_that_was_trained_on_says_which_step_its_results_are_of(tmp_path):
    write_run(tmp_path / "continued", {"trained": {}}, lr=0.1)
    (tmp_path / "continued" / "metrics.jsonl").write_text('{"step": 899}')  # no curves: each takes a tenth of a second
    file = tmp_path / "continued" / "evaluation.json"
    evaluation = json.loads(file.read_text()) | {"config": {"optim": {"lr": 0.2}, "run": {"seed": 7}}}
    file.write_text(json.dumps(evaluation))
    page = report([tmp_path / "continued"], tmp_path / "report.html")
    changed = "Settings changed since then: learning rate 0.2 → 0.1."
    assert f"continued shows the results of step 899. {changed}" in page.text
    file.write_text(json.dumps(evaluation | {"step": 500}))
    page = report([tmp_path / "continued"], tmp_path / "report.html")
    assert f"trained on after its evaluation: the results are those of step 500, it is at 899. {changed}" in page.text
    file.write_text(json.dumps({name: value for name, value in evaluation.items() if name != "config"} | {"step": 500}))
    page = report([tmp_path / "continued"], tmp_path / "report.html")
    assert "the results are those of step 500, it is at 899." in page.text and "changed since" not in page.text


def test_a_page_is_renewed_after_an_evaluation(tmp_path):
    write_run(tmp_path / "run", None, lr=0.1)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    page = tmp_path / "run" / "report.html"
    assert renew_report(tmp_path / "run") == "" and not page.exists()
    page.write_text("the page before")
    assert renew_report(tmp_path / "run") == f"report: {page}" and "<title>run " in page.read_text()
    write_report([tmp_path / "run", tmp_path / "run"], page)
    before = page.read_text()
    assert renew_report(tmp_path / "run").endswith(
        "report.html compares several runs and shows the evaluation before: write it again"
    )
    assert page.read_text() == before


def test_an_unfinished_run_says_what_it_lacks(tmp_path):
    write_run(tmp_path / "young", None, lr=0.1)
    with (tmp_path / "young" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 900, "lo')  # it is being written
    page = report([tmp_path / "young"], tmp_path / "report.html")
    assert "Nothing has been evaluated yet" in page.text
    assert "young has not been evaluated yet (no evaluation.json)" in page.text
    assert "899" in page.text

    (tmp_path / "new").mkdir()
    (tmp_path / "young" / "config.yaml").rename(tmp_path / "new" / "config.yaml")
    page = report([tmp_path / "new"], tmp_path / "report.html")
    assert "No training steps have been logged yet" in page.text
    page = report([tmp_path / "young", tmp_path / "new"], tmp_path / "report.html")
    assert "young has no config.yaml" in page.text
    assert "new has logged no step yet" in page.text


def test_a_data_set_that_is_gone_is_said(run, tmp_path):
    evaluation = json.loads((run / "evaluation.json").read_text())
    for result in evaluation["models"]["trained"].values():
        result["data"] = str(tmp_path / "gone")
    write_run(tmp_path / "moved", evaluation["models"], lr=0.1)
    page = report([tmp_path / "moved"], tmp_path / "report.html")
    assert "the data set cannot be read any more" in page.text
    assert str(tmp_path / "gone") in page.text


def test_values_that_a_set_cannot_show_are_dashes_with_the_reason(page):
    assert "the 2,484 impostor pairs are too few" in page.text
    assert page.source.count("<td>–</td>") == 3 * 2 * 2  # 1e-4, 1e-5 and DIR, trained and untrained, two sets
    assert "for the DIR: it needs 100 probes" in page.text


def test_broken_inputs_are_errors_that_name_the_file(run, tmp_path):
    with pytest.raises(ValueError, match="got no run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="nowhere is no run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no config.yaml, metrics.jsonl or evaluation.json: give a run's"):
        write_report([run, tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(
        ValueError, match="empty is a folder, wanted a file: give another --out, as .*empty/report.html"
    ):
        write_report([run], tmp_path / "empty")
    with pytest.raises(ValueError, match="evaluation.json is a file, wanted a folder: give another --out"):
        write_report([run], run / "evaluation.json" / "report.html")
    write_run(tmp_path / "damaged", None, lr=0.1)
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is no JSON"):
        write_report([tmp_path / "damaged"], tmp_path / "report.html")
    evaluation = json.loads((run / "evaluation.json").read_text())
    (tmp_path / "damaged" / "evaluation.json").write_text(json.dumps(evaluation | {"version": 3}))
    with pytest.raises(ValueError, match="reads up to 2"):
        write_report([tmp_path / "damaged"], tmp_path / "report.html")


def test_a_resumed_run_shows_a_step_once(tmp_path):
    write_run(tmp_path / "resumed", None, lr=0.1)
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 899, "loss": 123.0}) + "\n")
    page = report([tmp_path / "resumed"], tmp_path / "report.html")
    assert "123" in page.text  # the later row counts: it is the curve's last value


def test_plots_take_what_a_broken_or_short_run_logs():
    one = np.array([1.0])
    assert "<svg" in plots.curves("a", [plots.Series("x", one, one, 0)])
    assert "<svg" in plots.curves("b", [plots.Series("x", np.arange(3.0), np.array([1, np.nan, np.inf]), 0)])
    assert "<svg" in plots.roc("c", [plots.Series("x", np.array([0.0, 1.0]), one.repeat(2), None)])
    edges, counts = np.linspace(-1, 1, 5), np.array([0.0, 0, 0, 9])
    assert "<svg" in plots.histogram("d", edges, counts, counts, [])


def test_where_the_time_of_a_step_goes(page, tmp_path):
    assert "Where a step" not in page.text
    write_run(tmp_path / "timed", None, lr=0.1)
    rows = [
        {"step": step, "loss": 1.0} | {f"phase.{name}": 0.01 for name in NAMES} | {"phase.backward": 0.09}
        for step in (10, 20)
    ]
    (tmp_path / "timed" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report([tmp_path / "timed"], tmp_path / "report.html")
    # ten phases: nine of 10 ms, the backward of 90; head and update are one color, so are wait, optimizer, log, save
    for label in ("backward 50%", "head 11%", "gather 6%", "data 6%", "the rest 22%"):
        assert label in page.text, label
