"""``shira-diff``: what differs between two adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from shira_cli import app, options
from shira_cli.output import Printer

PROG = "shira-diff"

SAME, DIFFERENT, TROUBLE = 0, 1, 2  # as diff

EXAMPLE = """
examples:
  shira-diff a.st b.st
  shira-diff old.st new.st --quiet || echo changed
"""


@click.command(cls=app.Command, example=EXAMPLE, failed=TROUBLE)
@click.argument("first", type=options.PATH, metavar="A")
@click.argument("second", type=options.PATH, metavar="B")
@click.option("--all", "every", is_flag=True, help="List equal tensors as well.")
@options.base_option(" that both are for; needed for compact files that are read with their base")
@options.filters("Compare")
@options.printing_options("Print nothing but errors; the exit code is the answer.")
@app.version_option
def command(
    first: Path,
    second: Path,
    every: bool,
    base: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    printer: Printer,
) -> int:
    """Compare the adapter files A and B, tensor by tensor.

    For each tensor: how many entries only one of the two has, how many have equal bits in both, and how many have
    different values. Only the content counts: index codecs, the order of tensors and provenance (shown if it differs)
    make no difference.

    The exit code is 0 if the content is the same, 1 if it differs, and 2 after an error.
    """
    from shira_analysis.reports.text.diff import as_json, as_text
    from shira_format.merging.diff import diff

    with printer.bar("tensors") as bar:
        found = diff(first, second, base=base, include=include, exclude=exclude, progress=lambda _: bar.update())
    if not printer.quiet:
        listed = found.tensors if every else found.different
        printer.result(lambda: as_json(found, listed, first, second), lambda: as_text(found, listed))
    return SAME if found.same else DIFFERENT


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return app.start(command, PROG, argv)


if __name__ == "__main__":
    sys.exit(main())
