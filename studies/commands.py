"""The studies by name: how each is run, and what is written from its results."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from studies import fits, fits_report, report, texts
from studies import masks as masks_plan
from studies.bank.plan import Bank
from studies.bank.plan import Plan as BankPlan
from studies.runs import Next, Store, Work, run_all

RESULTS = Path(__file__).parent / "results"
QUICK_MASKS = masks_plan.Plan(methods=("lora", "wm", "head"), seeds=(1,), steps=2, pilot_steps=1)
QUICK_FITS = fits.Plan(steps=2, seeds=(0,), only="spam (cut|distill|low-rank) 0.002")
QUICK_TEXTS = 8
QUICK_BANK = BankPlan(tasks=("spam", "genre"), forms=("lora", "wm", "fitted", "cut"), seeds=(1,))
QUICK_DATA: dict[str, Any] = {"counts": (4,), "steps": 2}
QUICK_SCALE: dict[str, Any] = {"models": ((32, 1),), "densities": (0.1,), "steps": 8}
QUICK_CHOICE: dict[str, Any] = {"methods": ("lora", "rows", "wm"), "densities": (0.001,), "seeds": 1, "steps": 2}
QUICK_SETTINGS = {"steps": 2, "held": QUICK_TEXTS, "heads": QUICK_TEXTS}


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        run: from the options and the stored results: do the runs that are left, and say how many were done.
        report: from the folder of results and that of the bank: table, page and pictures.
        names: what ``--only`` looks at.
    """

    run: Callable[[argparse.Namespace, Store], int]
    report: Callable[[Path, Path], None]
    names: str


def _masks(options: argparse.Namespace, store: Store) -> int:
    from shira_cli.shipped import find_base
    from studies.mask_runs import start, work

    plan = replace(QUICK_MASKS if options.quick else masks_plan.Plan(), only=options.only)
    with tempfile.TemporaryDirectory(prefix="shira-studies-") as scratch:
        prepared = options.texts or Path(scratch)
        _prepare(options, masks_plan.TASKS, prepared)
        given = (prepared, find_base())
        return run_all(store, plan.following, work, workers=options.workers, start=start, given=given)


def _fits(options: argparse.Namespace, store: Store) -> int:
    from shira_cli.shipped import find_base
    from studies.fit_language import find_language_model, train_lora
    from studies.fit_runs import work
    from studies.fit_sources import find_tuned, start

    plan = QUICK_FITS if options.quick else fits.Plan()
    plan = replace(plan, only=options.only or plan.only)
    with tempfile.TemporaryDirectory(prefix="shira-studies-") as scratch:
        lora = (options.texts or Path(scratch)) / "language-lora"
        language = find_language_model()
        if any(run.source == fits.LANGUAGE for run in plan.following(store)) and not lora.exists():
            train_lora(language, lora)
        given = (find_base(), find_tuned(), language, lora)
        return run_all(store, plan.following, work, workers=options.workers, start=start, given=given)


def _prepare(options: argparse.Namespace, tasks: Any, folder: Path) -> None:
    """Write the texts of each task, unless they are there."""
    if options.quick:
        texts.prepare_few(tasks, folder, QUICK_TEXTS)
    else:
        texts.prepare(tasks, folder, {source: getattr(options, source) for source in texts.PACKAGES})


def _bank_plan(options: argparse.Namespace) -> BankPlan:
    return QUICK_BANK if options.quick else BankPlan()


def _bank(options: argparse.Namespace, store: Store) -> int:
    from shira_cli.shipped import find_base
    from studies.bank.train import start, work

    bank = Bank(store.path.parent)
    given = dict(QUICK_SETTINGS) if options.quick else {}
    bank.settings(
        given | {name: value for name in ("steps", "tokens", "held") if (value := getattr(options, name))}
    )
    plan = replace(_bank_plan(options), only=options.only)
    _prepare(options, plan.tasks, options.texts or bank.texts)
    if options.texts:
        texts.copied(plan.tasks, options.texts, bank.texts)
    return run_all(
        store, plan.following, work, workers=options.workers, start=start, given=(bank.folder, find_base())
    )


def _on_bank(module: str, options: argparse.Namespace, store: Store) -> int:
    """A study of the adapters of a bank, whose plan is in ``module.plan``, and a run in the module that this names."""
    from importlib import import_module

    from shira_cli.shipped import find_base

    plans = import_module(f"studies.{module}.plan")
    runs = import_module(f"studies.{module}.{plans.RUNS}")
    bank = Bank(options.bank)
    done = bank.store()
    plan = plans.Plan(bank=_bank_plan(options), only=options.only)
    following: Next = partial(plan.following, bank=done)
    work: Work = runs.work
    return run_all(
        store, following, work, workers=options.workers, start=runs.start, given=(bank.folder, find_base())
    )


def _data(options: argparse.Namespace, store: Store) -> int:
    from shira_cli.shipped import find_base
    from studies.data import plan as of
    from studies.data.few import start, work

    given = {name: value for name in ("steps", "seeds") if (value := getattr(options, name))}
    plan = of.Plan(**(QUICK_DATA if options.quick else {}) | given, only=options.only)
    folder = options.texts or Bank(options.bank).texts
    _prepare(options, of.TASKS, folder)
    return run_all(store, plan.following, work, workers=options.workers, start=start, given=(folder, find_base()))


def _scale(options: argparse.Namespace, store: Store) -> int:
    from studies.scale import plan as of
    from studies.scale.grow import start, work

    given = {name: value for name in ("steps", "seeds") if (value := getattr(options, name))}
    plan = of.Plan(**(QUICK_SCALE if options.quick else {}) | given, only=options.only)
    folder = options.texts or Bank(options.bank).texts
    _prepare(options, (of.TARGET, *of.CORPUS), folder)
    given_too = (folder, store.path.parent / "models")
    return run_all(store, plan.following, work, workers=options.workers, start=start, given=given_too)


def _choice(options: argparse.Namespace, store: Store) -> int:
    from shira_cli.shipped import find_base
    from studies.choice import plan as of
    from studies.choice.pairs import start, work

    given = {name: value for name in ("steps", "seeds") if (value := getattr(options, name))}
    rates = of.rates_of(Store(RESULTS / "masks" / "runs.jsonl"))
    plan = of.Plan(rates, **(QUICK_CHOICE if options.quick else {}) | given, only=options.only)
    folder = options.texts or Bank(options.bank).texts
    _prepare(options, of.TASKS, folder)
    return run_all(store, plan.following, work, workers=options.workers, start=start, given=(folder, find_base()))


def _report(module: str, folder: Path, bank: Path) -> None:
    from importlib import import_module

    import_module(f"studies.{module}.report").write(folder, bank)


STUDIES = {
    "masks": Study(_masks, lambda folder, _: report.write(folder), "METHOD SIZE"),
    "fits": Study(_fits, lambda folder, _: fits_report.write(folder), "SOURCE METHOD DENSITY"),
    "bank": Study(_bank, partial(_report, "bank"), "TASK FORM SEED"),
    "fusion": Study(partial(_on_bank, "fusion"), partial(_report, "fusion"), "MEMBERS FORM MERGE SEED"),
    "interference": Study(
        partial(_on_bank, "interference"), partial(_report, "interference"), "FIRST SECOND FORM"
    ),
    "neighbours": Study(partial(_on_bank, "neighbours"), partial(_report, "neighbours"), "SOURCE FORM"),
    "trained": Study(partial(_on_bank, "trained"), partial(_report, "trained"), "KIND MEMBERS FORM"),
    "data": Study(_data, partial(_report, "data"), "TASK METHOD SIZE COUNT"),
    "scale": Study(_scale, partial(_report, "scale"), "HIDDEN LAYERS METHOD DENSITY"),
    "choice": Study(_choice, partial(_report, "choice"), "METHOD DENSITY SEED"),
}
