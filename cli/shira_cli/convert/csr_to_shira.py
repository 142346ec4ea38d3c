"""``shira-convert csr_to_shira``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert.running import usage_errors
from shira_cli.output import Printer
from shira_format.storage.outputs import check_output_files

EXAMPLE = """
example:
  shira-convert csr_to_shira matrices/ --base my-model/ -o adapter.st
"""


@click.command("csr_to_shira", cls=app.Command, example=EXAMPLE)
@click.argument("folder", type=options.PATH, metavar="DIR")
@options.base_option(" that the adapter is for; needed where entries are new")
@options.output_file()
@options.self_contained_option
@options.compact_option
@options.filters("Convert")
@options.allow_unused_option
@options.force_adapter_option
@options.dry_run_option
@options.printing
def command(folder: Path, output: Path, force: bool, dry_run: bool, printer: Printer, **settings: Any) -> int:
    """Convert a folder that shira_to_csr wrote, edited or not, to an adapter.

    Unchanged matrices are restored bit for bit. Changed deltas become targets (base + delta, rounded) where the base's
    values are known; otherwise they stay deltas.
    """
    from shira_analysis.reports.text import csr
    from shira_format.convert.csr import csr_to_shira

    target = None if dry_run else output
    check_output_files(target, inputs=[folder, settings["base"]], force=force)
    with printer.bar("tensors") as bar, usage_errors():
        report = csr_to_shira(folder, target, force=force, progress=bar.update, on_start=bar.reset, **settings)
    printer.notes(report.notices)
    printer.result(lambda: csr.as_json(report, target), lambda: csr.adapter_text(report, target))
    return 0
