"""Studies: runs that are kept one by one, and the study of masks on a few of its texts and methods."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from shira_format.training.sparse import SparseParameters
from shira_format.training.trained import training_of
from studies import __main__ as studies
from studies import commands, mask_runs, masks, report, texts
from studies.learning import BATCH, load_model, logits_of, loss_of, order, tokenize
from studies.masks import FIRST_RATES, RATES, MaskRun, Plan
from studies.runs import Run, Store, run_all
from tests import models


@dataclass(frozen=True)
class Square(Run):
    number: int


class Stop(Exception):
    pass


def nothing() -> None:
    pass


def square(run: Square) -> dict[str, Any]:
    return {"square": run.number**2, "seconds": 0.0}


def stops_at_three(run: Square) -> dict[str, Any]:
    if run.number == 3:
        raise Stop
    return square(run)


def all_of(_: Store) -> list[Square]:
    return [Square(number) for number in range(5)]


def test_a_stopped_study_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "runs.jsonl"
    with pytest.raises(Stop):
        run_all(Store(path), all_of, stops_at_three, workers=0, start=nothing, given=())
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write('{"key": "number=3", "squ')  # the process was killed while it wrote
    asked: list[Square] = []

    def work(run: Square) -> dict[str, Any]:
        asked.append(run)
        return square(run)

    assert run_all(Store(path), all_of, work, workers=0, start=nothing, given=()) == 2
    assert asked == [Square(3), Square(4)]
    assert [json.loads(line)["square"] for line in path.read_text().splitlines()] == [0, 1, 4, 9, 16]
    assert run_all(Store(path), all_of, work, workers=0, start=nothing, given=()) == 0


def test_workers_do_what_one_process_does(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    assert run_all(store, all_of, square, workers=2, start=nothing, given=()) == 5
    assert {key: result["square"] for key, result in store.results.items()} == {
        f"number={n}": n * n for n in range(5)
    }
    assert Store(store.path).results == store.results


def with_losses(path: Path, plan: Plan, best: float) -> tuple[Store, float, int]:
    """Answers pilots with losses that are least at one rate; the rate that is chosen, and after how many."""
    store = Store(path)
    count = 0
    while isinstance(found := plan.rate(store, "wm", "large"), list):
        loss = abs(math.log10(found[0].rate / best))
        store.add(found[0], {"loss": loss if found[0].rate < 0.1 else None})
        count += 1
    return store, found, count


@pytest.mark.parametrize("best", RATES)
def test_the_best_rate_is_found_by_few_pilots(tmp_path: Path, best: float) -> None:
    plan = Plan()
    _, found, count = with_losses(tmp_path / "runs.jsonl", plan, best)
    # The highest one diverges.
    assert found == min(best, 0.03)
    assert count <= max(3, abs(RATES.index(best) - RATES.index(FIRST_RATES[0])) + 3)


def test_results_wait_for_their_rate_and_seeds_come_one_after_the_other(tmp_path: Path) -> None:
    plan = Plan(methods=("wm", "head"), only="large|none")
    first = plan.following(Store(tmp_path / "none.jsonl"))
    assert [(run.part, run.method) for run in first] == [("validation", "wm")] * 2 + [("test", "head")] * 6
    store, rate, _ = with_losses(tmp_path / "runs.jsonl", plan, 3e-3)
    runs = plan.following(store)
    assert [(run.seed, run.method) for run in runs] == [
        (seed, method) for seed in masks.SEEDS for method in ("wm", "head") for _ in masks.TASKS
    ]
    assert {run.rate for run in runs if run.method == "wm"} == {rate}


def test_texts_come_in_a_new_order_each_time_round() -> None:
    steps = list(order(5 * BATCH // 2, 4, seed=1))
    assert [len(step) for step in steps] == [BATCH] * 4
    assert len(set(torch.cat(steps[:2]).tolist())) == 2 * BATCH
    assert torch.equal(torch.cat(steps), torch.cat(list(order(5 * BATCH // 2, 4, seed=1))))
    assert not torch.equal(steps[0], next(order(40, 1, seed=2)))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    assert studies.main(["masks", "--quick", "--out", str(folder), "--workers", "0", "--only", "large|none"]) == 0
    return folder


def test_a_few_texts_go_through(quick: Path) -> None:
    results = report.tested(Store(quick / "runs.jsonl"))
    assert {(one["method"], one["task"]) for one in results} == {
        (method, task) for method in ("lora", "wm", "head") for task in masks.TASKS
    }
    for one in results:
        right = np.unpackbits(np.frombuffer(bytes.fromhex(one["right"]), np.uint8))[: one["texts"]]
        assert one["accuracy"] == pytest.approx(right.mean(), abs=1e-5)
        assert one["texts"] == commands.QUICK_TEXTS
        if one["method"] != "head":
            # A mask of the size "large" has as many entries as the LoRA has parameters.
            assert one["trained"] == one["entries"] == 82_944
            assert one["alphas"]["1.0"] == one["accuracy"]
    before = (quick / "runs.jsonl").read_bytes()
    assert studies.main(["masks", "--quick", "--out", str(quick), "--workers", "0", "--only", "large|none"]) == 0
    assert (quick / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize("method", ["lora", "wm"])
def test_strength_goes_from_the_base_to_what_was_trained(method: str, tmp_path: Path) -> None:
    for task in masks.TASKS:
        texts.write(texts.few_texts(task, commands.QUICK_TEXTS), tmp_path / f"{task}.json")
    mask_runs.start(tmp_path, models.minilm())
    model = load_model(models.minilm())
    name, tokenizer = "genre", AutoTokenizer.from_pretrained(models.minilm())
    tokens = tokenize(tokenizer, texts.read(tmp_path / f"{name}.json")["test"], masks.LENGTH)
    with torch.no_grad():
        base = logits_of(model, tokens)
    attached = mask_runs.attach(model, MaskRun("test", name, method, "large", 1, 0.001, 2))
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(0.05)
        trained = logits_of(model, tokens)
        assert attached.scale is not None
        seen = {}
        for alpha in (0, 0.5, 1.0):
            attached.scale(alpha)
            seen[alpha] = logits_of(model, tokens)
    torch.testing.assert_close(seen[0], base)
    torch.testing.assert_close(seen[1.0], trained)
    assert (trained - base).abs().max() > 1e-3
    assert not torch.equal(seen[0.5], base)
    assert not torch.equal(seen[0.5], trained)


def test_entries_of_spiel_change_in_a_run(tmp_path: Path) -> None:
    """Eight times in a training, however long it is; the number of entries stays."""
    task = masks.PILOT_TASK
    texts.write(texts.few_texts(task, commands.QUICK_TEXTS), tmp_path / f"{task}.json")
    mask_runs.start(tmp_path, models.minilm())
    model = load_model(models.minilm())
    attached = mask_runs.attach(model, MaskRun("test", task, "spiel", "large", 1, 0.001, 64))
    training = training_of(model)
    assert isinstance(training, SparseParameters)
    assert training.regrowth is not None
    schedule = training.regrowth.schedule
    assert (64, 8, 5) == (schedule.steps, schedule.every, schedule.summed)
    assert masks.CHANGES == sum(map(schedule.changes, range(1, 65)))
    optimizer = torch.optim.AdamW(attached.parameters, lr=0.001)
    tokenizer = AutoTokenizer.from_pretrained(models.minilm())
    tokens = tokenize(tokenizer, texts.read(tmp_path / f"{task}.json")["test"], masks.LENGTH)
    for _ in range(schedule.summed):
        loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert training.regrowth.changed > 0.5 * attached.entries
    assert 82_944 == attached.entries == training.nnz
