"""``shira-convert shira_to_full``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert.running import usage_errors
from shira_cli.output import Printer

EXAMPLE = """
example:
  shira-convert shira_to_full patch.st --base my-model/ -o my-tune-again/
"""


@click.command("shira_to_full", cls=app.Command, example=EXAMPLE)
@click.argument("adapter", type=options.PATH, metavar="ADAPTER")
@options.base_option(" that the adapter was made for", required=True)
@options.output_folder()
@click.option("--alpha", type=float, metavar="A", help="Multiply the adapter's deltas by this (default: the adapter's own alpha, usually 1).")  # fmt: skip
@click.option("--files-from", type=options.PATH, metavar="FOLDER", help="Copy config and tokenizer from this folder (default: the base's).")  # fmt: skip
@options.filters("Apply")
@options.threads_option
@options.force_option("Replace DIR if it exists, with everything in it.")
@options.dry_run_option
@options.printing
def command(adapter: Path, base: str, output: Path, alpha: float | None, force: bool, dry_run: bool, printer: Printer, **settings: Any) -> int:  # fmt: skip
    """Apply an adapter to its base and write the result as a full checkpoint.

    The result is a folder of safetensors files, sharded like the base, with its config and tokenizer. At alpha 1 an
    exact patch restores the fine-tune bit for bit. A wrong base is refused, and nothing is written.
    """
    from shira_analysis.reports.text import full
    from shira_format.export.full import shira_to_full

    if alpha is not None and not math.isfinite(alpha):
        raise click.UsageError(f"--alpha {alpha} is not a finite number")
    target = None if dry_run else output
    with printer.bar("B", scale=True) as bar, usage_errors():
        report = shira_to_full(adapter, base, target, alpha=alpha, force=force, progress=bar.update, on_start=bar.reset, **settings)  # fmt: skip
    printer.notes(report.notices)
    printer.result(lambda: full.as_json(report, target), lambda: full.as_text(report, target))
    return 0
