"""The font sets: their packages, how a fetched set is told, and real downloads where apt-get can do them."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from partial_fc.prepare.fonts import FONT_SETS, fetch_fonts, font_cache
from partial_fc.prepare.packages import locked

PACKAGE = "fonts-motoya-l-cedar"  # 1.1 MB
HELD_OUT = {"fonts-kouzan-mouhitsu", "fonts-aoyagi-soseki", "fonts-seto"}


@pytest.fixture
def no_programs(tmp_path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture(scope="module")
def apt(tmp_path_factory) -> None:
    """Skips the test unless this machine's apt-get, by itself, can download PACKAGE."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        pytest.skip("not run: this system has no apt-get or no dpkg")
    options = ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10"]
    command = ["apt-get", "-q", *options, "download", PACKAGE]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("probe"), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not run: apt-get can download nothing here: {done.stderr.strip().splitlines()[-1:]}")


def use_packages(monkeypatch, *packages: str) -> None:
    monkeypatch.setitem(FONT_SETS, "small", packages)


def font_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.ttf"))


def test_sets_hold_the_packages_they_should():
    assert [len(FONT_SETS[name]) for name in ("small", "medium", "large")] == [15, 37, 13]
    for packages in FONT_SETS.values():
        assert all(package.startswith("fonts-") for package in packages)
        assert len(set(packages)) == len(packages)
    assert set(FONT_SETS["small"]) < set(FONT_SETS["medium"])
    assert set(FONT_SETS["small"]) >= HELD_OUT


def test_an_unknown_set_is_an_error_that_names_the_sets(tmp_path):
    with pytest.raises(ValueError, match="got 'smal', want one of small, medium, large"):
        fetch_fonts("smal", tmp_path)


def test_without_apt_the_error_says_what_does_instead(tmp_path, no_programs):
    with pytest.raises(OSError) as error:
        fetch_fonts("small", tmp_path / "cache")
    assert "no apt-get and no dpkg" in str(error.value)
    assert "partial-fc prepare glyphs /folder OUT" in str(error.value)
    assert "make demo FONTS=/folder" in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_complete_set_is_not_fetched_again(tmp_path, no_programs):
    marker = tmp_path / "small" / "complete.txt"
    marker.parent.mkdir()
    marker.write_text("".join(f"{package}\n" for package in FONT_SETS["small"]))
    assert fetch_fonts("small", tmp_path) == tmp_path / "small"


def test_a_set_of_other_packages_is_not_complete(tmp_path, no_programs):
    marker = tmp_path / "small" / "complete.txt"
    marker.parent.mkdir()
    marker.write_text("".join(f"{package}\n" for package in FONT_SETS["small"][1:]))
    with pytest.raises(OSError, match="no apt-get"):
        fetch_fonts("small", tmp_path)


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path))
    assert font_cache() == tmp_path / "fonts"
    monkeypatch.delenv("PARTIAL_FC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert font_cache() == tmp_path / "home" / ".cache" / "partial_fc" / "fonts"


def test_a_second_run_waits_for_the_first(tmp_path, capsys):
    entered = threading.Event()

    def second_run() -> None:
        with locked(tmp_path / "lock"):
            entered.set()

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=second_run)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()
    assert "another process is fetching packages" in capsys.readouterr().out


@pytest.mark.slow
def test_a_package_is_fetched_once_and_again_if_it_was_cut_off_while_unpacking(tmp_path, monkeypatch, apt):
    use_packages(monkeypatch, PACKAGE)
    partial = tmp_path / "small" / f"{PACKAGE}.partial"
    partial.mkdir(parents=True)
    (partial / "half.ttf").write_bytes(b"\0\1\0\0")
    folder = fetch_fonts("small", tmp_path)
    assert font_files(folder) == font_files(folder / PACKAGE) == ["MTLc3m.ttf"]
    assert not list(folder.rglob("*.deb")) and not list(folder.glob("*.partial"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert fetch_fonts("small", tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_without_package_lists_apt_gets_its_own_and_a_missing_package_is_named(tmp_path, monkeypatch, apt):
    (tmp_path / "nothing" / "partial").mkdir(parents=True)
    configuration = tmp_path / "system.conf"
    configuration.write_text(f'Dir::State::lists "{tmp_path / "nothing"}";\n')
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    use_packages(monkeypatch, PACKAGE, "fonts-there-is-none-such")
    with pytest.raises(OSError, match="Unable to locate package fonts-there-is-none-such"):
        fetch_fonts("small", tmp_path / "cache")
    cache = tmp_path / "cache"
    assert any((cache / "apt" / "lists").iterdir())
    assert font_files(cache / "small") == ["MTLc3m.ttf"]  # kept for the next run
    assert not (cache / "small" / "complete.txt").exists()
    assert not os.listdir(tmp_path / "nothing" / "partial")
