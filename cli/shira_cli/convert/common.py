"""What the subcommands share: options of the selection, running a job with a progress bar, the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_format._core import text

if TYPE_CHECKING:
    from tqdm import tqdm

    from shira_format.convert import ConversionReport, Exact
    from shira_format.convert.jobs import Job
    from shira_format.selection import TopK

PROG = "shira-convert"


def add_command(commands: Any, name: str, *, help: str, description: str, example: str) -> argparse.ArgumentParser:  # noqa: A002
    """A subcommand with the example at the end of its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, epilog=f"example:\n  shira-convert {name} {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def add_filters(parser: argparse.ArgumentParser) -> None:
    """``--include`` and ``--exclude``."""
    add = parser.add_argument
    add("--include", action="append", default=[], metavar="REGEX", help="convert only tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out tensors in whose name this is found; may be repeated")  # fmt: skip


def add_selection(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """How much to keep; returns the group of amounts, of which one may be given."""
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--density", type=float, metavar="D", help="share of the entries to keep, in (0, 1] (default: 0.01)"
    )
    amount.add_argument("--top-k", type=int, metavar="N", help="number of entries to keep instead: per tensor, or in all with --scope global")  # fmt: skip
    amount.add_argument("--energy", type=float, metavar="E", help="the fewest entries that hold this share, in (0, 1], of the change's sum of squares")  # fmt: skip
    add = parser.add_argument
    add("--min-change", type=float, metavar="X", help="leave out changes of a smaller magnitude; alone: keep all others")  # fmt: skip
    add("--scope", choices=("tensor", "global"), help="largest entries of each tensor (default) or of all tensors together")  # fmt: skip
    return amount


def add_output(parser: argparse.ArgumentParser) -> None:
    """The file to write, and how the work is done."""
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the adapter file to write")
    add("--self-contained", action="store_true", help="store the base's values too: the file can then be undone, scaled, measured and merged without the base")  # fmt: skip
    add("--threads", type=int, metavar="N", help="at most this many threads (default: all cores); the bytes do not depend on it")  # fmt: skip
    add("--dask", metavar="SCHEDULER", help="spread the tensors over a dask.distributed cluster, such as tcp://host:8786, whose workers reach the inputs by the same paths")  # fmt: skip
    add("--resume", action="store_true", help="keep finished tensors in FILE.partial until all is done, and go on from those that are there")  # fmt: skip
    add_writing(parser, "replace FILE if it exists")


def add_writing(parser: argparse.ArgumentParser, force: str) -> None:
    """``--force``, with what it does, ``--dry-run``, and how results are told."""
    parser.add_argument("--force", action="store_true", help=force)
    parser.add_argument("--dry-run", action="store_true", help="compute and report everything, write nothing")
    console.add_output_options(parser)


def tensors_bar(options: argparse.Namespace) -> tqdm[Any]:
    """A progress bar of tensors on stderr, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(unit="tensors", disable=options.quiet or not sys.stderr.isatty(), leave=False)


def selection_rule(options: argparse.Namespace) -> TopK:
    """The rule that the options describe; ends the program if they cannot be meant."""
    from shira_format.selection import AMOUNTS, TopK

    given: dict[str, Any] = {amount: getattr(options, amount) for amount in AMOUNTS}
    if all(value is None for value in given.values()):
        given["density"] = 0.01 if options.min_change is None else 1.0
    try:
        return TopK(**given, scope=options.scope or "tensor", min_change=options.min_change or 0.0)
    except ValueError as error:
        console.usage_error(PROG, str(error))


def run_job(options: argparse.Namespace, job: Job, rule: TopK | Exact) -> int:
    """Run a conversion to an adapter file, with progress on stderr and the report on stdout."""
    from tqdm import tqdm

    from shira_format.convert import convert, work_of
    from shira_format.convert.resume import partial_folder

    if options.threads is not None and options.threads < 1:
        console.usage_error(PROG, f"--threads {options.threads} is not a positive count")
    console.terminate_like_interrupt()
    output = None if options.dry_run else options.output
    if output is not None:
        console.check_output(output, force=options.force)
    opened = job.open()
    hidden = options.quiet or not sys.stderr.isatty()
    try:
        with tqdm(
            total=work_of(opened, rule), unit="entries", unit_scale=True, disable=hidden, leave=False
        ) as bar:
            report = convert(
                job, output, rule=rule, self_contained=options.self_contained, threads=options.threads,
                resume=options.resume, dask=options.dask, progress=bar.update, opened=opened,
            )  # fmt: skip
    except KeyboardInterrupt:
        if options.resume and output is not None:
            kept = partial_folder(output)
            console.complain(
                PROG, f"interrupted; finished tensors are in {kept}, the same command goes on from them"
            )
            return console.EXIT_INTERRUPTED
        raise
    show(report, output, as_json=options.json, quiet=options.quiet)
    return 0


def show(report: ConversionReport, output: Path | None, *, as_json: bool, quiet: bool) -> None:
    """The report on stdout, what should be known on stderr."""
    for text in report.notices:
        console.notice(f"note: {text}", quiet=quiet)
    if as_json:
        console.print_json(report_json(report, output))
    else:
        print(report_text(report, output))
    for text in report.warnings():
        console.notice(f"warning: {text}", quiet=quiet)


def report_json(report: ConversionReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "output": None if output is None else str(output),
        "exact": report.exact,
        "totals": {
            "tensors": len(report.tensors),
            "nnz": report.nnz,
            "numel": report.numel,
            "density": report.density,
            "energy_kept": report.energy_kept,
            "relative_error": report.relative_error,
            "whole_tensors": len(report.whole),
            "unchanged_tensors": report.unchanged,
            "file_bytes": report.file_bytes,
        },
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "nnz": tensor.nnz,
                "density": tensor.density,
                "energy_kept": tensor.energy_kept,
                "relative_error": tensor.relative_error,
            }
            for tensor in report.tensors
        ],
        "whole": report.whole,
        "structure": report.structure,
        "notices": report.notices,
        "warnings": report.warnings(),
    }


def report_text(report: ConversionReport, output: Path | None) -> str:
    """The report as a table."""
    head: tuple[str, ...] = ("tensor", "shape", "entries", "density")
    rows: list[tuple[str, ...]] = [
        (t.name, "x".join(map(str, t.shape)), text.count(t.nnz), text.percent(t.density)) for t in report.tensors
    ]
    rows.append(("all", "", text.count(report.nnz), text.percent(report.density)))
    if not report.exact:
        head += ("energy kept", "rel. error")
        accounts = [(t.energy_kept, t.relative_error) for t in report.tensors]
        accounts.append((report.energy_kept, report.relative_error))
        rows = [(*row, f"{kept:.1%}", f"{error:.3f}") for row, (kept, error) in zip(rows, accounts, strict=True)]
    lines = [text.table(head, rows)]
    if report.whole:
        lines.append(f"stored whole: {_some(report.whole)}")
    by_kind: dict[str, list[str]] = {}
    for name, what in report.structure.items():
        by_kind.setdefault(what, []).append(name)
    lines += [f"{text.printable(what)}: {_some(names)}" for what, names in by_kind.items()]
    if report.unchanged:
        lines.append(f"unchanged: {report.unchanged} tensors")
    if output is None:
        lines.append("dry run: nothing was written")
    else:
        lines.append(f"{text.printable(str(output))}: {text.file_size(report.file_bytes or 0)}")
    return "\n".join(lines)


def _some(names: list[str], most: int = 8) -> str:
    """Names in one line; of many, the first, and how many there are."""
    text = ", ".join(map(text.printable, names[:most]))
    return text if len(names) <= most else f"{text}, ... ({len(names)} tensors)"
