"""Several data sets as one: their samples, classes and weights; what is dropped and what is merged."""

import json
from pathlib import Path

import numpy as np
import pytest

from partial_fc.config import Data
from partial_fc.config_file import load_config
from partial_fc.data.groups import build_order
from partial_fc.data.sets import open_training_set
from partial_fc.data.shards import Index, Sample, load_index, verify, write_shards
from tests.conftest import run_ranks
from tests.http_store import serving
from tests.test_prepare_tars import image
from tests.test_train import CONFIG, rows, train_here

CLASSES = {"a": ["ann", "bob", "cid"], "b": ["bob", "dan"]}
SAMPLES = {"a": 12, "b": 8}


@pytest.fixture
def sets(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    for place, (name, classes) in enumerate(CLASSES.items()):
        samples = [
            Sample(image(100 * place + i), "png", i % len(classes), f"{i:02d}.png") for i in range(SAMPLES[name])
        ]
        write_shards(tmp_path / name, samples, classes, prepared={"image_size": [8, 8]}, shard_bytes=5000)
    return tmp_path


def settings(train: object, **more: object) -> Data:
    return Data.model_validate(dict(train=train, global_batch_size=4, streams=2, shuffle_window=6) | more)


def held(index: Index) -> set[tuple]:
    classes = index.classes()
    return {(index.read(i), classes[index.label[i]], index.name(i)) for i in range(index.num_samples)}


def of(sets: Path, called: dict[str, str]) -> set[tuple]:
    """What is to be held where SET/CLASS is `called` so; classes that are not in it are left out."""
    found = set()
    for name in CLASSES:
        for data, one, source in held(load_index(sets / name)):
            if f"{name}/{one}" in called:
                found.add((data, called[f"{name}/{one}"], source))
    return found


APART = {f"{name}/{one}": f"{name}/{one}" for name, classes in CLASSES.items() for one in classes}


def both(sets: Path) -> list[dict]:
    return [{"data": str(sets / name)} for name in CLASSES]


def test_classes_of_different_sets_stay_apart_unless_they_are_merged(sets):
    index = open_training_set(settings(both(sets)))
    verify(index)
    assert index.classes() == list(APART.values()) and held(index) == of(sets, APART)
    assert not [path for path in index.path.glob("*.tar") if not path.is_symlink()]
    assert open_training_set(settings(both(sets))).path == index.path  # made once

    by_name = open_training_set(settings(both(sets), merge="by_name"))
    assert by_name.classes() == ["ann", "bob", "cid", "dan"]
    assert held(by_name) == of(sets, {full: full[2:] for full in APART})

    (sets / "merge.tsv").write_text("b/dan\ta/ann\na/cid\tcecil\n")
    merged = open_training_set(settings(both(sets), merge=str(sets / "merge.tsv")))
    assert merged.classes() == ["a/ann", "a/bob", "cecil", "b/bob"]
    assert held(merged) == of(sets, APART | {"b/dan": "a/ann", "a/cid": "cecil"})
    (sets / "elsewhere").mkdir()
    (sets / "b").rename(sets / "elsewhere" / "b")  # the same content in another place
    moved = open_training_set(settings([{"data": str(sets / "a")}, {"data": str(sets / "elsewhere" / "b")}]))
    verify(moved)
    (sets / "elsewhere" / "b").rename(sets / "b")
    named = open_training_set(settings([{"data": str(sets / "a"), "name": "x"}, {"data": str(sets / "b")}]))
    assert named.classes()[0] == "x/ann"


def test_what_is_dropped_is_gone_and_no_shard_is_rewritten(sets):
    (sets / "drop.txt").write_text("a/bob\nb/00.png\n\nb/02.png\n")
    index = open_training_set(settings(both(sets), drop=str(sets / "drop.txt")))
    left = {full: full for full in APART if full != "a/bob"}
    gone = {row for row in of(sets, APART) if row[1].startswith("b/") and row[2] in ("00.png", "02.png")}
    assert len(gone) == 2 and held(index) == of(sets, left) - gone and index.classes() == list(left)
    assert index.prepared["dropped"] == 6
    (sets / "one.txt").write_text("bob\n03.png\n")  # of one set names are its own
    one = open_training_set(settings(str(sets / "a"), drop=str(sets / "one.txt")))
    assert one.classes() == ["ann", "cid"] and one.num_samples == 12 - 4 - 1
    plain = open_training_set(settings(str(sets / "a")))
    assert plain.path == sets / "a"


def test_a_weight_is_how_often_a_sample_comes(sets):
    train = both(sets)
    train[0]["weight"], train[1]["weight"] = 2, 0.5
    chosen = settings(train)
    index = open_training_set(chosen)
    order = build_order(chosen, index, seed=0)
    assert order.num_samples == 2 * 12 + 4 and order.steps_per_epoch == 7
    counts = [
        np.bincount(np.concatenate([order.batch(7 * epoch + step) for step in range(7)]), minlength=20)
        for epoch in range(2)
    ]
    assert all((count[:12] == 2).all() and count[12:].sum() == 4 for count in counts)
    assert (sum(counts)[12:] == 1).all()
    alone = build_order(settings([train[0]]), load_index(sets / "a"), seed=0)
    assert alone.num_samples == 24


def test_errors_of_a_list_name_the_set():
    for train, said in (
        ([{"data": "a", "wieght": 2}], "data.train.0.wieght: unknown key; did you mean data.train.0.weight"),
        ([{"data": "a"}, {"weight": 2}], "data.train.1.data: missing"),
        ([{"data": "a", "weight": 0}], "data.train.0.weight: got 0; Input should be greater than or equal to 0.001"),
        ([], r"data.train: got \[\]"),
        ({"a": 3}, "data.train: got .*valid string"),
    ):
        with pytest.raises(ValueError, match=said):
            load_config(CONFIG, [f"data.train={json.dumps(train)}"])


def test_a_set_may_lie_behind_a_url(sets):
    with serving(sets) as store:
        index = open_training_set(settings([{"data": f"{store.url}/a"}, {"data": str(sets / "b")}]))
        verify(index)
        assert held(index) == of(sets, APART)
        assert [shard.url is None for shard in index.shards].count(True) == len(load_index(sets / "b").shards)


@pytest.mark.parametrize(
    "train, more, said",
    [
        (["a", "a"], {}, "two sets are called 'a'"),
        (["a", "large"], {}, r"large has images of \(9, 9\) pixels, .*a of \(8, 8\)"),
        (["a", "pairs"], {}, "pairs is a list of pairs"),
        (["sizeless", "a"], {}, "sizeless: index.json has no prepared.image_size"),
        (["a", "b"], {"drop": "nobody"}, "data.drop: 'nobody' is neither a class nor the source name of a sample"),
        (["a", "b"], {"drop": "a/ann\na/bob\na/cid\nb/bob\nb/dan"}, "data.drop leaves no sample"),
        (["a", "b"], {"merge": "a/zoe\tx"}, "data.merge: 'a/zoe' is no class of data.train"),
        (["a", "b"], {"merge": "a/ann\tx\na/ann\ty"}, "line 2: got 'a/ann' as 'y', before as 'x': wanted one"),
        (["a", "b"], {"merge": "a/ann b/bob"}, "line 1: got .*wanted a class as classes.txt names it, a tab"),
    ],
)
def test_what_does_not_fit_is_named(sets, train, more, said):
    sample = [Sample(image(1, size=(9, 9)), "png", 0, "1")]
    write_shards(sets / "large", sample, ["a"], prepared={"image_size": [9, 9]})
    write_shards(sets / "sizeless", [Sample(image(1), "png", 0, "1")], ["a"], prepared={})
    options = dict(prepared={"image_size": [8, 8]}, pairs=np.array([[0, 1, 0]]))
    write_shards(sets / "pairs", [Sample(image(i), "png", i, "") for i in range(2)], ["a", "b"], **options)
    files = {}
    for name, text in more.items():
        (sets / name).write_text(text)
        files[name] = str(sets / name)
    with pytest.raises(ValueError, match=said):
        open_training_set(settings([{"data": str(sets / one)} for one in train], **files))


def test_a_run_trains_on_several_sets_and_does_not_go_on_with_other_weights(glyphs_ci, tmp_path, monkeypatch):
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    made = load_index(glyphs_ci / "train")
    for name, samples in (("x", range(300)), ("y", range(300, 500))):
        rows_of = (Sample(made.read(i), "png", int(made.label[i]), str(i)) for i in samples)
        write_shards(tmp_path / name, rows_of, made.classes(), prepared=made.prepared)
    sets = f"[{{data: {tmp_path}/x, weight: 0.5}}, {{data: {tmp_path}/y}}]"
    options = ("run.steps=4", "evaluate.sets={}", "checkpoint.every=2", "data.merge=by_name")
    run_ranks(train_here, 1, tmp_path / "run", sets, *options)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == pytest.approx(
        [24 * s / 350 for s in range(1, 5)], rel=0.1
    )
    with pytest.raises(AssertionError, match="data.train weights"):
        run_ranks(train_here, 1, tmp_path / "run", sets.replace("0.5", "2"), "run.steps=6", *options[1:])
