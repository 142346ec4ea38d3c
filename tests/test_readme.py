"""What the README says is run: its commands and its Python, in order, in one folder, on the real model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from benchmarks import tasks
from shira_cli import convert, diff, inspect, measure, merge, moments, plot, verify
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from tests import models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS: dict[str, Any] = {
    "shira-convert": convert.main,
    "shira-diff": diff.main,
    "shira-inspect": inspect.main,
    "shira-measure": measure.main,
    "shira-merge": merge.main,
    "shira-moments": moments.main,
    "shira-plot": plot.main,
    "shira-verify": verify.main,
}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


def merged(folder: Path) -> None:
    """The model with the LoRA in it, as PEFT merges it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(models.minilm())
    models.load_lora(model, models.LORAS / "spam").merge_and_unload().save_pretrained(folder)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models.minilm(), tmp_path / "my-model")
    shutil.copytree(models.LORAS / "spam", tmp_path / "my-lora")
    shutil.copytree(models.sre(), tmp_path / "my-tune")
    merged(tmp_path / "my-merged-model")
    shutil.copy(models.LORAS.parent / "text" / "genre.jsonl", tmp_path / "my-texts.jsonl")
    (tmp_path / "adapters").mkdir()
    for name, without in (("spam", []), ("genre", ["classifier"])):  # there is one head
        path = tmp_path / "adapters" / f"{name}.st"
        lora_to_shira(models.LORAS / name, models.minilm(), path, exclude=without)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 2
    for line in lines:
        program, *arguments = shlex.split(line.removeprefix("$ "))
        assert 0 == COMMANDS[program](arguments), line
    weights = {name: array.copy() for name, array in open_checkpoint("my-model").items()}
    model = AutoModelForSequenceClassification.from_pretrained("my-model")
    before = {name: array.copy() for name, array in weights.items()}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"weights": weights, "model": model})
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


def test_the_losses_are_those_of_the_benchmark() -> None:
    """The table of what is left of a real fine-tune; its rows of the stored run follow each other in threes."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "2-core-xeon.json").read_text())["rows"]
    cases = [row["case"] for row in stored]
    rows = re.findall(
        r"^\| (\d+) % \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) MB \|$", README, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["1", "2", "5", "10"]
    for density, *tensor, energy, cosine, size in rows:
        for scope, found in (("tensor", tensor), ("global", [energy, cosine])):
            place = cases.index(f"SRE fine-tune of MiniLM, top-k {density}%, {scope} scope: energy kept")
            kept, file, embeddings = stored[place : place + 3]
            assert found == [f"{100 * kept['ours']:.1f}", f"{embeddings['ours']:.3f}"]
            assert f"cosine of the embeddings to the fine-tune's, {embeddings['peer']:.3f} for" in README
        assert size == f"{file['ours'] / 1e6:.1f}"


def test_the_merges_are_those_of_the_benchmark() -> None:
    """Both tables of accuracies after merging."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "2-core-xeon.json").read_text())["rows"]
    tables = tasks.table(stored).split("\n\n")
    assert len(tables) == 2
    assert all(table in README for table in tables)
