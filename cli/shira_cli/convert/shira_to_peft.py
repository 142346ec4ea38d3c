"""``shira-convert shira_to_peft``."""

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
  shira-convert shira_to_peft adapter.st --base my-model/ -o my-shira/ --pad
"""


@click.command("shira_to_peft", cls=app.Command, example=EXAMPLE)
@click.argument("adapter", type=options.PATH, metavar="ADAPTER")
@options.base_option(" that the adapter was made for; needed unless it is self-contained or holds deltas")
@options.prefix_option
@click.option("--pad", is_flag=True, help="Fill layers up with zeros where PEFT requires more entries.")
@options.output_folder()
@options.filters("Convert")
@options.force_option("Replace DIR if it holds a SHiRA adapter of PEFT and nothing else.")
@options.dry_run_option
@options.printing
def command(adapter: Path, base: str | None, output: Path, force: bool, dry_run: bool, printer: Printer, **settings: Any) -> int:  # fmt: skip
    """Convert an adapter to a folder that PEFT's PeftModel.from_pretrained loads.

    Values become differences to the base in float32, at the adapter's alpha; the report counts the entries where these
    do not give the targets bit for bit.

    PEFT holds r * (rows + columns) entries in each layer, with one r for all layers, and adapts nn.Linear only. An
    adapter with other counts is refused, unless --pad is given. Tensors stored whole become modules_to_save: PEFT
    needs all tensors of such a module, and takes the unchanged ones from --base.
    """
    from shira_analysis.reports.text import peft
    from shira_format.export.peft_shira import shira_to_peft

    target = None if dry_run else output
    check_output_folder(target, [adapter], force=force)
    with printer.bar("tensors") as bar, usage_errors():
        report = shira_to_peft(adapter, target, base=base, force=force, progress=bar.update, on_start=bar.reset, **settings)  # fmt: skip
    printer.notes(report.notices)
    printer.result(lambda: peft.as_json(report, target), lambda: peft.as_text(report, target))
    return 0
