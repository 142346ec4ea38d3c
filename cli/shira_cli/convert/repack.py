"""``shira-convert repack``."""

from __future__ import annotations

from pathlib import Path

import click

from shira_cli import app, options
from shira_cli.output import Printer
from shira_format.storage.outputs import check_output_files

EXAMPLE = """
examples:
  shira-convert repack adapter.st --base my-model/ -o small.st --compact
  shira-convert repack small.st --base my-model/ -o adapter.st
"""


@click.command("repack", cls=app.Command, example=EXAMPLE)
@click.argument("adapter", type=options.PATH, metavar="ADAPTER")
@options.base_option(
    " that the adapter was made for; needed to read a file that leaves out what the base tells, and to write one"
)
@options.output_file()
@click.option(
    "--compact", is_flag=True, help="Take as few bytes as possible; with --base, the file is then read with it."
)
@options.force_option("Replace FILE if it exists.")
@options.printing
def command(adapter: Path, base: str | None, output: Path, compact: bool, force: bool, printer: Printer) -> int:
    """Write an adapter again, plain or compact, with the same entries, values and provenance, bit for bit."""
    from shira_analysis.reports.text import repack as text
    from shira_format.convert.repack import repack

    check_output_files(output, inputs=[adapter, base], force=force)
    report = repack(adapter, output, base=base, compact=compact)
    printer.result(lambda: text.as_json(report), lambda: text.as_text(report))
    return 0
