"""Exported folders, ONNX and torch.export, galleries, and embeddings of images: each against the run it comes from."""

import importlib.util
import json
import re
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from partial_fc import ArcFace, Softmax, SubCenterArcFace, checkpoint, load_backbone, load_image
from partial_fc.backbone import build
from partial_fc.backbone.iresnet import Block
from partial_fc.backbone.mobilefacenet import Bottleneck
from partial_fc.backbone.net import EmbeddingNet
from partial_fc.backbone.smallnet import StandardizedConv2d
from partial_fc.backbone.spherenet import Residual
from partial_fc.data.reader import images_in_order
from partial_fc.data.shards import load_index
from partial_fc.evaluate.embed import embed
from partial_fc.evaluate.runs import evaluate_run
from partial_fc.export import formats, gallery
from partial_fc.export.embed import embed_images
from partial_fc.export.formats import write_onnx, write_torch_export
from partial_fc.export.gallery import write_gallery
from partial_fc.export.model import Embedder, open_model, save_backbone
from partial_fc.export.rows import write_rows
from partial_fc.export.run import export_run
from partial_fc.parallel.distributed import RunError
from partial_fc.prepare.folder import prepare_folder
from tests.conftest import REPOSITORY, run_ranks
from tests.processes import run_program
from tests.test_checkpoint import ADAMW, NAMES, save_here
from tests.test_cli import partial_fc
from tests.test_train import train_here

CPU = torch.device("cpu")
NORMALIZATION = {"mean": (120.0, 127.5, 135.0), "std": (127.5, 64.0, 100.0)}


SLOW_FIXTURES = ("run", "exported")  # tests that use one are slow


@pytest.fixture(scope="module")
def run(glyphs_ci, tmp_path_factory) -> Path:
    """A run of two ranks whose classes were sampled, whose channels are normalized differently, with a moving average,
    and its evaluation.
    """
    run = tmp_path_factory.mktemp("export") / "run"
    overrides = [f"data.{name}={list(values)}" for name, values in NORMALIZATION.items()]
    overrides += [f"evaluate.sets={{P2: {{data: {glyphs_ci}/test_unseen, note: letters}}}}", "evaluate.untrained=false"]
    run_ranks(
        train_here, 2, run, glyphs_ci / "train", "run.steps=12", "evaluate.flip=true", "engine.ema=0.9", *overrides
    )
    evaluate_run(run, CPU)
    return run


@pytest.fixture(scope="module")
def exported(run) -> Path:
    export_run(run, run.parent / "exported", ["safetensors", "onnx", "torch-export"], gallery=True)
    return run.parent / "exported"


@pytest.fixture(scope="module")
def images(glyphs_ci) -> torch.Tensor:
    """(20, 3, 32, 32) uint8."""
    return next(iter(images_in_order(load_index(glyphs_ci / "test_seen"), np.arange(20), 20, 0))).images


def of_the_run(run: Path, data: Path, **options) -> torch.Tensor:
    """Embeddings of a data set as an evaluation of the run computes them."""
    found = checkpoint.find_latest(run)
    net = build("smallnet", 64, (32, 32))
    net.load_state_dict(checkpoint.read_backbone(found))
    return embed(net, load_index(data), batch_size=256, device=CPU, flip=True, **NORMALIZATION, **options)


# ---- the folder


def test_the_folder_gives_the_embeddings_of_the_run(run, exported, glyphs_ci, images):
    model = load_backbone(exported)
    wanted = of_the_run(run, glyphs_ci / "test_seen", samples=np.arange(20))
    with torch.no_grad():
        assert torch.equal(model(images), wanted)
    assert not model.training and (model.image_size, model.embedding_dim) == ((32, 32), 64)
    assert wanted.norm(dim=1).sub(1).abs().max() < 1e-6
    state = load_file(exported / "model.safetensors")
    assert set(state) == set(model.backbone.state_dict()) == set(build("smallnet", 64, (32, 32)).state_dict())


def test_config_and_card_say_what_it_is(run, exported):
    config = json.loads((exported / "config.json").read_text())
    classes = (exported / "classes.txt").read_text().splitlines()
    assert config["backbone"]["name"] == "smallnet" and config["image_size"] == [32, 32] and config["flip"] is True
    assert (config["mean"], config["std"]) == tuple(map(list, NORMALIZATION.values()))
    assert (config["channel_order"], config["step"], config["num_classes"]) == ("RGB", 12, len(classes))
    assert len(config["trained_at_commit"]) >= 7 and len(config["classes_sha256"]) == 64
    result = json.loads((run / "evaluation.json").read_text())["models"]["trained"]["P2"]
    card = (exported / "README.md").read_text()
    assert f"| P2 | {result['num_identities']} | {result['fold_accuracy']:.4f} |" in card and "- P2: letters" in card
    assert f"class_centers.safetensors: {len(classes)} x 64" in card and "model.onnx: any batch size" in card


def test_the_moving_average(run, exported, glyphs_ci, tmp_path):
    export_run(run, tmp_path / "out", averaged=True)
    got, wanted = load_backbone(tmp_path / "out"), checkpoint.read_backbone(checkpoint.find_latest(run), averaged=True)
    assert got.config["weights"] == "averaged" and load_backbone(exported).config["weights"] == "trained"
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.backbone.state_dict().items())
    results = {name: sets["P2"] for name, sets in json.loads((run / "evaluation.json").read_text())["models"].items()}
    row = "| P2 | {num_identities} | {fold_accuracy:.4f} |"
    assert results["averaged"]["fold_accuracy"] != results["trained"]["fold_accuracy"]
    for folder, name in ((tmp_path / "out", "averaged"), (exported, "trained")):
        card = (folder / "README.md").read_text()
        assert row.format(**results[name]) in card
        assert ("moving average, of decay 0.9 a step" in card) == (name == "averaged")

    run_ranks(train_here, 1, tmp_path / "plain", glyphs_ci / "train", "run.steps=1")
    with pytest.raises(ValueError, match="has no moving average: its run had no engine.ema; leave --averaged out"):
        export_run(tmp_path / "plain", tmp_path / "other", averaged=True)
    assert not list(tmp_path.glob("other*"))


def test_an_evaluation_of_another_step_is_not_in_the_card(run, tmp_path, capsys):
    export_run(run / "checkpoints" / "step_00000010", tmp_path / "out")
    assert "evaluation.json is of step 12, not of 10" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None was made of this checkpoint" in card and "10 steps of 24 images" in card
    assert not (tmp_path / "out" / "model.onnx").exists() and load_backbone(tmp_path / "out").config["step"] == 10


def test_nothing_names_this_machine(run, exported):
    """No folder of it; torch writes stack traces into graphs otherwise."""
    with zipfile.ZipFile(exported / "model.pt2") as archive:
        contents = {f"model.pt2/{name}": archive.read(name) for name in archive.namelist()}
    contents |= {path.name: path.read_bytes() for path in exported.iterdir()}
    for folder in (REPOSITORY, Path(torch.__file__).parent, run.parent):
        assert [name for name, data in contents.items() if str(folder).encode() in data] == []
    assert (exported / "model.safetensors").stat().st_mode == (exported / "config.json").stat().st_mode


@pytest.mark.slow
def test_a_folder_is_whole_or_not_there(run, exported, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="exported exists"):
        export_run(run, exported)
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"model\.pt2 was not kept: .* 16 real images differ"):
        export_run(run, tmp_path / "out", ["torch-export"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_images_to_check_with(run, images, tmp_path):
    """The run's own sets; where they are not here, what is given."""
    moved = tmp_path / "run" / "checkpoints" / "step_00000012"
    shutil.copytree(run / "checkpoints" / moved.name, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["settings"]["config"]["data"]["train"] = "gone/train"
    manifest["settings"]["config"]["evaluate"]["sets"] = {}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match="gone/train are not here: give a folder of images or a data set with --images"
    ):
        export_run(moved, tmp_path / "out", ["torch-export"])
    photos = tmp_path / "photos" / "deep" / "down"
    photos.mkdir(parents=True)
    cv2.imwrite(str(photos / "a.png"), images[0].permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="photos: 1 of 1 images could be read; wanted two or more"):
        export_run(moved, tmp_path / "out", ["torch-export"], images=tmp_path / "photos")
    (tmp_path / "one.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"/one.png: 0 of 1 images could be read \(one.png is undecodable\); wanted"):
        export_run(moved, tmp_path / "out", ["torch-export"], images=tmp_path / "one.png")
    with pytest.raises(ValueError, match="/one.png is a file, wanted a folder: give another folder to export to"):
        export_run(moved, tmp_path / "one.png" / "out")
    cv2.imwrite(str(photos / "b.png"), cv2.resize(images[1].permute(1, 2, 0).numpy(), (50, 40)))
    export_run(moved, tmp_path / "out", ["torch-export"], images=tmp_path / "photos")
    assert "model.pt2: any batch size; embeddings of 2 real images" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_package_is_named_before_anything_is_done(run, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    with pytest.raises(ValueError, match=r"onnx needs onnxruntime: pip install 'onnxruntime>=1"):
        export_run(run, tmp_path / "out", ["onnx"])
    with pytest.raises(ValueError, match="format 'tflite', wanted some of safetensors, onnx, torch-export"):
        export_run(run, tmp_path / "out", ["tflite"])
    export_run(run, tmp_path / "out", ["safetensors"])


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


DAMAGE = {
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "has the format 'bert'": lambda folder: edit_config(folder, format="bert"),
    "format version 2, this partial_fc reads up to 1": lambda folder: edit_config(folder, version=2),
    "it has no mean": lambda folder: edit_config(folder, mean=None),
    "SHA-256 is not config.json's": lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
    "is missing or damaged": lambda folder: (folder / "model.safetensors").unlink(),
    "did you mean 'spherenet20'": lambda folder: edit_config(
        folder, backbone={"name": "spherenet", "embedding_dim": 64}
    ),
    "not those of the smallnet": lambda folder: edit_config(folder, backbone={"name": "smallnet", "embedding_dim": 8}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_an_error(exported, tmp_path, message):
    shutil.copytree(exported, tmp_path / "copy")
    DAMAGE[message](tmp_path / "copy")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_backbone(tmp_path / "copy")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "/nowhere/there"])
def test_what_is_no_folder(name):
    with pytest.raises(ValueError, match="is no folder, nor a hub repository as owner/name"):
        load_backbone(name)


@pytest.mark.slow
def test_the_hub(exported, images, tmp_path):
    """huggingface_hub itself, offline, on a cache with one repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    shutil.copytree(exported, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = """
import sys, torch, partial_fc
images = torch.load(sys.argv[1], weights_only=True)
torch.save(partial_fc.load_backbone("owner/name")(images).detach(), sys.argv[2])
try:
    partial_fc.load_backbone("owner/other")
except ValueError as error:
    print(error)
"""
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "program.py").write_text(program)
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}  # read when huggingface_hub is loaded
    words = (tmp_path / "program.py", tmp_path / "images.pt", tmp_path / "out.pt")
    done = run_program(*words, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "owner/other is no folder here, and the Hugging Face hub did not give it" in done.stdout
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), load_backbone(exported)(images))


def test_pixels_must_be_bytes(exported, images):
    model = load_backbone(exported)
    with pytest.raises(ValueError, match=r"got torch\.float32 images, wanted torch\.uint8 of values 0 to 255"):
        model(images / 255)
    with pytest.raises(ValueError, match=r"got images of shape \(3, 32, 32\), wanted \(b, 3, 32, 32\)"):
        model(images[0])


# ---- ONNX and torch.export


def test_onnx_and_torch_export_take_any_batch_of_bytes(exported, images):
    model = load_backbone(exported)
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (entrance,), (exit_,) = session.get_inputs(), session.get_outputs()
    assert (entrance.name, entrance.type, entrance.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (exit_.name, exit_.shape) == ("embeddings", ["batch", 64])
    loaded = torch.export.load(exported / "model.pt2").module()
    for batch in (1, 3, 20):
        with torch.no_grad():
            wanted = model(images[:batch]).numpy()
        got = session.run(None, {"images": images[:batch].numpy()})[0]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)
        np.testing.assert_allclose(loaded(images[:batch]).detach().numpy(), wanted, rtol=0, atol=2e-6)


SIZES = {"spherenet20": (48, 32), "resnet28": (48, 48), "iresnet18": (32, 32), "mobilefacenet": (32, 32)}


def every_layer() -> EmbeddingNet:
    """A small net of the layers and units of all backbones, for images of 48 x 32."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.MaxPool2d(2)),  # 23 x 15
        *(StandardizedConv2d(8, 16, 3, 2, padding=1, bias=False), nn.GroupNorm(1, 16)),  # 12 x 8
        *(StandardizedConv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, 2, padding=1)),  # 6 x 4
        *(Residual(16), Block(16, 16, 1), Block(16, 16, 2)),  # 3 x 2
        *(Bottleneck(16, 32, 16, 1), Bottleneck(16, 32, 16, 2)),  # 2 x 1
        nn.Conv2d(16, 16, (2, 1), groups=16, bias=False),
    )
    return EmbeddingNet(features, 16, 8, (48, 32), batch_norm=True, last_map=(1, 1))


def kinds(net: nn.Module) -> set[tuple]:
    """Its layers, with their options that change a graph."""
    options = ("stride", "bias", "affine", "track_running_stats", "ceil_mode")
    found = set()
    for layer in net.modules():
        if not [*layer.children()]:
            values = {name: getattr(layer, name, None) for name in options}
            values["bias"] = values["bias"] is not None
            found.add((type(layer), getattr(layer, "groups", 1) > 1, *values.values()))
    return found


def assert_both_formats(net: EmbeddingNet, images: torch.Tensor, folder: Path) -> None:
    """Checked inside on real images, and here against what is computed by hand in float64."""
    size = net.image_size
    config = {"image_size": size, "backbone": {"embedding_dim": 8}}
    model = Embedder(net.eval(), (120, 130, 140), (60, 70, 80), False, config).eval()
    pictures = nn.functional.interpolate(images[:5], size=size)
    assert write_onnx(model, folder / "model.onnx", pictures) < 1e-5
    assert write_torch_export(model, folder / "model.pt2", pictures) < 1e-5
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((120, 130, 140), (60, 70, 80)))
    with torch.no_grad():
        wanted = nn.functional.normalize(net.double()((pictures.double() - mean) / std))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {"images": pictures[:4].numpy()})[0]
    np.testing.assert_allclose(got, wanted[:4].numpy(), rtol=0, atol=1e-5)


@pytest.mark.soak("export")
def test_every_layer_of_every_backbone(images, tmp_path, monkeypatch):
    """Untrained, in one net, as if that were larger than 2 GiB."""
    monkeypatch.setattr(formats, "_IN_ONE_FILE", 0)
    torch.manual_seed(0)
    net = every_layer()
    with torch.device("meta"):
        backbones = [build(name, 8, (48, 48)) for name in (*SIZES, "smallnet")]
    assert set().union(*map(kinds, backbones)) <= kinds(net)
    assert_both_formats(net, images, tmp_path)
    assert (tmp_path / "model.onnx.data").exists()


@pytest.mark.soak("export")
@pytest.mark.parametrize("name", SIZES)
def test_every_other_backbone(images, tmp_path, monkeypatch, name):
    """Untrained."""
    if name == "iresnet18":  # as if it were larger than 2 GiB
        monkeypatch.setattr(formats, "_IN_ONE_FILE", 0)
    torch.manual_seed(0)
    assert_both_formats(build(name, 8, SIZES[name]), images, tmp_path)
    assert (tmp_path / "model.onnx.data").exists() == (name == "iresnet18")


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_onnx, write_torch_export])
def test_a_file_that_gives_other_embeddings_is_removed(images, tmp_path, monkeypatch, write):
    monkeypatch.setattr(formats, "_IN_ONE_FILE", 0)  # its second file goes, too
    config = {"image_size": (32, 32), "backbone": {"embedding_dim": 8}}
    net = EmbeddingNet(nn.Conv2d(3, 8, 16, stride=16), 8, 8, (32, 32))
    model = Embedder(net, (0, 0, 0), (1, 1, 1), False, config).eval()
    net.linear.bias.data.fill_(torch.nan)  # a difference that is no number is not below the tolerance
    with pytest.raises(ValueError, match="was not kept: .* differ from the eager model's by up to nan"):
        write(model, tmp_path / "model.onnx", images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_embeddings_that_overflow_prove_nothing(run, photos, images, tmp_path):
    """Their length is inf, so that normalized they are 0 in every format."""
    model = open_model(run)
    model.backbone.linear.weight.data.mul_(1e30)
    with torch.no_grad():
        assert (model(images) == 0).all()
    with pytest.raises(ValueError, match="embeddings of real images are not of length 1"):
        write_torch_export(model, tmp_path / "model.pt2", images)
    assert list(tmp_path.iterdir()) == []
    save_backbone(model, tmp_path)
    message = embed_here(tmp_path, photos, tmp_path / "out.npy")
    assert "the embedding of 00/ä b.png is not of length 1: the model is untrained or has diverged" in message
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


# ---- class centers


HEADS = {
    "sampled": (0.3, None, {}),
    "all": (1.0, None, {}),
    "adamw": (0.3, None, ADAMW),
    "bias": (0.3, Softmax(), {}),
    "sub-centers": (0.3, SubCenterArcFace(sub_centers=3), {}),
    "fast momentum": (0.1, ArcFace(), {"momentum": 0.5, "weight_decay": 0.3}),
}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_the_gallery_is_the_full_weight(tmp_path, monkeypatch, head, world_size):
    rate, margin, options = HEADS[head]
    weight = run_ranks(save_here, world_size, tmp_path, rate, 23, margin, options)[0]
    k = 3 if head == "sub-centers" else 1
    wanted = weight.unflatten(0, (23, 3)) if k == 3 else weight
    found = checkpoint.find_latest(tmp_path)
    slices = list(checkpoint.read_centers(found, 4))
    assert torch.equal(torch.cat(slices), wanted) and max(map(len, slices)) == 4
    stored = torch.cat([load_file(part)["weight"] for part in sorted(found.path.glob("centers_*"))])
    lagged = options is not ADAMW and rate < 1
    assert torch.equal(stored, wanted) != lagged, "nothing sat out, so nothing was caught up"

    monkeypatch.setattr(gallery, "_BYTES_AT_ONCE", 8 * k * 4 * 5)  # five classes
    assert write_gallery(found, tmp_path) == tuple(wanted.shape)
    got = load_file(tmp_path / "class_centers.safetensors")["class_centers"]
    assert torch.equal(got, nn.functional.normalize(wanted, dim=-1).float())
    with safe_open(tmp_path / "class_centers.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "normalized": "true", "step": "5"}
    assert (tmp_path / "classes.txt").read_text() == "".join(NAMES)


def test_damaged_class_centers_are_an_error(run, tmp_path):
    copy = tmp_path / "step"
    shutil.copytree(run / "checkpoints" / "step_00000012", copy)
    part = min(copy.glob("centers_*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{part.name} is damaged"):
        export_run(copy, tmp_path / "out", gallery=True)
    assert not (tmp_path / "out").exists()


def test_rows_must_fill_the_shape(tmp_path):
    rows = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    for name in ("a.npy", "a.safetensors"):
        write_rows(tmp_path / name, "rows", (4, 3, 2), [rows[:3], rows[3:]])
        with pytest.raises(ValueError, match="got 72 bytes of rows, wanted 96"):
            write_rows(tmp_path / f"b{name}", "rows", (4, 3, 2), [rows[:3]])
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)
    assert np.array_equal(load_file(tmp_path / "a.safetensors")["rows"].numpy(), rows)


# ---- partial-fc embed


@pytest.fixture(scope="module")
def photos(glyphs_ci, tmp_path_factory) -> Path:
    """30 images of other sizes at several depths, and what is none."""
    folder = tmp_path_factory.mktemp("photos")
    index = load_index(glyphs_ci / "test_seen")
    batch = next(iter(images_in_order(index, np.arange(30), 30, 0)))
    for number, image in enumerate(batch.images.permute(0, 2, 3, 1).numpy()):
        place = folder / f"{number:02d}" / "deep" if number % 2 else folder / f"{number:02d}"
        place.mkdir(parents=True)
        cv2.imwrite(str(place / "ä b.png"), cv2.resize(image, (40 + number, 50)))
    (folder / "03" / "empty.jpg").touch()
    (folder / "04" / "a_broken.png").write_bytes(b"no image")
    (folder / "04" / "gone.png").symlink_to("nowhere.png")
    (folder / "notes.txt").write_text("no image either")
    (folder / ".hidden.png").write_bytes(b"no image")
    return folder


def embed_here(model: Path, source: Path, out: Path, batch_size: int = 7) -> int | str:
    try:
        return embed_images(model, source, out, CPU, batch_size=batch_size, workers=0)
    except RunError as error:
        return str(error)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


def test_a_folder_is_embedded_as_the_data_set_prepared_from_it(exported, photos, tmp_path):
    assert embed_here(exported, photos, tmp_path / "of" / "folder.npy") == 30
    prepare_folder(photos, tmp_path / "shards", size=(32, 32))
    assert embed_here(exported, tmp_path / "shards", tmp_path / "of" / "shards.npy") == 30
    of_folder, of_shards = (np.load(tmp_path / "of" / f"{name}.npy") for name in ("folder", "shards"))
    names = [row["name"] for row in rows_of(tmp_path / "of" / "folder.npy")]
    assert names == [f"{number:02d}/{'deep/' * (number % 2)}ä b.png" for number in range(30)]
    classes = [row["class"] for row in rows_of(tmp_path / "of" / "shards.npy")]
    order = [classes.index(name[:2]) for name in names]
    np.testing.assert_allclose(of_folder, of_shards[order], rtol=0, atol=1e-6)
    assert of_folder.dtype == np.float32 and len({row.tobytes() for row in of_folder}) == 30
    for name, row in zip(names[:3], of_folder, strict=False):
        model = load_backbone(exported)
        with torch.no_grad():
            alone = model(load_image(photos / name, model.image_size).unsqueeze(0))[0].numpy()
        np.testing.assert_allclose(alone, row, rtol=0, atol=1e-6)
        embed_here(exported, photos / name, tmp_path / name[:2] / "one.npy")
        np.testing.assert_allclose(np.load(tmp_path / name[:2] / "one.npy"), row[None], rtol=0, atol=1e-6)
        assert rows_of(tmp_path / name[:2] / "one.npy") == [{"name": "ä b.png"}]


def test_what_cannot_be_read_is_left_out_counted_and_named(exported, photos, tmp_path, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("partial_fc.export.embed.write_rows", full)
        assert "No space left on device" in embed_here(exported, photos, tmp_path / "out.npy")
    assert not list(tmp_path.iterdir()), "else it could not be tried again"
    embed_here(exported, photos, tmp_path / "out.npy")
    lines = (tmp_path / "out.left_out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": "03/empty.jpg", "reason": "empty"},
        {"name": "04/a_broken.png", "reason": "undecodable"},
        {"name": "04/gone.png", "reason": "unreadable"},
        {"name": "notes.txt", "reason": "not_an_image"},
    ]
    said = capsys.readouterr().out
    assert "left out: 1 empty, 1 undecodable, 1 unreadable, 1 not_an_image, see " in said


def test_damaged_jpegs_are_left_out_unless_they_are_kept(exported, tmp_path):
    whole = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))[1].tobytes()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "whole.jfif").write_bytes(whole)
    (tmp_path / "photos" / "cut.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    for keep, count in ((False, 1), (True, 2)):
        out = tmp_path / f"{count}.npy"
        assert embed_images(exported, tmp_path / "photos", out, CPU, workers=0, keep_damaged=keep) == count
        assert out.with_suffix(".left_out.jsonl").exists() != keep
    assert json.loads((tmp_path / "1.left_out.jsonl").read_text()) == {"name": "cut.jpg", "reason": "damaged"}
    with pytest.raises(ValueError, match="cut.jpg is damaged: wanted a whole image file, or keep_damaged=True"):
        load_image(tmp_path / "photos" / "cut.jpg", (32, 32))
    assert load_image(tmp_path / "photos" / "cut.jpg", (32, 32), keep_damaged=True).shape == (3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_the_files_are_the_same_at_any_number_of_ranks(exported, photos, tmp_path, ending):
    for world_size in (1, 2, 3):
        out = tmp_path / f"{world_size}" / f"out{ending}"
        assert run_ranks(embed_here, world_size, exported, photos, out, 12) == [30] * world_size  # 3 batches
        assert sorted(path.name for path in out.parent.iterdir()) == [
            "out.jsonl",
            "out.left_out.jsonl",
            f"out{ending}",
        ]
        for path in out.parent.iterdir():
            assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes(), path
    if ending == ".safetensors":
        assert load_file(out)["embeddings"].shape == (30, 64)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder"])
def test_run_checkpoint_and_folder_give_what_an_evaluation_sees(run, exported, glyphs_ci, tmp_path, kind):
    model = {"run": run, "checkpoint": run / "checkpoints" / "step_00000012", "folder": exported}[kind]
    data = glyphs_ci / "test_unseen"
    assert embed_here(model, data, tmp_path / "out.safetensors", 256) == load_index(data).num_samples
    got = load_file(tmp_path / "out.safetensors")["embeddings"]
    assert torch.equal(got, of_the_run(run, data))
    index, rows = load_index(data), rows_of(tmp_path / "out.safetensors")
    assert [row["label"] for row in rows] == index.label.tolist()
    label = int(index.label[5])
    named = {"name": index.key(5), "label": label, "class": index.classes()[label], "source": index.name(5)}
    assert rows[5] == named and " in " in named["source"]
    assert not (tmp_path / "out.left_out.jsonl").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_errors_are_the_same_on_every_rank_and_leave_nothing(exported, photos, tmp_path, world_size):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    (tmp_path / "none").mkdir()
    (tmp_path / "there.jsonl").touch()
    prepare_folder(photos, tmp_path / "large", size=(48, 48))
    before = sorted(tmp_path.iterdir())
    cases = [
        (exported, photos, "out.bin", "wanted a name in .safetensors or .npy, batches of 1 or more"),
        (exported, photos, "there.npy", "there.jsonl exists: delete it"),
        (exported, tmp_path / "nowhere", "out.npy", "nowhere does not exist, wanted an image, a folder of images"),
        (exported, tmp_path / "none", "out.npy", "has no image in it or below; 0 files of other kinds"),
        (exported, tmp_path / "large", "out.npy", "images of (48, 48) pixels, the model wants (32, 32)"),
        (exported, tmp_path / "bad", "out.npy", "none of the 1 images of"),
        (exported, tmp_path / "bad" / "a.png", "out.npy", "none of the 1 images of"),
        (tmp_path / "none", photos, "out.npy", "holds no complete checkpoint"),
        (exported, photos, "there.jsonl/out.npy", "there.jsonl is a file, wanted a folder: give another name to write"),
    ]
    for model, source, out, message in cases:
        answers = run_ranks(embed_here, world_size, model, source, tmp_path / out)
        assert all(message in answer for answer in answers), answers
    assert sorted(tmp_path.iterdir()) == before


# ---- as it is typed


@pytest.mark.slow
def test_export_and_embed_as_typed(run, photos, glyphs_ci, tmp_path):
    said = partial_fc("export", run, tmp_path / "out", "--gallery", "--formats", "torch-export")
    assert "model.pt2: largest difference from the eager model " in said and "smallnet of step 12" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "model.pt2", "class_centers.safetensors", "classes.txt")
    }
    said = partial_fc("embed", tmp_path / "out", photos, tmp_path / "photos.npy")
    assert f"{tmp_path}/photos.npy: 30 embeddings of 64 numbers" in said
    assert "error: " in partial_fc("embed", tmp_path / "out", photos, tmp_path / "photos.npy", code=1)
    assert "error: nowhere holds no complete checkpoint" in partial_fc("export", "nowhere", tmp_path / "x", code=1)


@pytest.mark.slow
def test_the_example_of_the_readme(exported, photos, tmp_path):
    section = (REPOSITORY / "README.md").read_text().partition("\n## Export")[2].partition("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(program.splitlines()) <= 20
    (tmp_path / "compare.py").write_text(program)
    paths = [photos / "00" / "ä b.png", photos / "01" / "deep" / "ä b.png"]
    done = run_program(tmp_path / "compare.py", exported, *paths, timeout=120)
    assert done.returncode == 0, done.stderr
    embed_here(exported, photos, tmp_path / "out.npy")
    first, second = np.load(tmp_path / "out.npy")[:2]
    assert float(re.search(r"cosine (-?\d\.\d+)", done.stdout).group(1)) == pytest.approx(first @ second, abs=6e-5)
