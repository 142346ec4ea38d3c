"""The report of the study of masks: on results that are made up, and what is stored against the page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies import masks, report
from studies.masks import METHODS, MaskRun, Plan
from studies.runs import Store

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "studies" / "results" / "masks"
MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gib": 8, "python": "3.11", "packages": {"torch": "2"}}
TEXTS = 50


def made_up(path: Path, methods: tuple[str, ...] = tuple(METHODS)) -> Store:
    """Results of random right answers."""
    store, rng = Store(path), np.random.default_rng(0)
    for method, size in Plan(methods=methods).cases():
        for task in masks.TASKS:
            for seed in masks.SEEDS:
                right = rng.random(TEXTS) < rng.uniform(0.6, 0.95)
                found: dict[str, Any] = {
                    "accuracy": round(float(right.mean()), 5), "loss": float(rng.uniform(0.2, 0.5)), "texts": TEXTS,
                    "right": np.packbits(right).tobytes().hex(), "trained": 1000, "entries": 1000,
                    "train_seconds": 1.0, "seconds": 2.0,
                }  # fmt: skip
                if method in masks.SCALED and size == "large":
                    found["alphas"] = {str(a): round(float(right.mean()) * min(a, 1), 5) for a in masks.ALPHAS}
                store.add(MaskRun("test", task, method, size, seed, 0.001, 64), found)
    return store


def test_rows_are_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    results = report.tested(made_up(tmp_path / "runs.jsonl", ("lora", "wm", "full", "head")))
    found = report.rows(results)
    assert len(found) == 2 * 6
    for row in found:
        of = [
            r["accuracy"]
            for r in results
            if (r["method"], r["size"], r["task"]) == (row.method, row.size, row.task)
        ]
        assert (row.seeds, row.accuracy, row.accuracy_sd) == pytest.approx((3, np.mean(of), np.std(of, ddof=1)))
    # Without a second seed there is no spread, and so no row.
    assert not report.rows([one for one in results if one["seed"] == 1])


def test_difference_counts_each_text_once(tmp_path: Path) -> None:
    results = report.tested(made_up(tmp_path / "runs.jsonl", ("lora", "wm")))

    def shares(method: str) -> Any:
        of = [r for r in results if r["method"] == method and r["size"] == "large"]
        bits = [[int(b) for byte in bytes.fromhex(r["right"]) for b in f"{byte:08b}"][:TEXTS] for r in of]
        genre, spam = np.array(bits[:3]), np.array(bits[3:])
        assert [r["task"] for r in of] == ["genre"] * 3 + ["spam"] * 3
        return np.concatenate([genre.mean(0), spam.mean(0)])

    gain, error = report.difference(results, ("wm", "large"), ("lora", "large"))
    each = shares("wm") - shares("lora")
    assert (gain, error) == pytest.approx((each.mean(), each.std(ddof=1) / np.sqrt(2 * TEXTS)))


def test_table_has_all_methods_best_first_and_no_empty_cell(tmp_path: Path) -> None:
    results = report.tested(made_up(tmp_path / "runs.jsonl"))
    found = report.rows(results)
    lines = report.table(found, results, ("all", "none", "large")).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {line[0] for line in cells[2:]} == {one.label for one in METHODS.values()}
    assert len({len(line) for line in cells}) == 1
    assert all(all(line) for line in cells)
    means = [sum(float(line[at].split(" ± ")[0]) for at in (2, 3)) for line in cells[2:]]
    assert all(one >= other - 0.21 for one, other in zip(means, means[1:], strict=False))  # rounded to 0.1 each


def test_page_is_filled_in_its_places(tmp_path: Path) -> None:
    page = "a\n<!-- results: one -->\nold\n<!-- end -->\nb\n<!-- results: two -->\n<!-- end -->\n"
    once = report.filled(page, {"one": "1", "two": "2"})
    assert once == "a\n<!-- results: one -->\n\n1\n\n<!-- end -->\nb\n<!-- results: two -->\n\n2\n\n<!-- end -->\n"
    assert report.filled(once, {"one": "1", "two": "2"}) == once
    with pytest.raises(ValueError, match=r"places for \['one', 'two'\]"):
        report.filled(page, {"one": "1"})


def test_whole_report(tmp_path: Path) -> None:
    made_up(tmp_path / "runs.jsonl")
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    page = tmp_path / "masks.md"
    page.write_text(report.PAGE.read_text("utf-8"), "utf-8")
    report.write(tmp_path, page)
    with (tmp_path / "masks.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(list(Plan().cases()))
    assert all(all(line.values()) for line in lines)
    assert (
        (tmp_path / "masks-accuracy.png").read_bytes()[:4]
        == (tmp_path / "masks-alpha.png").read_bytes()[:4]
        == b"\x89PNG"
    )


def test_page_and_csv_agree_with_what_is_stored(tmp_path: Path) -> None:
    store = Store(FOLDER / "runs.jsonl")
    machine = json.loads((FOLDER / "machine.json").read_text("utf-8"))
    page = report.PAGE.read_text("utf-8")
    assert report.filled(page, report.parts(store, machine)) == page
    report.write_csv(report.rows(report.tested(store)), tmp_path / "masks.csv")
    assert (tmp_path / "masks.csv").read_bytes() == (FOLDER / "masks.csv").read_bytes()


def test_accuracies_in_the_prose_are_those_of_the_table() -> None:
    """What the prose says in per cent or points with one decimal place is in a table."""
    page = report.PAGE.read_text("utf-8")
    tables = re.findall(r"<!-- results: (?:large|small) -->.*?<!-- end -->", page, re.DOTALL)
    found = page.split("## What was found")[1].split("\n## ")[0]
    said = re.findall(r"\d+\.\d(?= %| points)", found)
    assert said
    for number in said:
        assert any(re.search(rf"(?<![\d.]){re.escape(number)} ±", table) for table in tables), number
