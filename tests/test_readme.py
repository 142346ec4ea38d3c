"""What the README says is run: its commands and its Python, in order, in one folder, on the real model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from shira_cli import convert, inspect
from shira_format.checkpoints import open_checkpoint
from tests import models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS: dict[str, Any] = {"shira-convert": convert.main, "shira-inspect": inspect.main}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models.minilm(), tmp_path / "my-model")
    shutil.copytree(models.LORAS / "spam", tmp_path / "my-lora")
    shutil.copytree(models.sre(), tmp_path / "my-tune")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 2
    for line in lines:
        program, *arguments = shlex.split(line.removeprefix("$ "))
        assert 0 == COMMANDS[program](arguments), line
    weights = {name: array.copy() for name, array in open_checkpoint("my-model").items()}
    before = {name: array.copy() for name, array in weights.items()}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"weights": weights})
    assert before.keys() == weights.keys()
    assert all((before[name] == weights[name]).all() for name in before)


def test_the_figures_are_those_of_the_benchmark() -> None:
    """Each row of the README's table of figures is a rounded row of the stored run."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "2-core-xeon.json").read_text())["rows"]
    found = {row["case"]: row for row in stored}
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) ([^|]+) \| ([\d.]+) [^|]+\| `([^`]+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 5
    for _, ours, _, peer, case in rows:
        for text, figure in ((ours, found[case]["ours"]), (peer, found[case]["peer"])):
            digits = len(text.partition(".")[2])
            assert text == f"{figure:.{digits}f}", case
