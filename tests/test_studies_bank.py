"""The bank of adapters, and the studies of fusion and interference: a few steps of each, and reports on results that are made up."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studies import __main__ as studies
from studies import commands
from studies.bank import plan as bank_plan
from studies.bank import report as bank_report
from studies.bank import train
from studies.bank.encoder import Encoder, LoraEncoder, features, margins, read_head
from studies.bank.forms import FORMS, TASKS, mask_of
from studies.bank.plan import Bank, BankRun
from studies.choice import plan as choice_plan
from studies.choice import report as choice_report
from studies.choice import scores
from studies.fusion import fuse
from studies.fusion import plan as fusion_plan
from studies.fusion import report as fusion_report
from studies.fusion.plan import FusionRun
from studies.interference import plan as pairs_plan
from studies.interference import report as pairs_report
from studies.interference.plan import MEASURES, PairRun
from studies.learning import load_model
from studies.masks import METHODS
from studies.neighbours import plan as neighbours_plan
from studies.neighbours import report as neighbours_report
from studies.runs import Store
from studies.statistics import Case, Estimate, drop, kept, spearman, spearman_over_pairs
from studies.trained import plan as trained_plan
from studies.trained import report as trained_report
from tests import models

MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gib": 8, "python": "3.11", "packages": {"torch": "2"}}
TEXTS = 20


# Plans


def test_what_comes_of_a_lora_waits_for_it(tmp_path: Path) -> None:
    store, plan = Store(tmp_path / "runs.jsonl"), bank_plan.Plan(tasks=("spam",), seeds=(1,))
    assert "fitted" not in {run.form for run in plan.following(store)}
    store.add(BankRun("spam", "lora", 1), {})
    assert {run.form for run in plan.following(store)} == FORMS.keys() - {"lora"}


def test_fused_once_all_parts_are_there(tmp_path: Path) -> None:
    plan = fusion_plan.Plan()
    runs = list(plan.runs())
    assert len(runs) == len(set(runs))
    store, bank = Store(tmp_path / "runs.jsonl"), Store(tmp_path / "bank.jsonl")
    assert {run.form for run in plan.following(store, bank)} == {
        fusion_plan.SHIPPED
    }  # which the bank does not have
    for task in ("spam", "genre"):
        bank.add(BankRun(task, "wm", 1), {})
    found = [
        (run.members, run.form, run.merge)
        for run in plan.following(store, bank)
        if run.form != fusion_plan.SHIPPED
    ]
    assert found == [("spam+genre", "wm", "sum")]
    threes = {run.members for run in runs if len(run.tasks) == 3}
    assert sorted("+".join(threes).split("+")) == sorted(TASKS)


def test_masks_that_are_apart_have_little_in_common() -> None:
    model = load_model(models.minilm())
    for name, form in FORMS.items():
        if form.kind != "mask":
            continue
        first, second = mask_of(model, form, 0, 1), mask_of(model, form, 3, 1)
        sizes = [sum(one.nnz for one in mask.values()) for mask in (first, second)]
        assert sizes[0] == sizes[1]
        assert 0.97 * 82_944 < sizes[0] <= 82_944
        shared = sum(np.intersect1d(first[key].indices, second[key].indices).size for key in first)
        expected = {"wm-bands": 0, "rand": 0.0078 * sizes[0], "struct-apart": 36 * 384}
        if form.apart:
            assert shared == pytest.approx(expected[name], rel=0.15)
        else:
            assert shared == sizes[0]


# Figures


def case(fused: list[float], alone: list[float], task: str = "spam") -> Case:
    return Case.of(task, fused, alone, [0.0] * len(alone))


def test_drop_and_what_is_kept() -> None:
    found = drop([case([1, 1, -1, -1], [1, 1, 1, -1])])
    assert found.value == 0.25
    assert found.low <= 0.25 <= found.high
    assert kept([case([2, 2], [2, 2])]).value == 1
    assert kept([case([0, 0], [2, 2])]).value == 0
    assert kept([case([1, 1], [2, 2])]).value == 0.75


def test_rank_correlation_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 30).astype(float), rng.standard_normal(30)
    assert spearman(x, y) == pytest.approx([spearmanr(x, y).statistic])
    counts = rng.integers(0, 3, (4, 30))
    expected = [spearmanr(np.repeat(x, often), np.repeat(y, often)).statistic for often in counts]
    assert spearman(x, y, counts.astype(float)) == pytest.approx(expected)
    tasks = [(a, b) for a in TASKS for b in TASKS if a != b]
    found = spearman_over_pairs(tasks, x, x)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert spearman_over_pairs(tasks, [1.0] * 30, y) is None


def scored(*right: list[int]) -> scores.Score:
    """Of one line of right and wrong a seed, the same for both tasks."""
    margins = [{task: [2.0 * one - 1 for one in line] for task in choice_plan.TASKS} for line in right]
    return scores.score([{"margins": one} for one in margins], "margins")


def test_accuracies_are_drawn_by_texts_and_by_seeds() -> None:
    one, same = scored([1] * 9 + [0]), scored([1] * 9 + [0])
    assert one.value == 0.9
    assert one.estimate.low < 0.9 < one.estimate.high
    assert one.more_than(same) == Estimate(0, 0, 0)  # paired
    apart = scored([1] * 10, [0] * 10)  # texts alone would leave no doubt
    assert (apart.estimate.low, apart.value, apart.estimate.high) == (0, 0.5, 1)
    assert apart.seeds == [1, 0]


def test_the_front_has_what_is_not_beaten_at_both() -> None:
    good, fair, poor = scored([1] * 10), scored([1] * 8 + [0] * 2), scored([1] * 5 + [0] * 5)
    found = scores.front(
        {"a": good, "b": fair, "c": fair, "d": poor, "e": fair},
        {"a": fair, "b": good, "c": fair, "d": poor, "e": good},
    )
    assert {method: best for method, (best, _) in found.items()} == {
        "a": True, "b": True, "c": False, "d": False, "e": True
    }  # fmt: skip
    assert found["a"][1] == 1
    assert 0 < found["c"][1] < 0.5  # in draws in which those two texts are not


# A few steps


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("bank")
    arguments = ["bank", "--quick", "--out", str(folder), "--workers", "0"]
    assert studies.main([*arguments, "--only", "lora|wm|genre cut|spam fitted"]) == 0
    return Bank(folder)


def test_what_is_kept_is_what_was_trained(bank: Bank) -> None:
    """The files, read again, give the margins that were taken while the adapter was in the model."""
    done = bank.store()
    assert len(done.results) == 6
    train.start(bank.folder, models.minilm())
    encoder = Encoder(models.minilm())
    loras = LoraEncoder(
        models.minilm(), {task: bank.adapter(BankRun(task, "lora", 1)) for task in ("spam", "genre")}
    )
    fuse.start(bank.folder, models.minilm())
    for stored in done.results.values():
        run = BankRun(stored["task"], stored["form"], stored["seed"])
        held, head = train.tokens(run.task)["test"], read_head(bank.head(run))
        shown = loras.showing([run.task], [1.0]) if run.form == "lora" else encoder.showing(fuse.adapter(run))
        with shown as model:
            again = margins(features(model, held), head, held.labels)
        assert again == pytest.approx(stored["margins"], abs=5e-3)
        assert margins(features(encoder.model, held), head, held.labels) == pytest.approx(stored["base"], abs=5e-3)
        assert stored["entries"] == (530_844 if run.form == "cut" else 82_944)


def test_other_settings_need_another_bank(bank: Bank) -> None:
    with pytest.raises(ValueError, match="the bank was made with steps 2, not 5"):
        studies.main(["bank", "--quick", "--out", str(bank.folder), "--workers", "0", "--steps", "5"])


def test_loras_are_summed(bank: Bank) -> None:
    loras = LoraEncoder(
        models.minilm(), {task: bank.adapter(BankRun(task, "lora", 1)) for task in ("spam", "genre")}
    )
    train.start(bank.folder, models.minilm())
    held = train.tokens("spam")["test"]
    with loras.showing(["spam", "genre"], [1.0, 1.0]) as model:
        found = features(model, held)
    plain = load_model(models.minilm())
    with torch.no_grad():
        for task in ("spam", "genre"):
            for name, update in loras.updates(task).items():
                plain.get_parameter(name.replace(".base_layer", "")).add_(update)
    torch.testing.assert_close(found, features(plain, held), atol=1e-5, rtol=1e-4)


def test_two_are_fused_and_measured(bank: Bank, tmp_path: Path) -> None:
    on = ["--quick", "--bank", str(bank.folder), "--workers", "0"]
    assert studies.main(["fusion", *on, "--out", str(tmp_path / "fusion"), "--only", "wm"]) == 0
    assert studies.main(["interference", *on, "--out", str(tmp_path / "pairs"), "--only", "wm"]) == 0
    assert studies.main(["neighbours", *on, "--out", str(tmp_path / "near"), "--only", "spam wm"]) == 0
    assert studies.main(["trained", *on, "--out", str(tmp_path / "trained"), "--only", "strength spam lora"]) == 0
    (fused,) = Store(tmp_path / "fusion" / "runs.jsonl").results.values()
    assert {task: len(one) for task, one in fused["margins"].items()} == {
        "spam": commands.QUICK_TEXTS, "genre": commands.QUICK_TEXTS
    }  # fmt: skip
    (near,) = Store(tmp_path / "near" / "runs.jsonl").results.values()
    assert [len(near[head]["genre"]) for head in ("start", "own")] == [commands.QUICK_TEXTS] * 2
    (scaled,) = Store(tmp_path / "trained" / "runs.jsonl").results.values()
    assert {float(alpha) for alpha in scaled["alphas"]} == set(trained_plan.ALPHAS)
    (pair,) = Store(tmp_path / "pairs" / "runs.jsonl").results.values()
    first, second = pair["directed"]
    assert (first["task"], second["task"]) == ("spam", "genre")
    assert first["overlap"] == 1
    assert first["size"] * second["size"] == pytest.approx(1)
    assert (first["norm"], first["awom"]) == (second["norm_other"], second["awom"])
    for directed in pair["directed"]:
        assert all(directed[name] >= 0 for name in MEASURES)


def test_a_distilled_merge_is_nearer_to_its_parts(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "TEXTS", 1.0)
    fuse.start(bank.folder, models.minilm())
    run = FusionRun("spam+genre", "wm", "distilled", 1)
    merged = fuse.fused(run, fusion_plan.MERGES["distilled"])
    start = fuse.fused(run, fusion_plan.MERGES["sum"])
    assert all(np.array_equal(merged[name].indices, start[name].indices) for name in start)
    assert any(not np.array_equal(merged[name].values, start[name].values) for name in start)
    assert set(fuse.work(run)["margins"]) == {"spam", "genre"}


# Reports


def made_up(folder: Path) -> Bank:
    rng = np.random.default_rng(0)

    def some() -> list[float]:
        return [round(float(one), 3) for one in rng.normal(1, 2, TEXTS)]

    bank = Bank(folder / "bank")
    bank.settings({})
    store = bank.store()
    for run in bank_plan.Plan().runs():
        found: dict[str, Any] = {"margins": some(), "base": some(), "start": some(), "entries": 82_944, "bytes": 1}
        store.add(run, found | {"train_seconds": 1.0, "seconds": 2.0})
    fused = Store(folder / "fusion" / "runs.jsonl")
    for fusion in fusion_plan.Plan().runs():
        known = ("margins", "alone", "base") if fusion.form == fusion_plan.SHIPPED else ("margins",)
        fused.add(fusion, {name: {task: some() for task in fusion.tasks} for name in known} | {"seconds": 1.0})
    pairs = Store(folder / "interference" / "runs.jsonl")
    for pair in pairs_plan.Plan().runs():
        pairs.add(pair, {"directed": [_directed(pair, rng, 0), _directed(pair, rng, 1)], "seconds": 1.0})
    neighbours = Store(folder / "neighbours" / "runs.jsonl")
    for near in neighbours_plan.Plan().runs():
        others = [task for task in TASKS if task != near.source]
        neighbours.add(
            near, {head: {task: some() for task in others} for head in ("start", "own")} | {"seconds": 1.0}
        )
    trained = Store(folder / "trained" / "runs.jsonl")
    for look in trained_plan.Plan().runs():
        alphas = {f"{alpha:g}": {task: some() for task in look.tasks} for alpha in trained_plan.ALPHAS}
        ranks = {name: [384.0] * 36 for name in ("rank", "full", "numerical", "stable", "holding")}
        spectrum = ranks | {"proven": 36, "matrices": 36, "spectrum": list(np.linspace(1, 0, 384))}
        trained.add(look, ({"alphas": alphas} if look.kind == "strength" else spectrum) | {"seconds": 1.0})
    choice = Store(folder / "choice" / "runs.jsonl")
    for one in choice_plan.Plan(choice_plan.rates_of(Store(commands.RESULTS / "masks" / "runs.jsonl"))).runs():
        states = ("margins", "base") if one.method == choice_plan.HEAD else ("margins", "base", "sum", "average")
        size = {"entries": dict.fromkeys(choice_plan.TASKS, 10)}
        choice.add(
            one, {name: {task: some() for task in choice_plan.TASKS} for name in states} | size | {"seconds": 1.0}
        )
    for name in ("bank", "fusion", "interference", "neighbours", "trained", "choice"):
        (folder / name / "machine.json").write_text(json.dumps(MACHINE))
    return bank


def _directed(run: PairRun, rng: np.random.Generator, at: int) -> dict[str, Any]:
    tasks = (run.first, run.second)
    return {"task": tasks[at], "other": tasks[1 - at]} | {
        name: float(rng.uniform()) for name in (*MEASURES, "norm", "norm_other", "between")
    }


def test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies import statistics

    monkeypatch.setattr(statistics, "DRAWS", 20)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand of them take long
    bank = made_up(tmp_path)
    names = ("bank", "fusion", "interference", "neighbours", "trained", "choice")
    pages = {name: tmp_path / f"{name}.md" for name in names}
    for name, page in pages.items():
        page.write_text((bank_report.PAGE.parent / f"{name}.md").read_text("utf-8"), "utf-8")
    bank_report.write(bank.folder, bank.folder, pages["bank"])
    fusion_report.write(tmp_path / "fusion", bank.folder, pages["fusion"])
    pairs_report.write(tmp_path / "interference", bank.folder, pages["interference"], tmp_path / "fusion")
    neighbours_report.write(tmp_path / "neighbours", bank.folder, pages["neighbours"])
    trained_report.write(tmp_path / "trained", bank.folder, pages["trained"], tmp_path)
    choice_report.write(tmp_path / "choice", bank.folder, pages["choice"], tmp_path)
    for name, page in pages.items():
        text = page.read_text("utf-8")
        for file in (tmp_path / name).glob("*.csv"):
            with open(file, encoding="utf-8") as lines:
                assert all(all(line.values()) for line in csv.DictReader(lines))
        assert "nan" not in text
        assert "|  |" not in text
        for form in neighbours_plan.FORMS if name == "neighbours" else FORMS:
            assert FORMS[form].label in text
        for method in choice_plan.MASKS if name == "choice" else ():
            assert text.count(f"| {METHODS[method].label} ") >= len(choice_plan.SIZES)
        for picture in re.findall(r"\((\S+\.png)\)", text):
            assert (tmp_path / picture).stat().st_size > 10_000
    for merge in fusion_plan.MERGES.values():
        assert merge.label in pages["fusion"].read_text("utf-8")
