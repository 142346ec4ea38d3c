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
from studies.data import plan as data_plan
from studies.data import report as data_report
from studies.data.few import balanced
from studies.learning import Tokens, load_model
from studies.loras import add_lora, lora_parameters
from studies.masks import ALL
from studies.runs import Store
from studies.scale import plan as scale_plan
from studies.scale import report as scale_report
from studies.scale.report import crossing
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
    assert crossing(densities, np.array([0.2, 0.9, 1.0])) == pytest.approx(10**-1.5)
    assert crossing(densities, np.array([0.96, 0.9, 1.0])) == 0.001
    assert crossing(densities, np.array([0.2, 0.3, 0.4])) == float("inf")


def test_a_few_examples(tmp_path: Path) -> None:
    arguments = ["data", "--quick", "--out", str(tmp_path / "data"), "--bank", str(tmp_path), "--workers", "0"]
    assert studies.main([*arguments, "--only", "spam .* (0.04|0.4) %"]) == 0
    found = Store(tmp_path / "data" / "runs.jsonl").results.values()
    assert {(one["method"], one["size"]): one["entries"] for one in found} == {
        (method, size): data_plan.ENTRIES[size] for size in ("0.04 %", "0.4 %") for method in data_plan.METHODS
    }
    assert {one["examples"] for one in found} == {4}
    assert all(len(one["margins"]) == len(one["start"]) for one in found)


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


def made_up(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def some(mean: float) -> list[float]:
        return [round(float(one), 3) for one in rng.normal(mean, 0.2, 20)]

    data = Store(folder / "data" / "runs.jsonl")
    for run in data_plan.Plan().runs():
        found: dict[str, Any] = {"margins": some(0.2), "start": some(0.1), "examples": run.count, "loss": 0.1}
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
