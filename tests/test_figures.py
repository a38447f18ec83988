"""Figures: curves equal the margins' formulas, boundaries solve their equation, and every picture can be drawn."""

import gzip
import json
import math
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from partial_fc import ArcFace, CosFace, NormSoftmax, SoftMarginSoftmax, Softmax, SphereFace, checkpoint, cli
from partial_fc.build import build
from partial_fc.evaluate.protocol import FARS
from partial_fc.figures import NAMES, boundaries, checkpoints, features, gradient, psi, quality, style, verification
from partial_fc.figures.cosines import BINS, EDGES, ROWS, Counts, count_cosines, draw_cosines, thinned
from partial_fc.figures.draw import FIGURES, draw_figures
from partial_fc.figures.margins import LENGTHS, Named, band, parse_margins, typical_statistics
from partial_fc.figures.margins import psi as value_of
from partial_fc.figures.toy import choose, embed_toy, toy_net, train_toy
from partial_fc.head.margins import BY_NAME, AdaFace, ElasticCosFace, MagFace
from partial_fc.prepare.fashion_mnist import CLASSES, PACKAGE, fetch_fashion_mnist, load_fashion_mnist, read_idx
from partial_fc.prepare.packages import cache_folder
from partial_fc.report.runs import Run
from tests.conftest import REPOSITORY, run_ranks
from tests.processes import run_program
from tests.test_train import config_for, train_here

ANGLES = np.linspace(0, math.pi, 181)
ALL = ";".join(BY_NAME)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def saved(tmp_path):
    """Saves a figure as PNG and as SVG; both must hold something."""

    def save(figure) -> None:
        for ending, begin in (("png", PNG), ("svg", b"<?xml")):
            path = tmp_path / f"figure.{ending}"
            style.save(figure, path)
            figure.set_layout_engine("none")  # it is laid out: half the time of a picture
            data = path.read_bytes()
            assert data.startswith(begin) and len(data) > 5000

    with style.styled():
        yield save


def some_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random images of ten classes: a bright row says which."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = generator.integers(0, 60, (count, 28, 28))
    images[np.arange(count), 2 * labels + 4] += 180
    return images.astype(np.uint8), labels.astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx(array)))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder like Fashion-MNIST's, of 300 and 100 random images."""
    folder = tmp_path_factory.mktemp("fashion")
    for part, count in (("train", 300), ("t10k", 100)):
        for name, array in zip(("images-idx3", "labels-idx1"), some_images(count, count), strict=True):
            write_idx(folder / f"{part}-{name}-ubyte.gz", array)
    return folder


# ---- margins


@pytest.mark.parametrize(
    "margin, formula",
    [
        (Softmax(), np.cos),
        (SoftMarginSoftmax(margin=0.6), lambda angle: np.cos(angle) - 0.6 / LENGTHS[0]),
        (CosFace(margin=0.35), lambda angle: np.cos(angle) - 0.35),
        (
            ArcFace(margin=0.5),
            lambda angle: np.where(angle + 0.5 <= math.pi, np.cos(angle + 0.5), -2 - np.cos(angle + 0.5)),
        ),
        (
            SphereFace(margin=2, lambda_min=0.0),
            lambda angle: np.where(angle <= math.pi / 2, np.cos(2 * angle), -np.cos(2 * angle) - 2),
        ),
        (MagFace(), lambda angle: np.cos(angle + 0.45 + 0.35 * 20 / 100)),  # |x| = 30 of 10 to 110; before pi - m
        (AdaFace(), lambda angle: np.cos(angle) - 0.4),  # |x| at its mean
        (ElasticCosFace(margin=0.35), lambda angle: np.cos(angle) - 0.35),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_curve_drawn_is_the_margins_formula(margin, formula):
    (line,) = psi.draw_psi([Named("it", margin)]).axes[0].lines
    degrees, drawn = line.get_data()
    angle = np.radians(degrees)
    shown = angle < math.pi - 0.6 if isinstance(margin, MagFace) else np.full(len(angle), True)
    # annealing leaves a lambda of 8e-6; AdaFace clips angles to 0.001 rad, and its statistics are of a finite sample
    assert drawn[shown] == pytest.approx(formula(angle)[shown], abs=2e-3 if isinstance(margin, AdaFace) else 2e-5)


def test_the_band_is_where_length_or_draws_count():
    for margin in (Softmax(), SoftMarginSoftmax(), CosFace(), ArcFace(), SphereFace()):
        low, high = band(margin, ANGLES)
        assert (low == high).all(), margin
    low, high = band(ElasticCosFace(margin=0.35, deviation=0.1), ANGLES)
    assert low == pytest.approx(np.cos(ANGLES) - 0.45) and high == pytest.approx(np.cos(ANGLES) - 0.25)
    low, high = band(MagFace(), ANGLES[:60])
    assert low == pytest.approx(np.cos(ANGLES[:60] + 0.59)) and high == pytest.approx(np.cos(ANGLES[:60] + 0.45))


def test_typical_statistics_are_those_of_typical_batches():
    statistics = typical_statistics(AdaFace())
    assert statistics["length_mean"].item() == pytest.approx(LENGTHS[0], abs=0.05)
    assert statistics["length_deviation"].item() == pytest.approx(LENGTHS[1], rel=0.01)
    assert typical_statistics(CosFace()) == {}


def test_margins_by_the_words_of_a_config():
    assert parse_margins(" cosface:margin=0.2, scale=30 ; ArcFace;softmax;cosface:scale=none") == [
        Named("CosFace m = 0.2", CosFace(margin=0.2, scale=30)),
        Named("ArcFace m = 0.5", ArcFace()),
        Named("Softmax", Softmax()),
        Named("CosFace m = 0.35", CosFace(scale=None)),
    ]
    labels = [one.label for one in parse_margins("cosface;cosface:scale=30;sphereface:lambda_min=1;arcface:margin=.1")]
    assert labels == [
        "CosFace m = 0.35, s = 64",
        "CosFace m = 0.35, s = 30",
        "SphereFace m = 4, λmin = 1",
        "ArcFace m = 0.1",
    ]
    (one,) = parse_margins("arcface:straight_through=true")
    assert one.margin == ArcFace(straight_through=True) and one.label == "ArcFace m = 0.5, straight_through = true"


@pytest.mark.parametrize(
    "text, message",
    [
        ("cosfase", "no margin is called 'cosfase'; did you mean cosface"),
        ("cosface:m=0.3", "cosface has no such parameter; it has scale, learn_scale, "),
        ("cosface:0.3", "got '0.3' in 'cosface:0.3'; wanted parameter=value"),
        ("cosface:margin=big", "got 'big'; wanted a number"),
        ("cosface:margin=3", r"margin is 3.0; give one in \[0, 2\)"),
        (" ; ", "got no margin"),
    ],
)
def test_what_is_no_margin_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        parse_margins(text)


# ---- boundaries


@pytest.mark.parametrize("name", BY_NAME)
def test_boundaries_solve_their_equation(name):
    margin = BY_NAME[name]()
    first = np.linspace(0, math.pi, 181)
    second = boundaries.boundary(margin, first)
    there = np.isfinite(second)
    assert there.any()
    assert np.cos(second[there]) == pytest.approx(value_of(margin, first[there]), abs=1e-12)
    assert (np.abs(value_of(margin, first[~there])) > 1).all()
    at = boundaries.circle_boundary(margin)
    assert value_of(margin, np.array([at]))[0] == pytest.approx(math.cos(boundaries.APART - at), abs=1e-12)


def test_boundaries_known_in_closed_form():
    first = np.radians([10.0, 40.0, 80.0])
    assert boundaries.boundary(ArcFace(margin=0.5), first) == pytest.approx(first + 0.5, abs=1e-12)
    assert boundaries.boundary(Softmax(), first, ratio=0.5) == pytest.approx(np.arccos(0.5 * np.cos(first)), abs=1e-12)
    assert np.isnan(boundaries.boundary(Softmax(), first[:1], ratio=2.0)).all()
    for apart in (0.6, 1.5):
        assert boundaries.circle_boundary(NormSoftmax(), apart) == pytest.approx(apart / 2, abs=1e-12)
        assert boundaries.circle_boundary(ArcFace(margin=0.5), apart) == pytest.approx((apart - 0.5) / 2, abs=1e-12)
    assert boundaries.circle_boundary(ArcFace(margin=0.5), 0.4) is None
    assert boundaries.circle_boundary(CosFace(margin=1.1)) is None


# ---- gradients


def test_the_gradient_is_plain_autograds():
    """Against the formula of cross entropy in float64, with the head's own centers."""
    lengths = np.array([0.7, 5.0, 60.0])
    head = gradient.PartialFC(20, 8, margin=Softmax(), seed=3, dtype=torch.float64)
    w = head.full_weight()
    w_hat = w / w.norm(dim=1, keepdim=True)
    target = torch.zeros(1, dtype=torch.int64)
    for cosine in (0.3, 0.8):
        x_hat = gradient._direction(w[0], cosine, 3)
        assert (x_hat @ w_hat[0]).item() == pytest.approx(cosine, abs=1e-12) and x_hat.norm().item() == pytest.approx(1)
        plain, cosface = [], []
        for length in lengths:
            x = (length * x_hat).requires_grad_()
            loss = torch.nn.functional.cross_entropy((w @ x).unsqueeze(0), target)
            plain.append(torch.autograd.grad(loss, x)[0].norm().item())
            logits = 30 * (w_hat @ x / x.norm()) - 30 * 0.35 * torch.nn.functional.one_hot(target, 20)[0]
            loss = torch.nn.functional.cross_entropy(logits.unsqueeze(0), target)
            cosface.append(torch.autograd.grad(loss, x)[0].norm().item())
        options = dict(seed=3, classes=20, dim=8)
        assert gradient.gradient_lengths(Softmax(), lengths, cosine, **options) == pytest.approx(plain, rel=1e-9)
        found = gradient.gradient_lengths(CosFace(scale=30), lengths, cosine, **options)
        assert found == pytest.approx(cosface, rel=1e-9)
        assert found * lengths == pytest.approx(np.full(3, found[0] * lengths[0]), rel=1e-9)  # 1 / |x|


def test_the_gradient_is_taken_with_annealing_at_its_end():
    annealed, plain = (
        gradient.gradient_lengths(SphereFace(margin=2, lambda_min=0.0, **rest), np.array([3.0]), 0.5, classes=20, dim=8)
        for rest in ({}, {"lambda_max": 0.0})
    )
    assert annealed == pytest.approx(plain, rel=1e-4)


def test_the_gradients_of_all_margins_are_finite():
    for name, margin in BY_NAME.items():
        found = gradient.gradient_lengths(margin(), np.array([0.5, 30.0, 150.0]), 0.5, classes=30, dim=8)
        assert np.isfinite(found).all() and (found >= 0).all(), name


# ---- Fashion-MNIST


def test_idx_files_are_read_plain_and_gzipped(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(array))
    write_idx(tmp_path / "packed.gz", array)
    for name in ("plain", "packed.gz"):
        assert np.array_equal(read_idx(tmp_path / name), array)
    (tmp_path / "none").write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    assert read_idx(tmp_path / "none").shape == (0, 28, 28)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-1], r"has 23 bytes for 24 values of shape \(2, 3, 4\)"),
        (lambda data: data + b"\0", "has 25 bytes for 24 values"),
        (lambda data: data[:9], "has 0 bytes for 3 sizes"),
        (lambda data: b"\0\0\x0d\3" + data[4:], "begins with 00 00 0d 03, wanted 00 00 08"),
        (lambda data: b"", "begins with nothing, wanted 00 00 08"),
        (lambda data: gzip.compress(data)[:-9], "is cut off or damaged"),
        (lambda data: gzip.compress(data)[:20] + b"\xff" * 30, "is cut off or damaged"),
    ],
)
def test_what_is_no_idx_file_is_said(tmp_path, damage, message):
    path = tmp_path / "file"
    path.write_bytes(damage(idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))))
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_a_folder_that_is_not_fashion_mnist_is_said(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="has no train-images-idx3-ubyte.gz.*--fashion-mnist"):
        load_fashion_mnist(tmp_path)
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    images, labels = load_fashion_mnist(tmp_path)
    assert images.shape == (300, 28, 28) and np.array_equal(labels, np.arange(300) % 10)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels[:-1])
    with pytest.raises(ValueError, match=r"labels \(299,\)"):
        load_fashion_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels + 1)
    with pytest.raises(ValueError, match="has the label 10, wanted 0 to 9"):
        load_fashion_mnist(tmp_path)


def test_without_apt_the_error_says_what_does_instead(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError) as error:
        fetch_fashion_mnist()
    assert "Fashion-MNIST comes from Debian's packages, and this system has no apt-get and no dpkg" in str(error.value)
    assert "--fashion-mnist /folder" in str(error.value) and not (tmp_path / "cache").exists()


def test_the_real_files():
    if not (cache_folder("datasets") / "fashion-mnist" / PACKAGE).is_dir():
        pytest.skip("not run: Fashion-MNIST was not fetched here; `partial-fc figures OUT --only toy` does it")
    folder = fetch_fashion_mnist()
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images, labels = load_fashion_mnist(folder, part)
        assert images.shape == (count, 28, 28) and (np.bincount(labels) == count // 10).all()


# ---- small networks


@pytest.fixture(scope="module")
def toys() -> dict:
    images = choose(some_images(300), some_images(100, 1), CLASSES, leave_out=[CLASSES[3]])
    named = parse_margins("softmax;cosface:scale=8,margin=0.1")
    trained = {dim: [(one.label, train_toy(images, one, dim, epochs=3)) for one in named] for dim in (2, 3)}
    return {"images": images, "named": named, **trained}


def test_chosen_classes_are_numbered_anew(toys):
    images = toys["images"]
    assert images.names == (*CLASSES[:3], *CLASSES[4:]) and len(images.train) == 270 and len(images.test) == 90
    assert images.train_labels[:9].tolist() == list(range(9))
    assert images.train.shape[1:] == (1, 28, 28) and images.train_labels.dtype == torch.int64


def test_a_small_network_is_a_function_of_the_seed(toys):
    images, named = toys["images"], toys["named"][1]
    torch.rand(7)  # whatever was drawn before does not matter
    state = torch.random.get_rng_state()
    again = train_toy(images, named, 2, epochs=3)
    assert np.array_equal(again.embeddings, toys[2][1][1].embeddings)
    assert np.array_equal(again.centers, toys[2][1][1].centers)
    other = train_toy(images, named, 2, epochs=3, seed=1)
    assert not np.array_equal(other.embeddings, again.embeddings)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_does_what_it_should(toys):
    toy = toys[3][1][1]
    assert list(toy.cosines) == [0, 1, 3, 6] and toy.centers.shape == (9, 3) and toy.embeddings.shape == (90, 3)
    middle = (EDGES[1:] + EDGES[:-1]) / 2
    means = [np.average(middle, weights=counts.target) for counts in toy.cosines.values()]
    assert means[-1] > means[0] + 0.2
    net = toy_net(3, 0)
    assert net.training and embed_toy(net, toys["images"].test).shape == (90, 3) and net.training


def test_cosines_are_counted_as_they_are():
    generator = torch.Generator().manual_seed(0)
    embeddings, centers = torch.randn(40, 5, generator=generator), 3 * torch.randn(7, 5, generator=generator)
    labels = torch.arange(40) % 7
    counts = count_cosines(embeddings, labels, centers)
    own, others, nearest = [], [], []
    for x, label in zip(embeddings.double(), labels, strict=True):
        cosine = [float(x @ w / x.norm() / w.norm()) for w in centers.double()]
        own.append(cosine.pop(label))
        others += cosine
        nearest.append(max(cosine))
    for counted, values in ((counts.target, own), (counts.negative, others), (counts.hardest, nearest)):
        assert counted.shape == (BINS,) and np.array_equal(counted, np.histogram(values, EDGES)[0])
    same = count_cosines(centers, torch.arange(7), centers)  # rounding must not lose cosines of 1
    assert same.target[-1] == 7


def test_of_sub_centers_the_nearest_counts():
    generator = torch.Generator().manual_seed(0)
    embeddings, centers = torch.randn(40, 5, generator=generator), torch.randn(14, 5, generator=generator)
    labels = torch.arange(40) % 7
    counts = count_cosines(embeddings, labels, centers, sub_centers=2)
    cosine = torch.nn.functional.cosine_similarity(embeddings[:, None], centers[None], dim=2)
    own = [max(row[2 * label], row[2 * label + 1]).item() for row, label in zip(cosine, labels, strict=True)]
    assert np.array_equal(counts.target, np.histogram(own, EDGES)[0])
    assert counts.negative.sum() == 40 * 6


def test_small_networks_have_one_center_a_class(toys):
    with pytest.raises(ValueError, match="one center a class"):
        train_toy(toys["images"], parse_margins("subcenterarcface:scale=8")[0], 2)


def test_the_steps_shown_begin_and_end_with_the_training():
    assert thinned([1, 5, 9], 7) == [1, 5, 9]
    for count in (8, 20, 49, 500):
        steps = list(range(10, 10 * count + 10, 10))
        shown = thinned(steps, ROWS)
        assert shown[0] == 10 and shown[-1] == steps[-1] and 5 < len(shown) <= ROWS and shown == sorted(set(shown))


def test_spheres_are_turned_onto_each_other():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(6, 3))
    turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    turn = turn * np.linalg.det(turn)  # a rotation, no mirror
    found = features.aligned(points, points @ turn.T)
    assert found == pytest.approx(turn, abs=1e-12)
    mirrored = features.aligned(points, points * [1, 1, -1])
    assert np.linalg.det(mirrored) == pytest.approx(1)
    view = features._view(points / np.linalg.norm(points, axis=1, keepdims=True))
    assert view @ view.T == pytest.approx(np.eye(3), abs=1e-12) and np.linalg.det(view) == pytest.approx(1)


def test_the_median_angle(toys):
    toy, labels = toys[3][1][1], toys["images"].test_labels.numpy()
    angles = []
    for x, label in zip(toy.embeddings.astype(float), labels, strict=True):
        w = toy.centers[label].astype(float)
        angles.append(math.degrees(math.acos(x @ w / math.hypot(*x) / math.hypot(*w))))
    assert features.median_angle(toy, labels) == pytest.approx(np.median(angles), abs=1e-3)


def test_coarser_images_lose_detail_alone():
    images, _ = some_images(5)
    assert np.array_equal(quality.coarser(images, 1.0), images)
    detail = [np.abs(np.diff(quality.coarser(images, part).astype(int))).mean() for part in quality.PARTS]
    assert all(after < before for before, after in zip(detail, detail[1:], strict=False))
    for part in quality.PARTS:
        made = quality.coarser(images, part)
        assert made.shape == images.shape and made.dtype == np.uint8
        assert made.mean() == pytest.approx(images.mean(), rel=0.05)
        flat = np.full((2, 16, 24, 3), 77, np.uint8)
        assert np.array_equal(quality.coarser(flat, part), flat)


def test_lengths_by_quality():
    images, _ = some_images(4)
    lengths = quality.lengths_by_quality(lambda some: some.reshape(len(some), -1).astype(float), images)
    assert lengths.shape == (len(quality.PARTS), 4)
    assert lengths[0] == pytest.approx(np.linalg.norm(images.reshape(4, -1).astype(float), axis=1))


# ---- pictures


def test_labels_do_not_overlap():
    generator = np.random.default_rng(0)
    for count in (1, 2, 5, 9):
        heights, sizes = generator.random(count), generator.choice([0.05, 0.1], count)
        placed = np.array(style.spread(heights, sizes))
        order = np.argsort(heights)
        tops, bottoms = placed[order] + sizes[order] / 2, placed[order] - sizes[order] / 2
        assert (bottoms[1:] >= tops[:-1] - 1e-9).all() and (placed >= 0.03 - 1e-9).all()
    assert style.spread([0.5, 0.9], [0.1, 0.1]) == pytest.approx([0.5, 0.9])
    assert style.spread([0.5, 0.5], [0.1, 0.1]) == pytest.approx([0.45, 0.55])


def test_the_colors_are_the_reports():
    page = (REPOSITORY / "partial_fc" / "report" / "page.html.j2").read_text()
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", page[: page.index("prefers-color-scheme: dark")]))
    assert tuple(light[f"series-{number}"] for number in range(len(style.SERIES))) == style.SERIES
    assert (light["ink"], light["muted"], light["line"], light["paper"]) == (
        style.INK,
        style.MUTED,
        style.LINE,
        style.PAPER,
    )


@pytest.mark.slow
@pytest.mark.parametrize("draw", [psi.draw_psi, boundaries.draw_boundaries, boundaries.draw_circle])
def test_all_margins_can_be_drawn(draw, saved):
    saved(draw(parse_margins(ALL)))
    saved(draw(parse_margins("cosface:margin=1.5")))


@pytest.mark.slow
def test_gradients_can_be_drawn(saved):
    saved(gradient.draw_gradient(parse_margins("softmax;cosface"), classes=10))


@pytest.mark.slow
def test_features_and_cosines_can_be_drawn(toys, saved):
    labels, names = toys["images"].test_labels.numpy(), toys["images"].names
    saved(features.draw_plane(toys[2], labels, names))
    saved(features.draw_sphere(toys[3] * 3, labels, names))  # more than stand in one line
    saved(draw_cosines([(label, toy.cosines) for label, toy in toys[3] * 2]))


@pytest.mark.parametrize("count, shape", [(3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_names_of_run_folders_do_not_run_into_each_other(count, shape, saved):
    counts = {816: Counts(*[np.ones(BINS)] * 3)}
    figure = draw_cosines([(f"AM-Softmax-0.35-1000-32-epochs_final_seed{n}_3c5c3d9bf0", counts) for n in range(count)])
    saved(figure)  # lays it out
    titles = [axes.title for axes in figure.axes[:count]]
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape
    boxes = [title.get_window_extent() for title in titles]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_two_classes_can_be_drawn(saved):
    images = choose(some_images(20), some_images(10), CLASSES, leave_out=CLASSES[2:])
    (named,) = parse_margins("normsoftmax:scale=8")
    toys = {dim: [(named.label, train_toy(images, named, dim, epochs=1))] for dim in (2, 3)}
    saved(features.draw_plane(toys[2], images.test_labels.numpy(), images.names))
    saved(features.draw_sphere(toys[3], images.test_labels.numpy(), images.names))
    saved(draw_cosines([(label, toy.cosines) for label, toy in toys[3]]))


def test_quality_can_be_drawn(saved):
    images, _ = some_images(3)
    lengths = quality.lengths_by_quality(lambda some: some.reshape(len(some), -1).astype(float), images)
    saved(quality.draw_quality([("gray", lengths), ("again", 2 * lengths)], images))


def result_of(rank1: float) -> dict:
    roc = [[0.0, 0.1], [1e-4, 0.5], [1e-2, 0.9], [1.0, 1.0]]
    counts = {"num_samples": 20, "num_identities": 5, "num_distractors": 0, "num_genuine": 10, "num_impostor": 90}
    shown = {"right": [], "wrong": [], "hardest": []}
    return counts | {
        "data": "somewhere",
        "roc": roc,
        "cmc": [rank1, 0.9, 1.0],
        "rank1": rank1,
        "fold_accuracy": None,
        "tar_at_far": dict.fromkeys(FARS),
        "histogram": {"edges": [-1.0, 0.0, 1.0], "genuine": [0, 10], "impostor": [90, 0]},
        "examples": shown,
    }


def run_of(name: str, **sets: dict) -> Run:
    evaluation = {"models": {"trained": sets}} if sets else None
    return Run(name, Path(name), "", {}, [], evaluation)


@pytest.mark.slow
def test_roc_and_cmc_are_the_evaluations(saved):
    one = verification.curves_of([run_of("one", P1=result_of(0.5), P3=result_of(0.4))])
    assert {title: [label for label, _ in curves] for title, curves in one.items()} == {"one": ["P1", "P3"]}
    figure = verification.draw_verification(one)
    left, right = figure.axes
    assert len(left.lines) == 1 and len(right.lines) == 2  # the sets share their pairs
    assert left.lines[0].get_xydata().tolist() == [[1e-4, 0.5], [1e-2, 0.9], [1.0, 1.0]]
    assert right.lines[1].get_xydata().tolist() == [[1, 0.4], [2, 0.9], [3, 1.0]]
    saved(figure)
    runs = [run_of("one", P1=result_of(0.5), P2=result_of(0.3)), run_of("none"), run_of("two", P1=result_of(0.6))]
    two = verification.curves_of(runs)
    assert {title: [label for label, _ in curves] for title, curves in two.items()} == {
        "P1": ["one", "two"],
        "P2": ["one"],
    }
    saved(verification.draw_verification(two))


# ---- runs


@pytest.fixture(scope="module")
def run(glyphs_ci, tmp_path_factory) -> Path:
    """Twelve steps at sample rate 0.5, with another momentum for centers than the default, four checkpoints."""
    run = tmp_path_factory.mktemp("figures") / "run"
    run_ranks(train_here, 1, run, glyphs_ci / "train", *SHORT)
    return run


SHORT = ("run.steps=12", "checkpoint.every=3", "checkpoint.keep=9", "head.optim.momentum=0.5")


def test_a_checkpoint_gives_what_the_run_had(run, glyphs_ci):
    found = checkpoints.complete_checkpoints(run)
    assert [one.step for one in found] == [3, 6, 9, 12]
    parts = build(config_for(run, glyphs_ci / "train", *SHORT), torch.device("cpu"))
    centers, sub_centers = checkpoints.load_centers(found[-1])
    assert torch.equal(centers, parts.head.full_weight()) and sub_centers == 1
    images = checkpoints.run_images(found[-1], 7)
    config = checkpoints.config_of(found[-1])
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2)).float()
    inputs = (pixels - torch.tensor(config.data.mean).view(3, 1, 1)) / torch.tensor(config.data.std).view(3, 1, 1)
    with torch.no_grad():
        expected = checkpoints.load_net(found[-1])(inputs).numpy()
    assert checkpoints.embedder(found[-1])(images) == pytest.approx(expected, abs=1e-5)


def test_cosines_of_a_runs_checkpoints(run):
    counts = checkpoints.run_cosines(run, images=50)
    assert list(counts) == [3, 6, 9, 12]
    for one in counts.values():
        assert one.target.sum() == one.hardest.sum() == 50 and one.negative.sum() == 50 * 763


def test_a_folder_without_checkpoints_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoints.run_cosines(tmp_path)


@pytest.mark.slow
def test_figures_of_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "IMAGES", 20)  # of 7 qualities each
    with pytest.raises(ValueError, match="not drawn: roc: it needs the folder of a run that was evaluated"):
        draw_figures(tmp_path, only=["quality", "cosines", "roc"], runs=[run])
    assert {path.name for path in tmp_path.iterdir()} == {"quality.png", "cosines.png", "index.html"}
    evaluation = {"version": 1, "step": 12, "models": {"trained": {"P1": result_of(0.5)}}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert draw_figures(tmp_path, only=["roc"], runs=[run]) == {"roc": tmp_path / "roc.png"}
    assert checkpoint.find_latest(run).step == 12


# ---- the command


@pytest.mark.slow
def test_everything_without_a_run(data, tmp_path):
    out = tmp_path / "new" / "figures"
    drawn = draw_figures(out, fashion_mnist=data, epochs=1)
    assert list(FIGURES) == list(NAMES)
    assert list(drawn) == [name for name in NAMES if name != "roc"]
    page = (out / "index.html").read_text()
    for name, path in drawn.items():
        assert path.read_bytes().startswith(PNG) and f'src="{path.name}"' in page and name in page


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "out").touch()
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ValueError, match="/out is a file, wanted a folder: give another folder for the figures"):
            draw_figures(out, only=["psi"])


def test_a_figure_that_fails_does_not_take_the_others_along(tmp_path):
    with pytest.raises(ValueError, match="not drawn: toy: .*has no train-images-idx3-ubyte.gz"):
        draw_figures(tmp_path / "out", only=["toy", "circle"], fashion_mnist=tmp_path, margins="cosface", format="svg")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"circle.svg", "index.html"}


def test_a_training_that_diverges_is_said(data, tmp_path):
    with pytest.raises(ValueError, match="toy: CosFace m = 0.35: the loss is .* at step"):
        draw_figures(tmp_path, only=["toy"], fashion_mnist=data, margins="cosface:scale=1e39")


def test_the_same_figure_is_the_same_file(tmp_path):
    for format in ("png", "svg"):
        first, second = (draw_figures(tmp_path / name, only=["psi"], format=format)["psi"] for name in "ab")
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_as_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    typed = ("figures", tmp_path, "--only", "psi,circle", "--margins", "cosface:margin=0.2;arcface")
    done = run_program("partial-fc", *typed)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert f"page: {tmp_path}/index.html" in said and f"{tmp_path}/psi.png: The target's logit" in said
    assert (tmp_path / "circle.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--only", "psi,phi"), "error: --only: no figure is called 'phi'; there are psi, boundaries, circle, toy, "),
        (("--margins", "cosfase"), "error: head.margin.name: no margin is called 'cosfase'; did you mean cosface?"),
        (("--epochs", "0"), "error: --epochs is 0; give a positive number"),
        (("--only", "quality", "--runs", "nowhere"), "nowhere holds no complete checkpoint"),
        (("--only", "roc", "--runs", "nowhere"), "nowhere is no run folder"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["partial-fc", "figures", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert message in str(ended.value) and "\n" not in str(ended.value)
    assert not list(tmp_path.glob("out/*.png"))
