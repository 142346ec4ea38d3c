"""What README and the guides say is run: their commands and their Python, in order, on the real model; their figures are stored ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tomllib
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from benchmarks import tasks
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from tests import models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks" / "index.md").read_text("utf-8")
PAGES = [
    "README.md",
    "docs/index.md",
    *sorted(f"docs/guides/{path.name}" for path in (ROOT / "docs/guides").glob("*.md")),
]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
STORED, AGAIN = (
    json.loads((ROOT / "benchmarks" / "results" / f"2-core-{machine}.json").read_text("utf-8"))["rows"]
    for machine in ("xeon", "epyc")
)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The examples of a page: their kind, and their text."""
    yield from re.findall(
        r"^```(console|python)\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


def run(line: str) -> int:
    """Run a command of ours, as its script does."""
    program, *arguments = shlex.split(line, comments=True)
    module, _, function = SCRIPTS[program].partition(":")
    try:
        return int(getattr(import_module(module), function)(arguments) or 0)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples take for granted: a base, a LoRA, a fine-tune, a merged model, texts, two adapters."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(models.minilm(), folder / "my-model")
    shutil.copytree(models.LORAS / "spam", folder / "my-lora")
    shutil.copytree(models.sre(), folder / "my-tune")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(models.minilm())
    models.load_lora(model, models.LORAS / "spam").merge_and_unload().save_pretrained(folder / "my-merged-model")
    shutil.copy(models.LORAS.parent / "text" / "genre.jsonl", folder / "my-texts.jsonl")
    shutil.copytree(models.LORAS, folder / "loras")
    (folder / "adapters").mkdir()
    for name, without in (("spam", []), ("genre", ["classifier"])):  # there is one head
        lora_to_shira(models.LORAS / name, models.minilm(), folder / "adapters" / f"{name}.st", exclude=without)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = list(blocks(page))
    assert examples
    shutil.copytree(prepared, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    before = {name: array.copy() for name, array in open_checkpoint("my-model").items()}
    names: dict[str, Any] = {"model": AutoModelForSequenceClassification.from_pretrained("my-model")}
    for kind, text in examples:
        if kind == "python":
            exec(compile(text, page, "exec"), names)
            continue
        commands = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
        assert commands
        for line in commands:
            expected = re.search(r"# exit code (\d)$", line)
            assert run(line) == (int(expected[1]) if expected else 0), line
    for weights in (open_checkpoint("my-model"), names.get("weights", before)):
        assert before.keys() == weights.keys()
        assert all((before[name] == weights[name]).all() for name in before)


def test_the_readme_is_short_and_has_examples_of_both_kinds() -> None:
    assert len(README.splitlines()) <= 120
    assert {"console", "python"} == {kind for kind, _ in blocks("README.md")}


def test_links_of_pages_outside_the_site_lead_somewhere() -> None:
    """MkDocs checks those inside."""
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "fuzz/README.md",
        "benchmarks/README.md",
        "cli/shira_cli/data/README.md",
    ):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text("utf-8")):
            assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), (page, link)


@pytest.mark.parametrize(("text", "least"), [(README, 5), (BENCHMARKS, 30)], ids=["README", "benchmarks"])
def test_the_figures_are_those_of_the_benchmark(text: str, least: int) -> None:
    """Each row of the tables of figures is a rounded row of the stored runs, of the later one if it is in both."""
    found = {row["case"]: row for row in (*STORED, *AGAIN)}
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) ([^|]+) \| ([\d.]+) [^|]+\| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(rows) >= least
    for _, ours, _, peer, case in rows:
        for figure, stored in ((ours, found[case]["ours"]), (peer, found[case]["peer"])):
            digits = len(figure.partition(".")[2])
            assert figure == f"{stored:.{digits}f}", case


def test_the_losses_are_those_of_the_benchmark() -> None:
    """The table of what is left of a real fine-tune; its rows of the stored run follow each other in threes."""
    cases = [row["case"] for row in STORED]
    rows = re.findall(
        r"^\| (\d+) % \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) MB \|$",
        BENCHMARKS,
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["1", "2", "5", "10"]
    for density, *tensor, energy, cosine, size in rows:
        for scope, found in (("tensor", tensor), ("global", [energy, cosine])):
            place = cases.index(f"SRE fine-tune of MiniLM, top-k {density}%, {scope} scope: energy kept")
            kept, file, embeddings = STORED[place : place + 3]
            assert found == [f"{100 * kept['ours']:.1f}", f"{embeddings['ours']:.3f}"]
            assert f"cosine of the embeddings to the fine-tune's, {embeddings['peer']:.3f} for" in BENCHMARKS
        assert size == f"{file['ours'] / 1e6:.1f}"


def test_the_merges_are_those_of_the_benchmark() -> None:
    """Both tables of accuracies after merging."""
    tables = tasks.table(STORED).split("\n\n")
    assert len(tables) == 2
    assert all(table in BENCHMARKS for table in tables)


@pytest.mark.parametrize("page", ["README.md", "docs/security.md"])
def test_the_number_of_vectors(page: str) -> None:
    count = len([*(ROOT / "spec" / "vectors").glob("*/*.st")])
    assert f"{count} test vectors" in (ROOT / page).read_text(encoding="utf-8")
