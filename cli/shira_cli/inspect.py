"""``shira-inspect``: what an adapter file is, before anyone trusts it. Imports neither torch nor the converters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from shira_analysis.reports.inspection import inspect_files
from shira_analysis.reports.text import inspect
from shira_cli import app, errors, options
from shira_cli.output import Printer
from shira_format.entries.inspection import ORDERS
from shira_format.storage.outputs import check_output_files

PROG = "shira-inspect"

EXAMPLE = """
examples:
  shira-inspect adapter.st --sort nnz
  shira-inspect adapter.st --verify --base my-model/
  shira-inspect adapter.st other.st --html report.html
  shira-inspect adapter.st other.st --moments moments.safetensors --html report.html
"""


@click.command(cls=app.Command, example=EXAMPLE)
@click.argument("files", nargs=-1, required=True, type=options.PATH, metavar="ADAPTER...")
@click.option("--sort", type=click.Choice(["file", *ORDERS]), default="file", help="Order of the tensors: as in the file (default), by name, most entries, density or bytes first, or least energy (the sum of squares) kept first.")  # fmt: skip
@options.filters("List")
@click.option("--verify", is_flag=True, help="Read everything; check all digests and every rule of the format.")
@options.base_option(": check whether the adapter fits it, by shapes, dtypes and digests")
@click.option("--html", type=options.PATH, metavar="FILE", help="Write a report for a browser on all files and on how each two go together.")  # fmt: skip
@options.moments_option
@options.force_option("Replace the report if it exists.")
@options.printing
@app.version_option
def command(
    files: Sequence[Path],
    sort: str,
    include: Sequence[str],
    exclude: Sequence[str],
    verify: bool,
    base: str | None,
    html: Path | None,
    moments: Path | None,
    force: bool,
    printer: Printer,
) -> int:
    """Show what adapter files are: the base they are for, how they were made, and their tensors.

    Only the header is read, unless --verify, --base or --html ask for more. With --base, the exit code is 1 if an
    adapter does not fit.
    """
    if moments is not None and (html is None or len(files) < 2):
        raise click.UsageError("--moments is about pairs in a report: name two adapters or more, and --html")
    checkpoint = None
    if base is not None:
        from shira_format.checkpoints import open_checkpoint

        checkpoint = open_checkpoint(base)
    weights = [] if checkpoint is None else [checkpoint.path, *checkpoint.files]
    check_output_files(html, inputs=[*files, base, *weights, moments], force=force)
    infos = inspect_files(files, base=checkpoint, base_name=base, verify=verify, order=sort, include=include, exclude=exclude)  # fmt: skip
    if html is not None:
        from shira_analysis.reports.html import report
        from shira_format.storage.atomic import atomic_file

        with printer.bar("tensors") as bar:
            page = report(files, checkpoint, moments, infos=infos, include=include, exclude=exclude, progress=bar.update, on_start=bar.reset)  # fmt: skip
        with atomic_file(html) as out:
            out.write(page.encode())
        printer.notice(f"{html}: written")
    printer.result(
        lambda: infos[0] if len(infos) == 1 else {"files": infos}, lambda: "\n\n".join(map(inspect.as_text, infos))
    )
    misfits = [info for info in infos if "base" in info and not info["base"]["fits"]]
    for info in misfits:
        which = f" {info['file']}" if len(infos) > 1 else ""
        errors.complain(app.program(), f"{base}: the adapter{which} does not fit: {info['base']['reasons'][0]}")
    return errors.EXIT_FAILED if misfits else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
