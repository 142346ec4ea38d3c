"""``shira-convert peft_to_shira``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert import running
from shira_cli.output import Printer
from shira_format.storage.outputs import check_output_files

EXAMPLE = """
example:
  shira-convert peft_to_shira my-shira/ --base my-model/ -o adapter.st
"""


@click.command("peft_to_shira", cls=app.Command, example=EXAMPLE)
@click.argument("adapter", metavar="PEFT")
@options.base_option(" that it was trained on", required=True)
@options.values_option("Store", "target")
@options.output_file()
@options.self_contained_option
@options.compact_option
@options.filters("Convert")
@options.base_prefix_option
@options.allow_unused_option
@options.force_adapter_option
@options.dry_run_option
@options.printing
def command(adapter: str, base: str, output: Path, force: bool, dry_run: bool, printer: Printer, **settings: Any) -> int:  # fmt: skip
    """Convert a sparse adapter that PEFT trained: SHiRA, or Super-Tuning without its LoRA (r unset).

    PEFT is the folder, its adapter_model.safetensors or .bin, or hf://owner/name.

    Stored are targets, round(base + value) in the base's dtype, as PEFT computes them; entries that do not change the
    base are left out, with a notice. With --values delta all of PEFT's values are stored bit for bit, and
    shira_to_peft makes the same file from them.
    """
    from shira_format.convert.peft_shira import peft_to_shira

    target = None if dry_run else output
    check_output_files(target, inputs=[adapter, base], force=force)
    with printer.bar("tensors") as bar, running.usage_errors():
        report = peft_to_shira(
            adapter, base, target, force=force, progress=bar.update, on_start=bar.reset, **settings
        )
    running.show(report, target, printer)
    return 0
