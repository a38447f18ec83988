"""docker/Dockerfile: linted, and its steps run for real, on a substitute base and without a Docker engine.

What this does not show: the CUDA base, the CPU index of PyTorch, GPUs, and `docker` itself.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
NEEDED_BYTES = 40 * 2**30  # torch's wheels bring CUDA, 6 GB, and they are there in two stages and in the container

COMPILES = """
import sysconfig, pathlib
from partial_fc import PartialFC  # by the package's own __init__.py
from partial_fc.head.elementwise import compiler_works
headers = pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
print(f"compiles {compiler_works('cpu')}, headers {headers}")
if not compiler_works("cpu"):  # why: the error ends up in the test's output
    import torch
    torch.compile(torch.exp)(torch.zeros(2))
"""


@pytest.mark.slow
def test_hadolint():
    # beside python, where pip puts it; else on PATH
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("not run: hadolint is not installed")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_build_context_is_what_the_dockerfile_copies():
    """.dockerignore leaves out everything else: data, runs, environments, git."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for line in DOCKERFILE.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert "*" in lines and let_in == copied
    assert all((REPOSITORY / name).exists() for name in copied)


def run(*command: str | Path, minutes: float = 20) -> str:
    """Output of a command, which must succeed. Shown as it comes with `pytest -s`."""
    start = time.monotonic()
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=minutes * 60
    )
    print(f"{done.stdout}\n{' '.join(map(str, command))[:150]}: {time.monotonic() - start:.0f} s")
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def pip_settings(folder: Path) -> list[str]:
    """--volume options that give the build this machine's pip settings: indexes, certificates, constraints."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    # global.x of files, :env:.x of the environment, which wins
    merged = {name.rpartition(".")[2]: value.strip("'\"") for name, value in sorted(settings.items(), reverse=True)}
    (folder / "pip").mkdir()
    volumes = ["--volume", f"{folder}/pip:/etc/pip:ro", "--volume", f"{folder}/pip/pip.conf:/etc/pip.conf:ro"]
    for name, value in merged.items():
        for path in (Path(word.removeprefix("file://")) for word in value.split()):
            if path.is_absolute() and path.is_file():  # certificates, constraints
                shutil.copy(path, folder / "pip" / path.name)
                merged[name] = value.replace(str(path), f"/etc/pip/{path.name}")
            elif path.is_absolute() and path.is_dir():  # two levels: an index of files points to its neighbours
                root = Path(*path.parts[:3])
                volumes += ["--volume", f"{root}:{root}:ro"]
    text = "".join(f"{name} = {value}\n" for name, value in merged.items())
    (folder / "pip" / "pip.conf").write_text(f"[global]\n{text}")
    return volumes


@pytest.mark.soak("docker")
@pytest.mark.timeout(3600)
def test_the_image_builds_and_its_doctor_is_content(tmp_path, glyphs_ci):
    """From a Debian made by debootstrap: all steps of the Dockerfile, then partial-fc and torchrun in the image."""
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"not run: {program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("not run: debootstrap and buildah's chroot want root")
    if shutil.disk_usage(tmp_path).free < NEEDED_BYTES:
        pytest.skip(f"not run: {NEEDED_BYTES >> 30} GiB of disk are not free in {tmp_path}")
    buildah = ["buildah", "--root", f"{tmp_path}/store", "--runroot", f"{tmp_path}/run"]  # nobody else's images
    try:
        run("debootstrap", "--variant=minbase", SUITE, tmp_path / "debian", MIRROR)
        base = run(*buildah, "from", "scratch").split()[-1]
        run(*buildah, "add", "--quiet", base, tmp_path / "debian", "/")
        run(*buildah, "commit", "--quiet", "--rm", base, "localhost/base")
        shutil.rmtree(tmp_path / "debian")
        settings = ["--isolation", "chroot", "--pull-never", "--layers=false", *pip_settings(tmp_path)]
        build = [*buildah, "bud", *settings, "--build-arg", "BASE=localhost/base", "-t", "localhost/partial_fc"]
        run(*build, "-f", DOCKERFILE, REPOSITORY)
        container = run(*buildah, "from", "--pull-never", "localhost/partial_fc").split()[-1]

        def inside(*command: str) -> str:
            volume = f"{glyphs_ci}:/workspace/data/glyphs_ci:ro"
            return run(*buildah, "run", "--isolation", "chroot", "--volume", volume, container, "--", *command)

        assert inside("id", "-u").split()[-1] == "10001"
        assert "partial-fc" in inside("partial-fc", "--help")
        said = inside("partial-fc", "doctor", "configs/glyphs_ci.yaml")
        assert "nothing is wrong" in said or "warning" in said.splitlines()[-1], said
        assert "ok       packages: " in said and "177 steps of 48 samples an epoch" in said
        # the container's name is in no hosts file here, as it is with Docker
        torchrun = ("torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2")
        said = inside(
            *torchrun,
            "launch/train.py",
            "configs/glyphs_ci.yaml",
            "run.epochs=null",
            "run.steps=20",
            "track.wandb=disabled",
        )
        assert "report: runs/glyphs_ci/report.html" in said
        # what the head's kernels and engine.compile need is in it; what only a build needs is not
        assert inside("python", "-c", COMPILES).strip().endswith("compiles True, headers True")
        assert inside("sh", "-c", "command -v make || echo none of it").strip().endswith("none of it")
        print(run("du", "-sh", f"{tmp_path}/store"))
    finally:
        subprocess.run([*buildah, "rm", "--all"], capture_output=True)
        subprocess.run([*buildah, "rmi", "--all", "--force"], capture_output=True)
        for folder in ("store", "run", "debian"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
