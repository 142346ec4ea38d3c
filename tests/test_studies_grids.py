"""The studies of examples and of scale: a few steps of each, and reports on results that are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studies import __main__ as studies
from studies import commands, statistics
from studies.choice import plan as choice_plan
from studies.data import few
from studies.data import plan as data_plan
from studies.data import report as data_report
from studies.data.course import added, reaches
from studies.data.few import balanced
from studies.fits_report import Row
from studies.learning import Tokens, load_model
from studies.loras import add_lora, lora_parameters
from studies.masks import ALL
from studies.runs import Store
from studies.scale import plan as scale_plan
from studies.scale import report as scale_report
from studies.scale.crossing import crossing, shown
from studies.scale.real import needed
from tests import models
from tests.test_studies_bank import MACHINE


def test_examples_are_balanced() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10)
    tokens = Tokens(torch.arange(30)[:, None], torch.ones(30, 1, dtype=torch.int64), labels)
    found = balanced(tokens, 8, 1)
    assert found.labels.tolist().count(1) == len(found) / 2 == 4
    assert len(set(found.ids.flatten().tolist())) == 8
    assert len(balanced(tokens, 100, 1)) == 30


def test_where_the_share_is_reached() -> None:
    densities = [0.001, 0.01, 0.1]
    assert crossing(densities, np.array([0.2, 0.9, 1.0]), 0.95) == pytest.approx(10**-1.5)
    assert crossing(densities, np.array([0.96, 0.9, 1.0]), 0.95) == 0.001
    assert crossing(densities, np.array([0.2, 0.3, 0.4]), 0.95) == float("inf")
    assert shown(0.015, 0.001, float("inf"), densities) == "1.5 % (≤0.1 % to >10 %)"
    assert shown(float("inf"), float("inf"), float("inf"), densities) == ">10 %"


def test_what_is_needed_on_real_models() -> None:
    rows = [
        Row("spam", "distill", density, 0, 1, r2, r2 - 0.1, r2 + 0.1, None, None, None, None, None, 0.1, 1, 1.0)
        for density, r2 in ((0.001, 0.3), (0.01, 0.5), (0.1, 0.75))
    ]
    assert needed(rows, 0.6) == "2.5 % (1 % to 6.3 %)"
    assert needed(rows[1:], 0.5) == "≤1 % (≤1 % to 2.5 %)"
    assert needed(rows[:1], 0.95) == ">0.1 %"


def test_all_examples_are_seen() -> None:
    steps = {run.count: run.steps for run in data_plan.Plan(steps=64).runs()}
    assert steps == {16: 64, 64: 64, 256: 64, 1024: 128}


def test_a_few_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["data", "--quick", "--out", str(tmp_path / "data"), "--bank", str(tmp_path), "--workers", "0"]
    monkeypatch.setattr(few, "LOOKS", (1,))
    assert studies.main([*arguments, "--only", "spam .* (0.04|0.4) %"]) == 0
    found = Store(tmp_path / "data" / "runs.jsonl").results.values()
    assert {(one["method"], one["size"]): one["entries"] for one in found} == {
        (method, size): data_plan.ENTRIES[size] for size in ("0.04 %", "0.4 %") for method in data_plan.METHODS
    }
    assert {one["examples"] for one in found} == {4}
    for one in found:
        assert list(one["during"]) == ["1"]
        assert len(one["margins"]) == len(one["start"]) == len(one["during"]["1"])
        assert one["start"] != one["during"]["1"] != one["margins"]


def test_two_tasks_alone_and_fused(tmp_path: Path) -> None:
    arguments = ["choice", "--quick", "--out", str(tmp_path / "choice"), "--bank", str(tmp_path), "--workers", "0"]
    assert studies.main(arguments) == 0
    found = {one["method"]: one for one in Store(tmp_path / "choice" / "runs.jsonl").results.values()}
    assert list(found) == ["head", "lora", "rows", "wm"]
    assert found["head"]["margins"] == found["head"]["base"]
    assert {method: one["entries"]["spam"] for method, one in found.items()} == {
        "head": 0, "lora": 9_216, "rows": 9_216, "wm": 10_608
    }  # fmt: skip
    for method in ("lora", "rows", "wm"):
        states = [found[method][name] for name in ("margins", "base", "sum", "average")]
        assert all(sorted(one) == sorted(choice_plan.TASKS) for one in states)
        assert len({str(one) for one in states}) == len(states)


def test_loras_of_the_choice_are_as_large_as_masks() -> None:
    for density, (rank, where, ranks) in choice_plan.LORAS.items():
        model = load_model(models.minilm())
        add_lora(model, rank, where, 1, ranks)
        assert sum(one.numel() for one in lora_parameters(model)) == pytest.approx(density * ALL, rel=0.14)


def test_rates_of_the_choice_are_those_of_the_masks_at_their_sizes() -> None:
    rates = choice_plan.rates_of(Store(commands.RESULTS / "masks" / "runs.jsonl"))
    assert rates["rows", 0.001] == 0.1  # the same 9 216 entries
    assert rates["wm", 0.02] == pytest.approx(0.01 * (82_944 / 212_337) ** 0.5, rel=1e-2)
    runs = list(choice_plan.Plan(rates).runs())
    assert len(runs) == len(set(runs)) == 3 * (1 + 3 * 12)


def test_a_small_model(tmp_path: Path) -> None:
    arguments = ["scale", "--quick", "--out", str(tmp_path / "scale"), "--bank", str(tmp_path), "--workers", "0"]
    assert studies.main(arguments) == 0
    found = {one["method"]: one for one in Store(tmp_path / "scale" / "runs.jsonl").results.values()}
    assert list(found) == ["base", "full", "trained", "fitted"]
    assert found["trained"]["entries"] == pytest.approx(0.1 * found["full"]["entries"], rel=0.01)
    assert found["fitted"]["entries"] == pytest.approx(0.1 * found["full"]["entries"], rel=0.01)
    losses = {method: np.mean(one["losses"]) for method, one in found.items()}
    assert losses["base"] < np.log(256)
    assert losses["full"] < losses["base"]
    assert losses["trained"] < losses["base"]
    assert losses["fitted"] < losses["base"]


def trained(method: str, size: str, right: dict[int, int]) -> dict[str, Any]:
    """A result with so many of 100 texts right after so many steps; those are the same texts each time."""
    margins = {step: [1.0] * count + [-1.0] * (100 - count) for step, count in right.items()}
    (_, start), *during, (steps, last) = margins.items()
    return {
        "task": "spam", "method": method, "size": size, "examples": 16, "seed": 1, "steps": steps, "start": start,
        "margins": last, "during": {str(step): one for step, one in during},
    }  # fmt: skip


def test_when_a_training_has_most_of_the_best_gain() -> None:
    results = [
        trained("lora", "0.4 %", {0: 50, 8: 60, 16: 92, 64: 90}),  # of the best gain of 40 it takes 38
        trained("wm", "0.4 %", {0: 50, 8: 50, 16: 60, 64: 87}),
        trained("wm", "5 %", {0: 50, 8: 87, 16: 88, 64: 86}),
    ]
    found = {(one.method, one.size): one for one in reaches(results)}
    assert {key: one.reached for key, one in found.items()} == {
        ("lora", "0.4 %"): 16, ("wm", "0.4 %"): None, ("wm", "5 %"): 16,
    }  # fmt: skip
    assert found["lora", "0.4 %"].shown == "16 (16 to 16)"
    assert found["wm", "0.4 %"].shown == ">64 (64 to >64)"
    assert found["wm", "5 %"].high is None


def test_what_the_largest_size_adds() -> None:
    sizes = {"0.4 %": 80, "1.6 %": 90, "5 %": 85}
    results = [trained("wm", size, {0: 50, 64: right}) for size, right in sizes.items()]
    found = list(added([*results, trained("lora", "5 %", {0: 50, 64: 60})]))
    assert [(one.method, one.smaller, one.larger) for one in found] == [
        ("wm", "0.4 %", "5 %"), ("wm", "1.6 %", "5 %"),
    ]  # fmt: skip
    assert [round(one.more, 2) for one in found] == [0.05, -0.05]
    assert found[0].low > 0 > found[1].high


def made_up(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def some(mean: float) -> list[float]:
        return [round(float(one), 3) for one in rng.normal(mean, 0.2, 20)]

    data = Store(folder / "data" / "runs.jsonl")
    for run in data_plan.Plan().runs():
        found: dict[str, Any] = {"margins": some(0.2), "start": some(0.1), "examples": run.count, "loss": 0.1}
        if (run.task, run.size, run.count) != ("spam", "5 %", 16):
            found["during"] = {str(step): some(0.1) for step in data_plan.LOOKS if step < run.steps}
        data.add(run, found | {"entries": data_plan.ENTRIES[run.size], "seconds": 1.0})
    scale = Store(folder / "scale" / "runs.jsonl")
    for one in scale_plan.Plan().runs():
        means = {"base": 2.0, "full": 1.5, "trained": 1.9 - one.density**0.3, "fitted": 1.8}
        more = {"parameters": 1000} if one.method == "base" else {}
        scale.add(one, {"losses": some(means[one.method]), "entries": 10, "seconds": 1.0} | more)
    for name in ("data", "scale"):
        (folder / name / "machine.json").write_text(json.dumps(MACHINE))


def test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 20)
    monkeypatch.setattr(scale_report, "DRAWS", 20)
    made_up(tmp_path)
    for report, name in ((data_report, "data"), (scale_report, "scale")):
        page = tmp_path / f"{name}.md"
        page.write_text(report.PAGE.read_text("utf-8"), "utf-8")
        report.write(tmp_path / name, tmp_path, page)
        text = page.read_text("utf-8")
        assert "nan" not in text
        assert "|  |" not in text
        with open(tmp_path / name / f"{name}.csv", encoding="utf-8") as lines:
            assert all(float(line["low"]) <= float(line["high"]) for line in csv.DictReader(lines))
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert text.count("x 4 |") == 2 * 2
    assert text.count("| SmolLM2 | smollm2 | 106.2 M |") == 4
    data = (tmp_path / "data.md").read_text("utf-8")
    assert "| 64 steps of 8 texts, 128 with 1024 examples, AdamW" in data
    assert data.count("| genre: SHiRA-WM, 0.4 % to 5 % | ") == data.count("| genre: SHiRA-WM, 1.6 % | ") == 1
    assert "| not run |" not in data
    assert (
        data.count("| spam: LoRA, 5 % | not scored | ") == data.count("| spam: SHiRA-WM, 5 % | not scored | ") == 1
    )
