"""The wheel that the repository builds holds our packages and works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_nothing_but_our_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"shira_format", "shira_analysis", "shira_cli"} == {
        name.split("/")[0] for name in names if ".dist-info/" not in name
    }
    for needed in (
        "shira_format/py.typed", "shira_format/codecs/gap8.py", "shira_cli/data/loras/spam/adapter_model.safetensors",
        "shira_cli/data/text/genre.jsonl", "shira_analysis/effect.py",
    ):  # fmt: skip
        assert needed in names


def test_it_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    vector = ROOT / "spec" / "vectors" / "good" / "example.st"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import shira_format, shira_cli.inspect, shira_cli.demo; "
        "assert shira_format.__file__.startswith(sys.argv[1]), shira_format.__file__; "
        "assert (shira_cli.demo.DATA / 'loras' / 'spam').is_dir(); sys.exit(shira_cli.inspect.main(sys.argv[2:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(site), str(vector), "--verify"],
        cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)
    assert "all digests and rules" in done.stdout
