"""No page of a study drifts from its results: each is what ``--report`` makes of what is stored."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from studies.commands import RESULTS, STUDIES
from studies.tables import PAGES

ROOT = Path(__file__).parents[1]
STORED = [name for name in STUDIES if (RESULTS / name / "runs.jsonl").exists()]
REPORT = "import sys; from studies.__main__ import main; sys.exit(any(main([name, '--report']) for name in sys.argv[1:]))"


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the studies, their results and their pages, with all reports written anew."""
    folder = tmp_path_factory.mktemp("again")
    for part in (RESULTS.parent, PAGES):
        shutil.copytree(part, folder / part.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    for name in STORED:
        for table in (folder / RESULTS.relative_to(ROOT) / name).glob("*.csv"):
            table.unlink()
    path = os.pathsep.join(map(str, [folder, *sys.path[1:], ROOT]))
    subprocess.run(
        [sys.executable, "-c", REPORT, *STORED], cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=True
    )
    return folder


@pytest.mark.parametrize("name", STORED)
def test_page_and_tables_are_those_of_the_results(again: Path, name: str) -> None:
    files = [PAGES / f"{name}.md", *sorted((RESULTS / name).glob("*.csv")), ROOT / "README.md"]
    assert len(files) > 2
    for file in files:
        assert (again / file.relative_to(ROOT)).read_text("utf-8") == file.read_text("utf-8"), file.name
