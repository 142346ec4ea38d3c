"""``shira-verify``: the five lemmas of the paper, recomputed."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from shira_cli import app, errors, options
from shira_cli.output import Printer
from shira_cli.shipped import DATA, TASKS, find_base

PROG = "shira-verify"
LEMMAS = ("4.1", "4.2", "4.3", "4.4", "4.5")

EXAMPLE = """
examples:
  shira-verify --quick
  shira-verify a.st b.st --base my-model/ --lemma 4.2 --lemma 4.5
"""


@click.command(cls=app.Command, example=EXAMPLE)
@click.argument("adapters", nargs=-1, type=options.PATH, metavar="[ADAPTER...]")
@options.base_option(" that the adapters were made for; needed unless they are self-contained")
@click.option("--lemma", "lemmas", multiple=True, type=click.Choice(LEMMAS), help="Check this lemma only; may be repeated.")  # fmt: skip
@options.quick_option("fewer and smaller cases")
@options.seed_option
@options.printing
@app.version_option
def command(
    adapters: Sequence[Path],
    base: str | None,
    lemmas: Sequence[str],
    quick: bool,
    seed: int,
    printer: Printer,
) -> int:
    """Check the five lemmas of the paper Sparse High Rank Adapters (arXiv 2406.13175) numerically.

    They are checked on random adapters of many shapes, densities and masks, and on the given adapter files: lemmas
    about two adapters take each pair of files, or a single file with itself. For each lemma: what the paper prints,
    what is true, the laws that were tried and how close they came to failing, and the smallest counterexample where
    the printed statement fails.

    Without files, the two LoRAs that ship with this program are converted at 1 % and checked, if their base model is
    installed (not with --quick). The exit code is 1 if a law that should hold does not.
    """
    from shira_analysis.lemmas import as_json, verify_lemmas
    from shira_analysis.reports.text.lemmas import as_text, broken_laws

    chosen = [number for number in LEMMAS if not lemmas or number in lemmas]
    with _shipped(printer, wanted=not (adapters or quick)) as shipped, printer.bar("lemmas", len(chosen)) as bar:
        found = verify_lemmas(
            shipped or adapters, base=base, quick=quick, seed=seed, lemmas=chosen, progress=bar.update
        )
    printer.result(lambda: as_json(found), lambda: as_text(found))
    if not found.ok:
        first, *others = broken_laws(found)
        more = f" (and {len(others)} more)" if others else ""
        errors.complain(app.program(), f"does not hold, lemma {first}{more}")
        return errors.EXIT_FAILED
    return 0


@contextlib.contextmanager
def _shipped(printer: Printer, *, wanted: bool) -> Iterator[list[Path]]:
    """The shipped LoRAs as adapters at 1 %, if they are wanted and their base is installed."""
    from shira_format.errors import ShiraError

    if not wanted:
        yield []
        return
    try:
        base = find_base()
    except ShiraError as error:
        printer.notes([f"random adapters only: {error}"])
        yield []
        return
    from shira_format.convert.lora import lora_to_shira

    with tempfile.TemporaryDirectory(prefix="shira-verify-") as folder:
        paths = [Path(folder) / f"{task}.st" for task in TASKS]
        for task, path in zip(TASKS, paths, strict=True):
            lora_to_shira(DATA / "loras" / task, base, path, density=0.01, self_contained=True)
        yield paths


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
