"""``shira-convert shira_to_csr`` and ``csr_to_shira``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shira_cli import console
from shira_cli.convert import common
from shira_format._core import text

EXPORT = """\
Write an adapter as a folder of CSR matrices, one .npz file a tensor, that scipy.sparse.load_npz opens: for analysis in
scipy or wherever .npz files are read. index.json tells which file holds which tensor and what the numbers are."""
IMPORT = """\
Make an adapter of a folder that shira_to_csr wrote. Matrices that were not changed come back bit for bit. Changed deltas
become targets (base + delta, rounded) where the base's values are at hand, else they stay deltas."""


def add_shira_to_csr(commands: Any) -> None:
    """Add the subcommand ``shira_to_csr``."""
    parser = common.add_command(
        commands, "shira_to_csr", help="an adapter, to scipy matrices", description=EXPORT,
        example="adapter.st --base my-model/ -o matrices/",
    )  # fmt: skip
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file")
    add(
        "--base",
        help="the checkpoint that it was made for; needed for deltas unless the adapter is self-contained",
    )
    add("--values", choices=("delta", "target"), default="delta", help="what the matrices hold: what is added to the base (default), or what the entries become")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    common.add_filters(parser)
    common.add_writing(parser, "replace DIR if shira_to_csr wrote it and nothing else was put there")
    parser.set_defaults(run=_export)


def add_csr_to_shira(commands: Any) -> None:
    """Add the subcommand ``csr_to_shira``."""
    parser = common.add_command(
        commands, "csr_to_shira", help="scipy matrices, to an adapter", description=IMPORT,
        example="matrices/ --base my-model/ -o adapter.st",
    )  # fmt: skip
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a folder that shira_to_csr wrote, changed or not")
    add("--base", help="the checkpoint that the adapter is for; needed where there are new entries")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the adapter file to write")
    add("--self-contained", action="store_true", help="store the base's values too")
    common.add_filters(parser)
    common.add_writing(parser, "replace FILE if it exists")
    parser.set_defaults(run=_import)


def _export(options: argparse.Namespace) -> int:
    from shira_format.convert.csr import shira_to_csr

    console.terminate_like_interrupt()
    output = None if options.dry_run else options.output
    if output is not None:
        console.check_output_folder(output, [options.adapter], force=options.force)
    with common.tensors_bar(options) as bar:
        report = shira_to_csr(
            options.adapter, output, base=options.base, values=options.values, include=options.include,
            exclude=options.exclude, force=options.force, progress=bar.update,
        )  # fmt: skip
    rows = [(t.name, _shape(t.shape), text.count(t.nnz), t.values, t.file) for t in report.tensors]
    table = text.table(("tensor", "shape", "entries", "data", "file"), rows)
    _show(options, asdict(report), table, report.whole, report.folder_bytes)
    return 0


def _import(options: argparse.Namespace) -> int:
    from shira_format.convert.csr import csr_to_shira

    console.terminate_like_interrupt()
    output = None if options.dry_run else options.output
    if output is not None:
        console.check_output(output, force=options.force)
    with common.tensors_bar(options) as bar:
        report = csr_to_shira(
            options.folder, output, base=options.base, self_contained=options.self_contained,
            include=options.include, exclude=options.exclude, progress=bar.update,
        )  # fmt: skip
    rows = [
        (t.name, _shape(t.shape), text.count(t.nnz), t.values, "changed" if t.changed else "as it was")
        for t in report.tensors
    ]
    table = text.table(("tensor", "shape", "entries", "values", "matrix"), rows)
    _show(options, asdict(report), table, report.whole, report.file_bytes)
    return 0


def _show(
    options: argparse.Namespace, report: dict[str, Any], table: str, whole: list[str], size: int | None
) -> None:
    for text in report["notices"]:
        console.notice(f"note: {text}", quiet=options.quiet)
    output = None if options.dry_run else str(options.output)
    if options.json:
        console.print_json({"output": output} | report)
        return
    print(table)
    if whole:
        print(f"stored whole: {len(whole)} tensors")
    print(
        "dry run: nothing was written"
        if output is None
        else f"{text.printable(output)}: {text.file_size(size or 0)}"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
