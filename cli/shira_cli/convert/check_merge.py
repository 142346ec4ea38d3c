"""``shira-convert check_merge``, also ``shira check-merge``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click

from shira_cli import app, options
from shira_cli.output import Printer

EXIT_CODES = {"yes": 0, "no": 1, "inconclusive": 3}
EXIT_UNREADABLE = 2

EXAMPLE = """
example:
  shira-convert check_merge --base my-model/ --lora my-lora/ --merged my-merged-model/
"""


@click.command("check_merge", cls=app.Command, example=EXAMPLE, failed=EXIT_UNREADABLE)
@options.base_option(", before the merge", required=True)
@click.option("--lora", required=True, metavar="LORA", help="What should have been merged: a LoRA of any dialect, or an adapter file.")  # fmt: skip
@click.option(
    "--merged", required=True, metavar="CHECKPOINT", help="The checkpoint after the merge, in any layout."
)
@click.option("--strength", type=float, metavar="S", help="The expected strength of the merge (default: 1; of an adapter file, its alpha).")  # fmt: skip
@click.option("--layers-only", is_flag=True, help="Do not compare the tensors that the LoRA does not change.")
@options.filters("Check")
@options.dialect_option
@options.base_prefix_option
@options.scale_options
@click.option("--merged-prefix", metavar="TEXT", help="What the names of the merged checkpoint start with, if several parts of it could be the base.")  # fmt: skip
@options.allow_unused_option
@options.threads_option
@options.printing
def command(
    base: str,
    lora: str,
    merged: str,
    strength: float | None,
    layers_only: bool,
    include: Sequence[str],
    exclude: Sequence[str],
    dialect: str | None,
    prefix: str | None,
    merged_prefix: str | None,
    rank: int | None,
    alpha: float | None,
    allow_unused: bool,
    threads: int | None,
    printer: Printer,
) -> int:
    """Check whether a merged checkpoint holds a LoRA, and at which strength, layer by layer.

    The merged weights are compared with what the base and the LoRA say that they should be, entry by entry, up to the
    rounding of their dtype.

    \b
    Exit codes:
      0  yes: every adapted tensor holds the LoRA at the expected strength, and all others equal the base's
      1  no: nothing was merged, or only some layers; another strength; something else was added;
         another base; other tensors changed as well; or it is a PEFT model that was not unloaded
      2  an input cannot be read or does not fit, or wrong usage
      3  inconclusive: rounding to the merged dtype hides the update, or the weights are quantised
    """  # noqa: D301 - click reads the \b as an unwrapped paragraph
    from shira_analysis.merging.check import check_merge
    from shira_analysis.merging.check.report import as_json
    from shira_analysis.reports.text.check_merge import as_text
    from shira_format.lora import DIALECTS

    if strength is not None and (not math.isfinite(strength) or strength == 0):
        raise click.UsageError(f"--strength {strength} is not a number other than 0")
    if dialect is not None and dialect not in DIALECTS:
        raise click.UsageError(f"--dialect {dialect!r} is not one of {', '.join(DIALECTS)}")
    with printer.bar("entries", scale=True) as bar:
        report = check_merge(
            merged, base, lora=lora, strength=strength, layers_only=layers_only, dialect=dialect, prefix=prefix,
            merged_prefix=merged_prefix, rank=rank, alpha=alpha, include=include, exclude=exclude, allow_unused=allow_unused, threads=threads, progress=bar.update, on_start=bar.reset,
        )  # fmt: skip
    printer.notes(report.notices)
    code = EXIT_CODES[report.answer]
    printer.result(lambda: {"exit_code": code} | as_json(report), lambda: as_text(report))
    return code
