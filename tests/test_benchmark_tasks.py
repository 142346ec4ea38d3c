"""The benchmark of merges on real tasks, on a few of its texts, methods and combinations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks import tasks
from shira_format.merging import METHODS
from tests import models


def test_a_few_texts_go_through_all_stages(tmp_path: Path) -> None:
    methods = {name: METHODS[name] for name in ("linear", "refuse")}
    found = list(
        tasks.rows(
            tmp_path,
            models.minilm(),
            texts=30,
            densities=(0.05,),
            methods=methods,
            combinations=("cat", "dare_linear"),
        )
    )
    of = {row.case: row.ours for row in found}
    assert len(of) == len(found)
    assert of["spam: held-out texts"] == of["genre: held-out texts"] == 30
    accuracies = [row.ours for row in found if row.unit == "accuracy"]
    # Two tasks: base, LoRA, SHiRA, linear twice, cat twice, dare_linear.
    assert len(accuracies) == 2 * 8
    assert all(0 <= one <= 1 for one in accuracies)
    for task in tasks.TASKS:
        assert of[f"{task}: base without adapter"] < of[f"{task}: LoRA alone"]
        assert of[f"{task}: base without adapter"] < of[f"{task}: SHiRA 5 % alone"]
    assert of["spam: SHiRA 5 %, linear, weights 0.5"] != of["spam: base without adapter"]
    assert 0 < of["SHiRA 5 %, refuse raises an error: entries in both"]
    text = tasks.table([dataclasses.asdict(row) for row in found]).splitlines()
    assert [line.split(" | ")[0] for line in text if line.startswith("| ")] == [
        "|", "| each alone", "| `linear`", "| `linear`, weights 0.5",
        "|", "| base without adapter", "| LoRA alone", "| `cat`", "| `cat`, weights 0.5",
        "| `dare_linear`, density 0.5, mean of 2 seeds",
    ]  # fmt: skip


def test_the_table_takes_its_drops_from_what_is_alone() -> None:
    figures = {
        "base without adapter": (0.5, 0.5), "LoRA alone": (1.0, 0.9), "SHiRA 1 % alone": (0.9, 0.8),
        "SHiRA 1 %, ties, density 0.5": (0.8, 0.6), "LoRAs by PEFT, svd": (0.7, 0.9),
    }  # fmt: skip
    stored = [
        {"case": f"{task}: {case}", "ours": figure, "unit": "accuracy"}
        for case, both in figures.items()
        for task, figure in zip(tasks.TASKS, both, strict=True)
    ]
    text = tasks.table([*stored, {"case": "another group's", "ours": 1.0, "unit": "s"}])
    assert "| `ties`, density 0.5 | 80.0 | 60.0 | 70.0 | 15.0 |" in text
    assert "| `svd` | 70.0 | 90.0 | 80.0 | 15.0 |" in text
    assert "another" not in text


def test_standard_error_of_a_share() -> None:
    assert tasks.standard_error(0.5, 100) == pytest.approx(0.05)
    assert tasks.standard_error(1, 300) == 0
    assert math.isclose(tasks.standard_error(0.9, 300), tasks.standard_error(0.1, 300))
