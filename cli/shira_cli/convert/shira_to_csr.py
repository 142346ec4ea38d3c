"""``shira-convert shira_to_csr``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert.running import usage_errors
from shira_cli.output import Printer
from shira_format.storage.outputs import check_output_folder

EXAMPLE = """
example:
  shira-convert shira_to_csr adapter.st --base my-model/ -o matrices/
"""


@click.command("shira_to_csr", cls=app.Command, example=EXAMPLE)
@click.argument("adapter", type=options.PATH, metavar="ADAPTER")
@options.base_option(" that the adapter was made for; needed for deltas unless the adapter is self-contained")
@options.values_option("Write", "delta")
@options.output_folder()
@options.filters("Convert")
@options.force_option("Replace DIR if shira_to_csr wrote it and nothing was added to it.")
@options.dry_run_option
@options.printing
def command(adapter: Path, output: Path, force: bool, dry_run: bool, printer: Printer, **settings: Any) -> int:
    """Convert an adapter to a folder of CSR matrices, one .npz file per tensor, for scipy.sparse.load_npz.

    The file index.json lists which matrix belongs to which tensor and what its numbers are.
    """
    from shira_analysis.reports.text import csr
    from shira_format.export.csr import shira_to_csr

    target = None if dry_run else output
    check_output_folder(target, [adapter], force=force)
    with printer.bar("tensors") as bar, usage_errors():
        report = shira_to_csr(adapter, target, force=force, progress=bar.update, on_start=bar.reset, **settings)
    printer.notes(report.notices)
    printer.result(lambda: csr.as_json(report, target), lambda: csr.matrices_text(report, target))
    return 0
