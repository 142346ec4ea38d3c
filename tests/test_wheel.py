"""What the repository builds holds our packages, passes twine's check, and works away from the checkout."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {"shira_format": ROOT, "shira_analysis": ROOT / "analysis", "shira_cli": ROOT / "cli"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_both_pass_the_check_of_twine(built: Path) -> None:
    files = [str(path) for path in built.iterdir()]
    assert {".gz", ".whl"} == {Path(path).suffix for path in files}
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_of_our_packages_and_nothing_else(wheel: Path) -> None:
    """Every module and every file of data is there, so that no list of packages falls behind."""
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {
        str(path.relative_to(place).as_posix())
        for package, place in PLACES.items()
        for path in (place / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == ours
    for needed in ("shira_format/py.typed", "shira_cli/data/loras/spam/adapter_model.safetensors"):
        assert needed in found


def call(site: Path, folder: Path, target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an entry point from the unpacked wheel."""
    module, _, function = target.partition(":")
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import shira_format; "
        "assert shira_format.__file__.startswith(sys.path[0]), shira_format.__file__; "
        f"from {module} import {function}; sys.exit({function}())"
    )
    command = [sys.executable, "-c", script, str(site), *arguments]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def test_every_command_starts_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    entries = configparser.ConfigParser()
    entries.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    assert len(entries["console_scripts"]) >= 10
    for target in entries["console_scripts"].values():
        done = call(site, tmp_path, target, "--help")
        assert (0, "") == (done.returncode, done.stderr), target
        assert "Usage:" in done.stdout


def test_it_works_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    vector = ROOT / "spec" / "vectors" / "good" / "example.st"
    done = call(site, tmp_path, "shira_cli.inspect:main", str(vector), "--verify")
    assert (0, "") == (done.returncode, done.stderr)
    assert "all digests and rules" in done.stdout
    script = "import sys; sys.path.insert(0, sys.argv[1]); from shira_cli.shipped import DATA; print(DATA)"
    command = [sys.executable, "-c", script, str(site)]
    data = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    assert data.startswith(str(site))
    assert (Path(data) / "loras" / "spam").is_dir()
