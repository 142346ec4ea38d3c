"""``python -m benchmarks``: all comparisons, as a table on stdout and as JSON in a file."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import (
    conversion,
    drift,
    embeddings,
    figures,
    full,
    merging,
    overwriting,
    pairs,
    profiles,
    ranks,
    reading,
    sizes,
    switching,
    tasks,
    training,
)
from benchmarks.model import LARGE, SMALL, make_base, make_lora
from benchmarks.table import Row, as_text, machine

GROUPS = (
    "conversion",
    "full",
    "embeddings",
    "switching",
    "overwriting",
    "drift",
    "sizes",
    "profiles",
    "reading",
    "pairs",
    "ranks",
    "merging",
    "tasks",
    "training",
)


def main() -> int:
    """Entry point; exit code 1 if a requirement is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the machine to FILE")
    parser.add_argument("--quick", action="store_true", help="a model of 14 M parameters in place of 0.97 G")
    parser.add_argument(
        "--only", type=_regex, default="", metavar="REGEX", help=f"only the groups {', '.join(GROUPS)} that match"
    )
    parser.add_argument("--dir", type=Path, help="keep the files of the run in this folder")
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FOLDER",
        help="write the figures of overwriting and drift, with their CSV, to FOLDER",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shira-benchmarks-") as scratch:
        rows = list(_rows(options.dir or Path(scratch), options.only, options.figures, quick=options.quick))
    print(as_text(rows))
    if options.json:
        result = {
            "machine": machine(),
            "quick": options.quick,
            "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row.met is False for row in rows) else 0


def _rows(folder: Path, only: re.Pattern[str], pictures: Path | None, *, quick: bool) -> Iterator[Row]:
    shape = SMALL if quick else LARGE
    folder.mkdir(parents=True, exist_ok=True)
    if any(map(only.search, ("conversion", "switching"))):
        _say("writing the base and the LoRA ...")
        base, lora = make_base(shape, folder / "base"), make_lora(shape, folder / "lora")
        if only.search("conversion"):
            _say("converting ...")
            yield from conversion.rows(shape, base, lora, folder)
        if only.search("switching"):
            _say("switching ...")
            yield from switching.rows(shape, base, lora, folder)
    if only.search("overwriting"):
        _say("overwriting and fusing by size ...")
        yield from _drawn("overwriting", pictures, *overwriting.rows(quick=quick))
    if only.search("drift"):
        _say("drift ...")
        yield from _drawn("drift", pictures, *drift.rows(folder, quick=quick))
    if only.search("full"):
        _say("writing a checkpoint, a step and a fine-tune of it, and converting ...")
        yield from full.rows(shape, folder)
    if only.search("embeddings"):
        _say("a real fine-tune of an embedding model ...")
        yield from embeddings.rows(folder, 40 if quick else 300)
    if only.search("pairs"):
        _say("pairs of adapters ...")
        yield from pairs.rows(shape)
    if only.search("ranks"):
        _say("ranks ...")
        yield from ranks.rows(quick=quick)
    if only.search("merging"):
        _say("merging ...")
        yield from merging.rows(shape, folder)
    if only.search("tasks"):
        _say("merging on real tasks ...")
        yield from tasks.rows(folder, embeddings.shipped(*embeddings.BASE), texts=40 if quick else None)
    if only.search("profiles"):
        _say("profiles of the format ...")
        yield from profiles.rows(shape, folder, quick=quick)
    if only.search("training"):
        _say("training steps ...")
        yield from training.rows(quick=quick)
    if not any(map(only.search, ("sizes", "reading"))):
        return
    uniform = sizes.uniform_adapter(shape, folder / "uniform.st")
    if only.search("sizes"):
        _say("sizes ...")
        yield from sizes.rows(shape, folder, uniform)
    if only.search("reading"):
        _say("reading ...")
        yield from reading.rows(uniform, folder, quick=quick)


def _drawn(name: str, pictures: Path | None, rows: list[Row], records: list[figures.Record]) -> list[Row]:
    if pictures is not None:
        figures.write(name, records, pictures)
    return rows


def _regex(text: str) -> re.Pattern[str]:
    """Raises argparse.ArgumentTypeError: not a regex, or one that no group matches."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None
    if not any(map(pattern.search, GROUPS)):
        raise argparse.ArgumentTypeError(f"none of the groups {', '.join(GROUPS)} matches")
    return pattern


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
