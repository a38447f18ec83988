"""Settings: defaults once, deltas, overrides, and errors that name the nearest key and what was wanted."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import partial_fc
from partial_fc import Margin, backbone
from partial_fc.config import Config
from partial_fc.config_file import describe, load_config, save_config, without_dashes
from partial_fc.environment import environment
from partial_fc.figures.margins import parse_margins
from partial_fc.head.embedding_losses import CenterLoss, TripletLoss, build_embedding_loss
from partial_fc.head.margins import BY_NAME, build_margin
from partial_fc.head.named import source_of
from partial_fc.optim import learning_rate
from tests.conftest import REPOSITORY

MINIMAL = """
run: {steps: 10}
data: {train: data/x, global_batch_size: 64}
backbone: {name: smallnet}
"""


@pytest.fixture
def yaml_file(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_deltas_and_overrides(yaml_file):
    config = load_config(yaml_file, ["optim.lr=5e-2", "head.margin.scale=30", "data.affine.degrees=5", "run.seed=7"])
    assert config.optim.lr == 0.05 and config.optim.momentum == 0.9 and config.run.seed == 7
    assert config.head.margin.name == "cosface" and config.head.margin.parameters == {"scale": 30}
    assert config.data.affine.degrees == 5 and config.data.affine.scale == 0
    assert config.run.dir == "runs/tiny"
    assert load_config(yaml_file, ["--run.dir=else-where"]).run.dir == "else-where"
    assert without_dashes(["--print-config", "--out=a.b", "--a.b", "a.b=--c.d=1"]) == [
        "--print-config",
        "--out=a.b",
        "--a.b",
        "a.b=--c.d=1",
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("optim.sample_rate=1", "optim.sample_rate: unknown key; did you mean head.sample_rate?"),
        ("dat.workers=1", "dat: unknown key; did you mean data?"),
        ("track.tags=a", "track.tags: unknown key; there are log_every, wandb"),  # not: did you mean optim.betas?
        ("head.scale=30", "head.scale: unknown key; there are margin, embedding_losses"),  # not: data.affine.scale?
        ("run.name=a", "run.name: unknown key; there are dir, seed"),  # not one of three sections' name
        ("head.sample_rate=2", "head.sample_rate: got 2; Input should be less than or equal to 1"),
        ("head.sample_rate=0", "head.sample_rate: got 0; Input should be greater than 0"),
        ("optim.lr=fast", "optim.lr: got 'fast'; Input should be a valid number"),
        ("data.std=[1, 0, 1]", "data.std.1: got 0; Input should be greater than 0"),
        ("optim.lr=.nan", "optim.lr: got nan; Input should be a finite number"),
        ("optim.schedule=linear", "got 'linear'; Input should be 'polynomial', 'cosine', 'constant' or 'step'"),
        ("optim.clip_jointly=true", "optim.clip_jointly without optim.clip: give the largest norm, as optim.clip=5"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: got 1; Input should be less than 1"),
        ("engine.precision=fp8", "engine.precision: got 'fp8'; Input should be 'fp32', 'tf32', 'bf16' or 'fp16'"),
        ("optim.schedule=step", "optim.schedule is step and optim.milestones are []: give both"),
        ("optim.milestones=[5]", "optim.schedule is polynomial and optim.milestones are [5]: give both"),
        ("run.timeout=9", "run.timeout: got 9; Input should be greater than or equal to 10"),
        ("run.epochs=3", "give either run.steps or run.epochs, and make the other null"),
        (
            "optim.zzz=3",
            "optim.zzz: unknown key; there are name, lr, lr_batch, momentum, betas, eps, weight_decay",
        ),
        ("data.streams=5", "data.global_batch_size 64 is no multiple of data.streams 5"),
        ("data.train=null", "data.train: got None; Input should be a valid string"),
        ("lr=3", "override 'lr=3': wanted section.key=value"),
        ("optim.lr", "override 'optim.lr': wanted section.key=value"),
        ("run.steps.x=1", "override 'run.steps.x=1': steps is no section"),
        ("optim.lr=[1", "override 'optim.lr=[1': the value, line 1 is no YAML: "),
    ],
)
def test_errors_name_what_to_change(yaml_file, override, message):
    with pytest.raises(ValueError) as caught:
        load_config(yaml_file, [override])
    assert message in str(caught.value)


def test_all_errors_come_at_once(yaml_file):
    with pytest.raises(ValueError) as caught:
        load_config(yaml_file, ["optim.lrr=1", "head.sample_rate=2", "data.streams=5"])
    assert all(text in str(caught.value) for text in ("optim.lrr", "head.sample_rate", "data.streams"))


@pytest.mark.parametrize("milestones, warmup", [("[5, 5]", 0), ("[7, 5]", 0), ("[0, 5]", 0), ("[3, 5]", 3)])
def test_milestones_rise_past_the_warm_up(yaml_file, milestones, warmup):
    step = ["optim.schedule=step", f"optim.warmup_steps={warmup}"]
    with pytest.raises(ValueError, match="optim.milestones are .* give steps that rise, all past the warm-up"):
        load_config(yaml_file, [*step, f"optim.milestones={milestones}"])
    optim = load_config(yaml_file, [*step, "optim.milestones=[4, 5]"]).optim
    assert optim.milestones == (4, 5) and optim.factor == 0.1


@pytest.mark.parametrize(
    "text, message",
    [("- a\n- b", "wanted sections"), ("run: [1", "is no YAML"), ("run: {steps: 1}", "data: missing")],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="no such config file"):
        load_config(tmp_path / "missing.yaml")


def test_saved_config_loads_again_and_notes_its_environment(yaml_file, tmp_path):
    config = load_config(yaml_file, ["head.margin.name=arcface", "head.margin.margin=0.4"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    noted = yaml.safe_load((tmp_path / "config.yaml").read_text())["environment"]
    assert noted == environment() and noted["torch"] and len(noted["git_commit"].removesuffix("-dirty")) in (40, 7)


def test_description_is_yaml_with_every_setting(yaml_file, tmp_path):
    config = load_config(
        yaml_file, ["head.margin.scale=null", "head.margin.margin=3e-1", "head.embedding_losses.center={}"]
    )
    (tmp_path / "described.yaml").write_text(describe(config))
    assert load_config(tmp_path / "described.yaml") == config


def test_every_setting_is_documented():
    def undocumented(section) -> list[str]:
        from pydantic import BaseModel

        found = []
        for name, field in section.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                found += undocumented(annotation)
            elif not field.description and name not in ("momentum", "weight_decay"):  # their names say it
                found.append(f"{section.__name__}.{name}")
        return found

    assert undocumented(Config) == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_of_the_repository_are_valid(path):
    config = load_config(path)
    assert build_margin(config.head.margin.name, config.head.margin.parameters)
    for name, parameters in config.head.embedding_losses.items():
        assert build_embedding_loss(name, parameters)
    assert all(learning_rate(step, 200_000, config.optim.lr, config.optim) > 0 for step in (0, 30_000, 199_999))


VIT = "timm/vit_base_patch8_224"


def backbones_of_the_configs() -> set[tuple]:
    """Name, embedding size, and the images' size that the config's comment says."""
    others = {"glyphs_ci": (32, 32), "glyphs_demo": (64, 64), "folder": (112, 112)}
    found = set()
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        choice = load_config(path).backbone
        said = re.search(r"images of (\d+) x (\d+)", " ".join(path.read_text().split("\n# ")))
        size = others[path.stem] if said is None else tuple(map(int, said.groups()))
        found.add((choice.name, choice.embedding_dim, size))
    return found


@pytest.mark.slow
def test_the_backbones_of_the_configs_embed_images_of_their_size():
    """One forward for each; of the ViT's 86 million parameters, drawn in 4 s, the shapes alone."""
    found = backbones_of_the_configs()
    assert {name for name, *_ in found} == {"smallnet", "spherenet20", "resnet28", "iresnet50", "iresnet100", VIT}
    for name, dim, size in found:
        with torch.device("meta" if name == VIT else "cpu"), torch.no_grad():
            embeddings = backbone.build(name, dim, size)(torch.randn(2, 3, *size))
        assert embeddings.shape == (2, dim) and (name == VIT or embeddings.isfinite().all())


@pytest.mark.soak("export")
def test_the_vit_of_the_configs_embeds_images_of_its_size():
    ((name, dim, size),) = (one for one in backbones_of_the_configs() if one[0] == VIT)
    with torch.no_grad():
        embeddings = backbone.build(name, dim, size)(torch.randn(2, 3, *size))
    assert embeddings.shape == (2, dim) and embeddings.isfinite().all()


def test_losses_beside_the_classifier(yaml_file):
    config = load_config(yaml_file, ["head.embedding_losses.center.weight=1e-2", "head.embedding_losses.triplet={}"])
    built = [build_embedding_loss(*item) for item in config.head.embedding_losses.items()]
    assert built == [CenterLoss(weight=0.01), TripletLoss()]


def test_the_margin_of_the_readme_by_its_module(yaml_file, tmp_path, monkeypatch):
    section = (REPOSITORY / "README.md").read_text().partition("\n## Margins")[2]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    (tmp_path / "readme_losses.py").write_text(program + "\n\nclass Plain(Margin):\n    pass\n\n\nnumber = 3\n")
    (tmp_path / "broken_losses.py").write_text("class Mine(\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(yaml_file, ["head.margin.name=readme_losses.Mine", "head.margin.margin=0.3"])
    with pytest.raises(ValueError, match="head.margin.name: 'readme_losses.Mine' is code outside .* --trust-code"):
        build_margin(config.head.margin.name, config.head.margin.parameters)
    assert "readme_losses" not in sys.modules and source_of("readme_losses.Mine") == tmp_path / "readme_losses.py"
    margin = build_margin(config.head.margin.name, config.head.margin.parameters, trust_code=True)
    assert type(margin).__module__ == "readme_losses" and margin.margin == 0.3
    assert margin.target(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([1.0, -0.3])
    (named,) = parse_margins("readme_losses.Mine:margin=0.4")
    assert named.label == "Mine m = 0.4" and type(named.margin) is type(margin)
    warm = build_margin("readme_losses.Mine", {"margin": 0.3, "warmup": {"steps": 10, "margin": 0.1}}, trust_code=True)
    assert warm.at(5).margin == pytest.approx(0.2)
    for name, message in (
        ("nowhere.Mine", "'nowhere.Mine' cannot be imported .ModuleNotFoundError: No module .*; give module.Class"),
        ("readme_losses.Other", "cannot be imported .AttributeError: module 'readme_losses' has no attribute 'Other'"),
        (".Mine", "cannot be imported"),
        ("..Mine", "cannot be imported"),
        ("broken_losses.Mine", "cannot be imported .SyntaxError"),
        ("readme_losses.number", "is 3; wanted a subclass of Margin, below @dataclass"),
        ("readme_losses.Plain", "wanted a subclass of Margin, below @dataclass"),
        ("partial_fc.PartialFC", "wanted a subclass of Margin"),
    ):
        with pytest.raises(ValueError, match="head.margin.name: .*" + message):
            build_margin(name, {}, trust_code=True)
    with pytest.raises(ValueError, match="head.margin.width: readme_losses.Mine has no such parameter; it has"):
        build_margin("readme_losses.Mine", {"width": 2}, trust_code=True)


def test_margins_by_name():
    assert all(build_margin(name, {}) == margin() for name, margin in BY_NAME.items())
    exported = {getattr(partial_fc, name) for name in partial_fc.__all__}
    exported = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Margin)}
    assert exported == {Margin, *BY_NAME.values()} and len(BY_NAME) == 15
    assert build_margin("cosface", {"scale": None, "margin": 0.2}).scale is None
    assert build_margin("cosface", {"margin": "3e-1"}).margin == 0.3
    assert build_margin("arcface", {"straight_through": True}).straight_through is True
    assert build_margin("sphereface", {"margin": 3, "lambda_max": 0, "lambda_min": 0}).annealing(0) == 0
    for name, parameters, message in [
        ("cosfase", {}, "did you mean cosface?"),
        (
            "zzz",
            {},
            "there are softmax, softmarginsoftmax, l2softmax, .*, elasticarcface, curricularface, subcenterarcface",
        ),
        ("softmax", {"scale": 3}, "softmax has no such parameter; it has none"),
        ("arcface", {"margin": "big"}, "head.margin.margin: got 'big'; wanted a number"),
        ("arcface", {"margin": None}, "head.margin.margin: got None; wanted a number"),
        ("arcface", {"margin": 4.0}, "ArcFace: margin is 4.0; give one in"),
        ("arcface", {"straight_through": 1}, "head.margin.straight_through: got 1; wanted true or false"),
        ("arcface", {"margin": True}, "head.margin.margin: got True; wanted a number"),
        ("sphereface", {"scale": 30}, "sphereface has no such parameter; it has margin, lambda_max, lambda_min, gamma"),
        ("lsoftmax", {"margin": 2.5}, "LSoftmax: margin is 2.5; give 1, 2, 3 or 4"),
        ("magface", {"margin": 0.5}, "it has scale, .*, low, high, low_margin, high_margin, regularization"),
        ("combinedmargin", {}, "did you mean combined?"),
    ]:
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            build_margin(name, parameters)


# ---- URLs where only a path works

SETS = ("evaluate.sets={P1: {data: %s}}", "evaluate.sets={P1: {data: here, distractors: %s}}")


@pytest.mark.parametrize(
    "setting, url",
    [
        *(("run.dir", url) for url in ("s3://bucket/run", "https://host/x", "hf://owner/x", "s3:/bucket/run")),
        ("data.cache_dir", "s3://bucket/run"),
        *((setting, "s3:/bucket/run") for setting in ("data.train", *SETS)),
    ],
)
def test_a_url_where_only_a_path_works_is_refused_by_name(setting, url):
    override = setting % url if "%" in setting else f"{setting}={url}"
    name = dict(zip(SETS, ("evaluate.sets.P1.data", "evaluate.sets.P1.distractors"), strict=True)).get(setting, setting)
    with pytest.raises(
        ValueError, match=f"  {name}: got '{url}'; {url} is a URL, and this takes a path on this machine"
    ):
        load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", [override])


def test_checkpoints_may_go_to_a_url_and_paths_may_be_written_as_one():
    config = load_config(
        REPOSITORY / "configs" / "glyphs_ci.yaml", ["checkpoint.dir=s3://bucket/run", "run.dir=file:///tmp/run"]
    )
    assert config.checkpoint.dir == "s3://bucket/run" and config.run.dir == "/tmp/run"
    with pytest.raises(ValueError, match="checkpoint.dir: got 's3:/bucket/run'; s3:/bucket/run is a URL"):
        load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", ["checkpoint.dir=s3:/bucket/run"])
    with pytest.raises(ValueError, match="checkpoint.dir: got ''"):
        load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", ["checkpoint.dir=''"])
    for fine in ("runs/a:b", "C:/runs", "/data/with: colon/x"):
        assert load_config(REPOSITORY / "configs" / "glyphs_ci.yaml", [f"run.dir='{fine}'"]).run.dir == fine
