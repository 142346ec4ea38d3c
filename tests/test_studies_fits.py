"""The study of fits: its plan, its report on results that are made up, and a few steps of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from studies import __main__ as studies
from studies import fits, fits_report
from studies.fits import LANGUAGE, LORAS, TUNED, FitRun, Plan
from studies.report import filled
from studies.runs import Store

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "studies" / "results" / "fits"
MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gib": 8, "python": "3.11", "packages": {"torch": "2"}}


def made_up(path: Path) -> Store:
    store, rng = Store(path), np.random.default_rng(0)
    for run in Plan().runs():
        r2 = float(rng.uniform(0, 1))
        quality = {TUNED: {"cosine": r2}, LANGUAGE: {"kl": 1 - r2, "log_perplexity": 5 - r2}}.get(
            run.source, {"accuracy": r2}
        )
        found = {
            "r2": r2,
            "low": r2 - 0.1,
            "high": r2 + 0.1,
            "bytes": 10,
            "source_bytes": 100,
            "fit_seconds": 1.0,
            "seconds": 2.0,
        }
        store.add(run, found | quality)
    return store


def test_what_is_drawn_has_several_seeds() -> None:
    runs = list(Plan().runs())
    assert len(runs) == len(set(runs))
    seeds = {
        run.seed
        for run in runs
        if (run.source, run.method, run.density, run.texts) == ("spam", "distill", 0.01, 0)
    }
    assert seeds == set(fits.SEEDS)
    assert {run.seed for run in runs if run.method == "cut"} == {0}


def test_only_some(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    runs = Plan(only="genre distill 0.01$").following(store)
    assert [(run.source, run.method, run.density, run.seed) for run in runs] == [
        ("genre", "distill", 0.01, s) for s in fits.SEEDS
    ]
    store.add(runs[0], {})
    assert Plan(only="genre distill 0.01$").following(store) == runs[1:]


def test_the_report_has_all_that_was_run(tmp_path: Path) -> None:
    store = made_up(tmp_path / "runs.jsonl")
    rows = fits_report.rows(store.results.values())
    row = next(
        one for one in rows if (one.source, one.method, one.density, one.texts) == ("spam", "distill", 0.01, 0)
    )
    of = [
        r["r2"]
        for r in store.results.values()
        if (r["source"], r["method"], r["density"], r["texts"]) == ("spam", "distill", 0.01, 0)
    ]
    assert (row.seeds, row.r2, row.r2_sd, row.share) == pytest.approx(
        (len(fits.SEEDS), np.mean(of), np.std(of, ddof=1), 0.1)
    )
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    page = tmp_path / "page.md"
    page.write_text(fits_report.PAGE.read_text("utf-8"))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: short -->\n<!-- end -->\n")
    fits_report.write(tmp_path, page, readme)
    assert "| fitted, 0.2 % |" in readme.read_text("utf-8")
    text = page.read_text("utf-8")
    for method in fits.METHODS.values():
        assert f"| {method.label} |" in text
    assert (tmp_path / "fits.png").stat().st_size > 10_000
    with open(tmp_path / "fits.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_the_page_shows_what_is_stored() -> None:
    results = list(Store(FOLDER / "runs.jsonl").results.values())
    machine = json.loads((FOLDER / "machine.json").read_text("utf-8"))
    page = fits_report.PAGE.read_text("utf-8")
    assert filled(page, fits_report.parts(results, machine)) == page
    readme = fits_report.README.read_text("utf-8")
    assert filled(readme, {"short": fits_report.short(fits_report.rows(results))}) == readme


def test_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies import fit_sources

    monkeypatch.setattr(fit_sources, "LIMIT", 8)
    fit_sources.source_of.cache_clear()
    assert 0 == studies.main(["fits", "--quick", "--out", str(tmp_path), "--workers", "0"])
    fit_sources.source_of.cache_clear()
    found = Store(tmp_path / "runs.jsonl").results
    assert {one["method"] for one in found.values()} == {"cut", "distill", "low-rank"}
    for one in found.values():
        assert one["r2"] <= 1
        assert 0 <= one["accuracy"] <= 1
    sizes = {one["method"]: one["bytes"] for one in found.values()}
    assert sizes["low-rank"] <= 1.1 * sizes["cut"]
    key = FitRun("spam", "cut", 0.002, 0, 0).key
    assert 0 < found[key]["r2"] < 0.9
    assert LORAS[0] == "spam"
