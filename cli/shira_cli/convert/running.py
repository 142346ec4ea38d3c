"""How the conversions to adapter files run: with a bar, and to be resumed if they are interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shira_cli import options
from shira_cli.output import Printer
from shira_format.errors import ShiraError
from shira_format.storage.outputs import check_output_files

if TYPE_CHECKING:
    from shira_format.convert.report import ConversionReport


def work_options(command: Callable[..., int]) -> Callable[..., int]:
    """The file to write, how the work is done, and how results are printed."""
    for option in (
        options.printing,
        options.dry_run_option,
        options.force_adapter_option,
        click.option("--resume", is_flag=True, help="Keep finished tensors in FILE.partial until all is done, and continue from those that are there."),
        click.option("--dask", metavar="SCHEDULER", help="Run on a dask.distributed cluster, such as tcp://host:8786, whose workers reach the inputs by the same paths."),
        options.threads_option,
        options.compact_option,
        options.self_contained_option,
        options.output_file(),
    ):  # fmt: skip
        command = option(command)
    return command


def one_amount(**amounts: Any) -> None:
    """Raise UsageError if more than one amount is given."""
    given = [f"--{name.replace('_', '-')}" for name, value in amounts.items() if value not in (None, False)]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other: give one of them")


@contextmanager
def usage_errors() -> Iterator[None]:
    """A ValueError of the block, which is about its arguments, becomes a usage error."""
    try:
        yield
    except ShiraError:  # a ValueError too
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def convert(
    verb: Callable[..., ConversionReport], *inputs: str, output: Path, force: bool, dry_run: bool, resume: bool,
    printer: Printer, **settings: Any,
) -> int:  # fmt: skip
    """Run a conversion with progress on stderr and print its report."""
    target = None if dry_run else output
    check_output_files(target, inputs=inputs, force=force)
    try:
        with printer.bar("entries", scale=True) as bar, usage_errors():
            report = verb(
                *inputs, target, resume=resume, force=force, progress=bar.update, on_start=bar.reset, **settings
            )
    except KeyboardInterrupt:
        if resume and target is not None:
            from shira_format.convert.resume import partial_folder

            kept = f"finished tensors are in {partial_folder(target)}, the same command continues from them"
            raise KeyboardInterrupt(kept) from None
        raise
    show(report, target, printer)
    return 0


def show(report: ConversionReport, output: Path | None, printer: Printer) -> None:
    """Print the report on stdout, notices and warnings on stderr."""
    from shira_analysis.reports.text import conversion

    printer.notes(report.notices)
    printer.result(lambda: conversion.as_json(report, output), lambda: conversion.as_text(report, output))
    printer.warnings(report.warnings())
