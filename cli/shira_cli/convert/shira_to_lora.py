"""``shira-convert shira_to_lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shira_cli import app, options
from shira_cli.convert.running import one_amount, usage_errors
from shira_cli.output import Printer
from shira_format.storage.outputs import check_output_folder

EXAMPLE = """
example:
  shira-convert shira_to_lora adapter.st --base my-model/ --rank 32 -o my-lora/
"""


@click.command("shira_to_lora", cls=app.Command, example=EXAMPLE)
@click.argument("adapter", type=options.PATH, metavar="ADAPTER")
@options.base_option(
    " that the adapter was made for; needed unless it is self-contained, and for tensors stored whole"
)
@click.option("--rank", type=options.COUNT, metavar="R", help="The rank of each layer, or less where the update has no more.")  # fmt: skip
@click.option("--energy", type=options.SHARE, metavar="E", help="For each layer the lowest rank that holds this share of the energy (the sum of squares).")  # fmt: skip
@options.output_folder()
@options.prefix_option
@click.option("--embedding", metavar="REGEX", help="Weights whose name matches are embeddings (default: the usual names; '(?!)' for none).")  # fmt: skip
@click.option("--fan-in-fan-out", metavar="REGEX", help="Weights whose name matches are stored [in, out], as in GPT-2 (default: detected from the base).")  # fmt: skip
@options.filters("Convert")
@options.force_option("Replace DIR if shira_to_lora wrote it and nothing was added to it.")
@options.dry_run_option
@options.printing
def command(
    adapter: Path,
    base: str | None,
    rank: int | None,
    energy: float | None,
    output: Path,
    embedding: str | None,
    force: bool,
    dry_run: bool,
    printer: Printer,
    **settings: Any,
) -> int:
    """Convert an adapter to a LoRA for PEFT: the best low-rank approximation of each weight's update (truncated SVD).

    A sparse update usually has a high rank, so much is lost. The report says how much:

    \b
      kept        share of the update's energy (the sum of squares) that the LoRA holds
      error       ||S - BA|| / ||S|| (Frobenius), with S the update and BA the factors as written (float32)
      bound       the same without rounding (Eckart-Young): sqrt(sum of sigma_i^2 over i > rank) / ||S||
      spectral    ||S - BA|| in the spectral norm, not divided
      sigma next  the same without rounding: the largest singular value of S that is left out

    Layers whose kind cannot be detected are treated by rules that the notes name; options override them.
    """  # noqa: D301 - click reads the \b as an unwrapped paragraph
    from shira_analysis.reports.text import lora
    from shira_format.export.lora import EMBEDDING, shira_to_lora

    one_amount(rank=rank, energy=energy)
    if rank is None and energy is None:
        raise click.UsageError("--rank or --energy is missing")
    target = None if dry_run else output
    check_output_folder(target, [adapter], force=force)
    with printer.bar("tensors") as bar, usage_errors():
        report = shira_to_lora(
            adapter, base, target, rank=rank, energy=energy, embedding=EMBEDDING if embedding is None else embedding, force=force,
            progress=bar.update, on_start=bar.reset, **settings,
        )  # fmt: skip
    printer.notes(report.notices)
    printer.result(lambda: lora.as_json(report, target), lambda: lora.as_text(report, target))
    printer.warnings(report.warnings())
    return 0
