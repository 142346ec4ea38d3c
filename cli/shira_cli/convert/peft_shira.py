"""``shira-convert peft_to_shira`` and ``shira_to_peft``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_cli.convert import common
from shira_format._core import text

if TYPE_CHECKING:
    from shira_format.convert.peft_shira import PeftReport

IMPORT = """\
Make an adapter of a sparse adapter that PEFT trained: SHiRA, or Super-Tuning without its LoRA (r unset).

Stored are targets, round(base + value) in the base's dtype, as PEFT computes them; entries that do not change the base then are
left out, and told of. With --values delta all of PEFT's values are stored as they are, from which shira_to_peft makes the same
file again."""
EXPORT = """\
Write an adapter as a folder that PEFT's PeftModel.from_pretrained loads. Values become differences to the base in float32, at the
adapter's strength; where these cannot give the targets bit for bit, the report says how many.

PEFT holds r * (rows + columns) entries in each layer, with one r for all, and adapts nn.Linear only. An adapter with other counts is
refused, unless --pad may fill its layers up with zeros. Whole tensors become modules_to_save: PEFT needs all tensors of such a
module, and those that the adapter leaves alone come from --base."""


def add_peft_to_shira(commands: Any) -> None:
    """Add the subcommand ``peft_to_shira``."""
    parser = common.add_command(
        commands, "peft_to_shira", help="a SHiRA or Super-Tuning adapter of PEFT", description=IMPORT,
        example="my-shira/ --base my-model/ -o adapter.st",
    )  # fmt: skip
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="PEFT's folder, the adapter_model.safetensors or .bin in it, or hf://owner/name")  # fmt: skip
    add("--base", required=True, help="the model that it adapts: a checkpoint of any layout")
    add("--values", choices=("target", "delta"), default="target", help="what to store: what the entries become (default), or what PEFT adds to them, bit for bit")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the adapter file to write")
    add("--self-contained", action="store_true", help="store the base's values too")
    common.add_filters(parser)
    common.add_writing(parser, "replace FILE if it exists")
    parser.set_defaults(run=_import)


def add_shira_to_peft(commands: Any) -> None:
    """Add the subcommand ``shira_to_peft``."""
    parser = common.add_command(
        commands, "shira_to_peft", help="an adapter, to PEFT's SHiRA", description=EXPORT,
        example="adapter.st --base my-model/ -o my-shira/ --pad",
    )  # fmt: skip
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file")
    add(
        "--base",
        help="the checkpoint that it was made for; needed unless the adapter is self-contained or holds deltas",
    )
    add("--prefix", default="", metavar="TEXT", help="put this before all names, such as 'bert.' or 'model.' where the adapter is for a bare model and PEFT's has a head on top")  # fmt: skip
    add("--pad", action="store_true", help="fill layers up with zeros where PEFT asks for more entries")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    common.add_filters(parser)
    common.add_writing(parser, "replace DIR if it holds a SHiRA adapter of PEFT and nothing else")
    parser.set_defaults(run=_export)


def _import(options: argparse.Namespace) -> int:
    from shira_format.convert.peft_shira import peft_to_shira

    console.terminate_like_interrupt()
    output = None if options.dry_run else options.output
    if output is not None:
        console.check_output(output, force=options.force)
    with common.tensors_bar(options) as bar:
        report = peft_to_shira(
            options.adapter, options.base, output, values=options.values, self_contained=options.self_contained,
            include=options.include, exclude=options.exclude, progress=bar.update,
        )  # fmt: skip
    common.show(report, output, as_json=options.json, quiet=options.quiet)
    return 0


def _export(options: argparse.Namespace) -> int:
    from shira_format.convert.peft_shira import shira_to_peft

    console.terminate_like_interrupt()
    output = None if options.dry_run else options.output
    if output is not None:
        inputs = [options.adapter] if options.base is None else [options.adapter, Path(options.base)]
        console.check_output_folder(output, inputs, force=options.force)
    with common.tensors_bar(options) as bar:
        report = shira_to_peft(
            options.adapter, output, base=options.base, prefix=options.prefix, pad=options.pad,
            include=options.include, exclude=options.exclude, force=options.force, progress=bar.update,
        )  # fmt: skip
    for text in report.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    if options.json:
        console.print_json({"output": None if output is None else str(output)} | asdict(report))
    else:
        print(_text(report, output))
    return 0


def _text(report: PeftReport, output: Path | None) -> str:
    rows = [
        (
            t.module, "x".join(map(str, t.shape)), text.count(t.nnz), text.count(t.zeros),
            "not known" if t.inexact is None else text.count(t.inexact),
        )
        for t in report.tensors
    ]  # fmt: skip
    lines = [text.table(("module", "shape", "entries", "of them zeros", "inexact"), rows), f"r = {report.rank}"]
    if report.modules_to_save:
        lines.append(f"saved whole: {', '.join(map(text.printable, report.modules_to_save))}")
    if output is None:
        lines.append("dry run: nothing was written")
    else:
        lines.append(f"{text.printable(str(output))}: {text.file_size(report.folder_bytes or 0)}")
    return "\n".join(lines)
