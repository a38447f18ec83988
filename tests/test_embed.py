"""Embedding a data set and the evaluation protocol, on small real shards, by any number of ranks."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from partial_fc.backbone import build
from partial_fc.data.reader import images_in_order, normalize
from partial_fc.data.shards import load_index, write_shards
from partial_fc.evaluate.embed import embed
from partial_fc.evaluate.identification import identify
from partial_fc.evaluate.pairs import all_pairs
from partial_fc.evaluate.protocol import evaluate_set, evaluate_sets, format_table, verify
from partial_fc.evaluate.verification import tar_at_far
from tests.conftest import run_ranks

OPTIONS = {"device": torch.device("cpu"), "mean": 127.5, "std": (128.0, 64.0, 32.0)}


def write_images(out: Path, identities: int, samples: int, broken: int | None = None):
    """Shapes of one color and place an identity, with noise; sample number `broken` is no image."""
    rng = np.random.default_rng(identities)
    classes = rng.integers(0, 256, size=(identities, 3))
    places = rng.integers(4, 20, size=(identities, 2))
    encoded = []
    for label in rng.permutation(np.repeat(np.arange(identities), samples)):
        image = np.full((32, 32, 3), 128, dtype=np.uint8)
        cv2.circle(image, places[label].tolist(), 8, classes[label].tolist(), -1)
        noisy = np.clip(image + rng.normal(0, 40, image.shape), 0, 255).astype(np.uint8)
        encoded.append((cv2.imencode(".png", noisy)[1].tobytes(), "png", int(label)))
    if broken is not None:
        encoded[broken] = (b"not an image", "png", encoded[broken][2])
    return write_shards(
        out,
        encoded,
        [f'shape {i}"><script>alert({i})</script>' for i in range(identities)],
        prepared={"image_size": [32, 32], "kind": "test"},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    write_images(folder / "set", identities=24, samples=3)
    write_images(folder / "distractors", identities=11, samples=2)
    write_images(folder / "tiny", identities=3, samples=2)
    write_images(folder / "broken", identities=4, samples=4, broken=13)
    return folder


def backbone():
    torch.manual_seed(0)
    return build("smallnet", 16, (32, 32))


def embed_set(path, batch_size, samples=None, flip=False):
    return embed(backbone(), load_index(path), samples, batch_size=batch_size, flip=flip, **OPTIONS)


def test_normalize():
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalize(images, 100, 50).flatten().tolist() == [-2, 0, 2]
    assert normalize(images, [0, 50, 100], [1, 5, 100]).flatten().tolist() == [0, 10, 1]
    assert normalize(images, 100, 50).dtype == torch.float32


@pytest.mark.parametrize("flip", [False, True])
def test_embeddings_are_those_of_the_backbone(data, flip):
    index = load_index(data / "set")
    images = next(iter(images_in_order(index, np.arange(index.num_samples), index.num_samples, 0))).images
    net = backbone().eval()
    with torch.no_grad():
        inputs = normalize(images, OPTIONS["mean"], OPTIONS["std"])
        wanted = net(inputs) + (net(inputs.flip(3)) if flip else 0)
    got = embed_set(data / "set", 10, flip=flip)
    torch.testing.assert_close(got, torch.nn.functional.normalize(wanted), rtol=0, atol=1e-6)
    assert got.dtype == torch.float32
    assert not got.requires_grad


def test_samples_are_embedded_in_the_order_given(data):
    everything = embed_set(data / "set", 10)
    chosen = np.array([5, 70, 0, 5])
    torch.testing.assert_close(embed_set(data / "set", 10, chosen), everything[chosen], rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 40, 100])  # 11 batches; 2: a rank of three has none; 1
def test_embeddings_are_the_same_on_any_number_of_ranks(data, world_size, batch_size):
    wanted = embed_set(data / "set", batch_size)
    for got in run_ranks(embed_set, world_size, data / "set", batch_size):
        assert torch.equal(got, wanted)


def test_the_training_mode_of_every_module_is_restored(data):
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3), backbone()).train()
    net[1].eval()  # a frozen part of a net in training
    before = [module.training for module in net.modules()]
    statistics = [buffer.clone() for buffer in net.buffers()]
    embed(net, load_index(data / "tiny"), batch_size=4, **OPTIONS)
    assert [module.training for module in net.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(statistics, net.buffers(), strict=True))


def embed_broken(path):
    try:
        embed_set(path, 4)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_bad_sample_is_an_error_on_every_rank(data, world_size):
    for message in run_ranks(embed_broken, world_size, data / "broken"):
        assert "sample 000000013" in message


def test_an_embedding_that_is_not_finite_names_its_sample(data):
    net = backbone()
    with torch.no_grad():
        next(iter(net.parameters())).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="sample 000000000 is not finite"):
        embed(net, load_index(data / "tiny"), batch_size=4, **OPTIONS)


def test_no_samples_are_an_error(data):
    with pytest.raises(ValueError, match="got no samples"):
        embed_set(data / "tiny", 4, np.array([], dtype=np.int64))


def evaluate(folder):
    sets = {
        "plain": (load_index(folder / "set"), None),
        "large": (load_index(folder / "set"), load_index(folder / "distractors")),
        "tiny": (load_index(folder / "tiny"), None),
    }
    return evaluate_sets(backbone(), sets, batch_size=8, seed=4, **OPTIONS)


@pytest.fixture(scope="module")
def results(data) -> dict:
    return evaluate(data)


def test_a_result_is_what_its_parts_measure(data, results):
    result = results["plain"]
    index, embeddings = load_index(data / "set"), embed_set(data / "set", 8)
    pairs = all_pairs(embeddings, index.label, max_far=1e-3)
    tar, threshold, reached = pairs.tar_at_far(1e-3)
    assert result["tar_at_far"]["0.001"] == {"tar": tar, "far": reached, "threshold": threshold}
    assert result["rank1"] == identify(embeddings, index.label, seed=4).rank1
    assert result["dir_at_far"] == {"0.01": None}  # 36 probes of unknown identities, and 0.36 of them may be accepted
    assert (result["num_samples"], result["num_identities"]) == (72, 24)
    assert (result["num_genuine"], result["num_impostor"]) == (24 * 3, 72 * 71 // 2 - 72)
    histogram = result["histogram"]
    assert sum(histogram["genuine"]) == result["num_genuine"]
    assert sum(histogram["impostor"]) == result["num_impostor"]
    assert 0.5 < result["fold_accuracy"] <= 1


def test_scores_of_the_examples_are_those_of_their_samples(data, results):
    result = results["plain"]
    labels, embeddings = load_index(data / "set").label, embed_set(data / "set", 8)
    for group, examples in result["examples"].items():
        for pair in examples:
            score = float(embeddings[pair["a"]] @ embeddings[pair["b"]])
            assert pair["score"] == pytest.approx(score, abs=1e-6)
            assert pair["same"] == (labels[pair["a"]] == labels[pair["b"]])
        assert {pair["same"] for pair in examples} == {True, False}, group
    hardest = result["examples"]["hardest"]
    scores = (embeddings @ embeddings.T).numpy()
    different = labels[:, None] != labels[None]
    assert hardest[0]["score"] == pytest.approx(scores[different].max(), abs=1e-6)
    assert hardest[6]["score"] == pytest.approx(scores[~different].min(), abs=1e-6)


def test_distractors_enlarge_the_gallery_alone(results):
    plain, large = results["plain"], results["large"]
    assert large["num_distractors"] == 11  # one sample of each identity
    assert plain["num_distractors"] == 0
    assert large["rank1"] <= plain["rank1"]
    verification = set(plain) - {"rank1", "cmc", "distractors", "num_distractors"}
    assert {key: plain[key] for key in verification} == {key: large[key] for key in verification}


def test_what_a_small_set_cannot_show_is_null_and_said_so(results):
    tiny = results["tiny"]  # 6 samples: 12 impostor pairs
    assert tiny["tar_at_far"] == {"0.001": None, "0.0001": None, "1e-05": None}
    assert tiny["fold_accuracy"] is None
    assert results["plain"]["tar_at_far"]["0.0001"] is None  # 2,484 impostor pairs
    text = format_table({"trained": results, "untrained": {"tiny": tiny}})
    assert "tiny: – where the 12 impostor pairs are too few" in text
    assert "1,000 for FAR 1e-3 and 10,000 for FAR 1e-4" in text
    rows = [line.split() for line in text.splitlines()]
    assert [f"{results['plain']['rank1']:.4f}" in row for row in rows if row[0] == "plain"] == [True]
    assert tiny["dir_at_far"]["0.01"] is None and "tiny: – for the DIR: it needs 100 probes" in text
    assert ["tiny", "untrained", "–", "–", "–", "–", f"{tiny['rank1']:.4f}", "–"] in rows
    assert ["trained", "–", "–", "–", "–", f"{tiny['rank1']:.4f}", "–"] in rows


@pytest.mark.slow
def test_results_are_json_and_the_same_on_any_number_of_ranks(data, results):
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    for world_size in (2, 3):
        assert run_ranks(evaluate, world_size, data) == [results] * world_size


def test_one_set_alone(data, results):
    index, distractors = load_index(data / "set"), load_index(data / "distractors")
    alone = evaluate_set(backbone(), index, distractors, batch_size=8, seed=4, **OPTIONS)
    assert alone == results["large"]


def test_verification_of_perfect_embeddings():
    labels = np.arange(60) // 2
    result = verify(torch.eye(30)[labels], labels, seed=0)
    assert result["fold_accuracy"] == 1.0
    assert result["tar_at_far"]["0.001"]["tar"] == 1.0
    assert result["tar_at_far"]["0.001"]["far"] == 0.0
    score = (torch.eye(30)[labels] @ torch.eye(30)[labels].T).numpy()[np.triu_indices(60, 1)]
    same = (labels[:, None] == labels[None])[np.triu_indices(60, 1)]
    assert tar_at_far(score, same, 1e-3)[0] == 1.0
    assert result["examples"]["wrong"] == []
    assert result["roc"][-1] == [1.0, 1.0]
