"""Debian packages unpacked without root: `apt-get download`, then `dpkg -x`.

Nothing is installed and nothing outside the cache folder is written:

    CACHE/<set>/<package>/usr/share/...    one unpacked package, complete as soon as it has this name
    CACHE/<set>/complete.txt               the packages of the set, written last: the set is whole
    CACHE/apt/                             apt's configuration, package lists and cache files
    CACHE/lock                             held while fetching: one run at a time
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


def cache_folder(kind: str) -> Path:
    """The folder that packages of a kind stay in between runs: `$PARTIAL_FC_CACHE/<kind>`, or under ~/.cache."""
    return Path(os.environ.get("PARTIAL_FC_CACHE") or Path.home() / ".cache" / "partial_fc") / kind


def fetch_packages(packages: Sequence[str], folder: Path, what: str, instead: str) -> Path:
    """`folder` with the unpacked `packages`, fetched unless they are there; its parent keeps apt's files.

    Works for root and for an ordinary user. A run that was cut off goes on with the packages still missing. `what`
    names the set in messages, `instead` says what does without it.

    Raises:
        OSError: apt-get or dpkg is missing, or a package could not be downloaded or unpacked.
    """
    folder = Path(folder).resolve()
    marker = folder / "complete.txt"
    listing = "".join(f"{package}\n" for package in packages)
    if marker.is_file() and marker.read_text() == listing:
        return folder

    missing = [program for program in ("apt-get", "dpkg") if shutil.which(program) is None]
    if missing:
        raise OSError(
            f"{what} comes from Debian's packages, and this system has no {' and no '.join(missing)}. {instead}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / "lock"):
        apt = _Apt(folder.parent / "apt", instead)
        todo = [package for package in packages if not (folder / package).is_dir()]
        with tqdm(todo, desc=what, unit="package", mininterval=1) as bar:
            for package in bar:
                bar.set_postfix_str(package)
                _fetch_package(apt, package, folder / package)
        partial = marker.with_suffix(".partial")
        partial.write_text(listing)
        partial.replace(marker)
    return folder


def _fetch_package(apt: "_Apt", package: str, target: Path) -> None:
    """Download and unpack one package; `target` appears only when it is whole."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "deb").mkdir(parents=True)
    apt.download(package, partial / "deb")
    (deb,) = (partial / "deb").glob("*.deb")
    _run(["dpkg", "-x", str(deb), str(partial)], f"unpacking {deb.name}", apt.instead)
    shutil.rmtree(partial / "deb")
    partial.rename(target)


class _Apt:
    """apt-get with its files in `state`, and with package lists of its own where the system's fall short."""

    def __init__(self, state: Path, instead: str):
        self.state = state
        self.instead = instead
        self.own_lists = state / "lists"
        self.use_own_lists = self.own_lists.is_dir()
        (state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)

    def download(self, package: str, folder: Path) -> None:
        """Put the package's .deb into `folder`; apt checks its size and hash against the signed lists."""
        try:
            self._apt_get(["download", package], folder)
        except OSError:  # no lists (a fresh container), none with this package, or too old to match the archive
            self.use_own_lists = True
            (self.own_lists / "partial").mkdir(parents=True, exist_ok=True)
            self._apt_get(["update"], folder)
            self._apt_get(["download", package], folder)

    def _apt_get(self, arguments: list[str], folder: Path) -> None:
        options = [
            f'Dir::Cache "{self.state}/cache";',
            # Containers often switch these two off; without them every call parses the lists anew (0.7 s).
            'Dir::Cache::pkgcache "pkgcache.bin";',
            'Dir::Cache::srcpkgcache "srcpkgcache.bin";',
            # As root, apt downloads as the user _apt, who may not be allowed into the cache folder.
            'APT::Sandbox::User "root";',
            # The system's hooks after an update (indexers, cleaners) are not meant for lists of our own.
            "#clear APT::Update::Pre-Invoke;",
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
            'Acquire::Retries "2";',
            'Acquire::http::Timeout "30";',
        ]
        if self.use_own_lists:
            options.append(f'Dir::State::lists "{self.own_lists}";')
        configuration = self.state / "apt.conf"
        configuration.write_text("\n".join(options) + "\n")
        command = ["apt-get", "-q", "-c", str(configuration), *arguments]
        _run(command, f"`apt-get {' '.join(arguments)}`", self.instead, cwd=folder)


def _run(command: list[str], what: str, instead: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise OSError(f"{what} failed with status {done.returncode}:\n{said}\n{instead}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for whoever holds it; a process that dies lets go of it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is fetching packages into {path.parent}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
