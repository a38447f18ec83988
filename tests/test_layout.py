"""The house: imports point one way, outside packages have one door each, importing does nothing, links lead on."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "partial_fc"
MODULES = sorted(path.relative_to(REPOSITORY) for path in PACKAGE.rglob("*.py"))

# A module imports from lower floors, or from its own package.
FLOORS = [
    {"files", "seeds"},
    {"documents", "strict_yaml", "opencv", "memory", "folder_lock", "folders"},
    {"environment", "schema", "tensor_files"},
    {"storage"},
    {"config", "manifest"},
    {"config_file"},
    {"parallel", "backbone", "optim", "phases"},
    {"data", "head", "checkpoint_files", "progress"},
    {"checkpoint", "prepare", "profiler", "trackers"},
    {"metrics", "evaluate"},
    {"build", "benchmark", "export"},
    {"train", "doctor"},
    {"report"},
    {"figures"},
    {"study"},
    {"commands"},
    {"cli", "launch"},
]
DOORS = {
    "torch.distributed": {"parallel/distributed.py"},
    "webdataset": {"data/shards.py", "prepare/tar_members.py"},
    "wandb": {"trackers.py"},
    "torch.utils.tensorboard": {"trackers.py"},
    "fsspec": {"storage.py"},
    "yaml": {"strict_yaml.py"},
    "cv2": {"opencv.py"},
    "safetensors": {"checkpoint.py", "checkpoint_files.py", "export/model.py", "tensor_files.py"},
    "onnxruntime": {"export/formats.py"},
    "huggingface_hub": {"export/model.py", "storage.py"},
    "aiohttp": {"storage.py"},
    "zstandard": {"data/remote.py"},
    "PIL": {"data/pixels.py", "prepare/faces.py"},
    "simplejpeg": {"data/pixels.py"},
    "fontTools": {"prepare/faces.py"},
    "jinja2": {"report/page.py"},
    "timm": {"backbone/timm_models.py"},
    "submitit": set(),
    "deepspeed": {"parallel/deepspeed_engine.py"},
    "pickle": set(),
}
NO_RANKS = {"data/order.py", "data/augment.py", "optim.py"} | {
    f"head/{name}.py"
    for name in (
        "margin",
        "margins",
        "named",
        "draws",
        "embedding_losses",
        "softmax",
        "targets",
        "elementwise",
        "matmul",
        "optimizers",
        "centers",
        "partition",
    )
}


@cache
def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    return path.with_suffix("").parts[1]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        if name.startswith("partial_fc."):
            other = name.split(".")[1]
            assert other == room or floor(other) < floor(room), f"{path} imports {name}"


@pytest.mark.parametrize("package", DOORS)
def test_each_outside_package_has_its_door(package):
    users = {
        str(path.relative_to("partial_fc"))
        for path in MODULES
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }
    assert users == DOORS[package]


def test_what_knows_nothing_of_ranks():
    for name in NO_RANKS:
        assert not any("distributed" in found for found in imports(Path("partial_fc") / name)), name
    for path in MODULES:
        if path.parts[1] == "backbone":
            assert not any("distributed" in found for found in imports(path)), path


IMPORTING = """
import importlib, runpy, sys, threading, torch
before, threads = torch.random.get_rng_state(), torch.get_num_threads()
for program in ("partial_fc/cli.py", "launch/train.py"):
    runpy.run_path(program)
    print(program, {"matplotlib", "wandb"} & set(sys.modules))
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch.distributed as dist
assert not dist.is_initialized() and not torch.cuda.is_initialized()
assert torch.equal(before, torch.random.get_rng_state()) and threads == torch.get_num_threads()
assert threading.active_count() == 1, threading.enumerate()
assert "deepspeed" not in sys.modules  # seconds, and it is not for everyone
"""


@pytest.mark.slow
def test_importing_does_nothing():
    """Neither CUDA nor a process group, no output, no thread count changed, no random number drawn.

    First the two programs, which load what draws and tracks only where they need it; all in one interpreter, since one
    costs 3 s.
    """
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    command = [sys.executable, "-c", IMPORTING, *names]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "partial_fc/cli.py set()\nlaunch/train.py set()\n", done.stdout


LAZY = """
import sys
import partial_fc
import partial_fc.parallel.process
assert not {"torch", "numpy"} & set(sys.modules)
assert set(partial_fc.__all__) <= set(dir(partial_fc))
assert not hasattr(partial_fc, "CosFaze")
"""


@pytest.mark.slow
def test_the_package_imports_nothing_by_itself():
    """A rank's first call comes before torch, whose import takes seconds."""
    subprocess.run([sys.executable, "-c", LAZY], cwd=REPOSITORY, check=True, timeout=60)


def test_every_name_of_the_package_is_found_and_typed():
    import partial_fc

    (types,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    typed = {name.name: node.module for node in types.body for name in node.names}
    assert sorted(typed) == sorted(partial_fc.__all__)
    for name, module in typed.items():
        assert getattr(partial_fc, name) is getattr(sys.modules[module], name)


PAGES = [REPOSITORY / folder / "README.md" for folder in (".", "configs/study", "figures", "launch")]
PAGES.append(REPOSITORY / "docs" / "signals.md")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
