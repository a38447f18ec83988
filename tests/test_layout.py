"""The house: imports point one way, outside packages have one door each, importing does nothing, the tree is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "partial_fc"
MODULES = sorted(path.relative_to(REPOSITORY) for path in PACKAGE.rglob("*.py"))

# A module imports from lower floors, or from its own package.
FLOORS = [
    {"seeds", "environment", "storage"},
    {"config"},
    {"config_file"},
    {"parallel", "backbone", "optim", "phases"},
    {"data", "head", "checkpoint_files"},
    {"checkpoint", "prepare", "progress", "profiler", "trackers"},
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
    "webdataset": {"data/shards.py"},
    "wandb": {"trackers.py"},
    "torch.utils.tensorboard": {"trackers.py"},
    "fsspec": {"storage.py"},
    "yaml": {"config_file.py", "environment.py", "report/runs.py", "study/plan.py"},
    "safetensors": {"checkpoint.py", "export/model.py"},
    "onnxruntime": {"export/formats.py"},
    "huggingface_hub": {"export/model.py"},
    "PIL": {"prepare/faces.py"},
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


def test_importing_does_nothing():
    """Neither CUDA nor a process group, no output, no thread count changed, no random number drawn."""
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    program = f"""
import importlib, sys, threading, torch
before, threads = torch.random.get_rng_state(), torch.get_num_threads()
for name in {names!r}:
    importlib.import_module(name)
import torch.distributed as dist
assert not dist.is_initialized() and not torch.cuda.is_initialized()
assert torch.equal(before, torch.random.get_rng_state()) and threads == torch.get_num_threads()
assert threading.active_count() == 1, threading.enumerate()
assert "deepspeed" not in sys.modules  # seconds, and it is not for everyone
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "", done.stderr


@pytest.mark.parametrize("program", ["partial_fc/cli.py", "launch/train.py"])
def test_what_draws_and_tracks_is_loaded_where_it_is_needed(program):
    program = f"import runpy, sys; runpy.run_path({program!r}); print({{'matplotlib', 'wandb'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_the_readme_shows_the_tree_as_it_is():
    text = (REPOSITORY / "README.md").read_text()
    tree = re.search(r"```text tree\n(.*?)```", text, re.DOTALL).group(1)
    shown, folder = set(), ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line
            continue
        names, _, phrase = line.strip().partition("  ")
        assert phrase.strip(), f"no phrase beside {names}"
        shown |= {folder + name for name in names.split()}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    wanted = {
        path for path in listed.splitlines() if path.endswith((".py", ".yaml", ".j2")) and not path.startswith("tests/")
    }
    wanted = {path for path in wanted if not path.endswith("__init__.py")}
    assert shown >= wanted, f"missing in the README: {sorted(wanted - shown)}"
    gone = {path for path in shown if not (REPOSITORY / path).exists()}
    assert not gone, f"in the README but not there: {sorted(gone)}"


PAGES = [REPOSITORY / folder / "README.md" for folder in (".", "configs/study", "figures", "launch")]


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


def test_modules_stay_small():
    assert {str(p): n for p in MODULES if (n := len((REPOSITORY / p).read_text().splitlines())) > 420} == {}
