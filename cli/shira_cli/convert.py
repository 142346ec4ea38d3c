"""``shira-convert``: from what people have to an adapter file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console

if TYPE_CHECKING:
    from shira_format.convert import ConversionReport

PROG = "shira-convert"

EXAMPLE = """example:
  shira-convert lora_to_shira my-lora/ --base my-model/ -o adapter.st --density 0.02
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(PROG, "Convert adapters and checkpoints to SHiRA adapter files.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_lora_to_shira(commands)
    options = parser.parse_args(argv)
    return console.run(PROG, lambda: int(options.run(options)))


def _add_lora_to_shira(commands: Any) -> None:
    text = "Turn a LoRA into a sparse adapter: the largest entries of its update, as exact values of the tuned weights."
    parser: argparse.ArgumentParser = commands.add_parser(
        "lora_to_shira", help="a LoRA, with its base", description=text, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("lora", type=Path, metavar="LORA", help="a LoRA: PEFT folder, or its adapter_model.safetensors or .bin")
    add(
        "--base",
        type=Path,
        required=True,
        help="the model that it adapts: a folder, a .safetensors file or an index of shards",
    )
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the adapter file to write")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--density", type=float, metavar="D", help="share of the entries to keep, in (0, 1] (default: 0.01)"
    )
    amount.add_argument("--top-k", type=int, metavar="N", help="number of entries to keep instead: per tensor, or in all with --scope global")  # fmt: skip
    add("--scope", choices=("tensor", "global"), default="tensor", help="largest entries of each tensor (default) or of all tensors together")  # fmt: skip
    add("--include", action="append", default=[], metavar="REGEX", help="convert only tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--self-contained", action="store_true", help="store the base's values too: the file can then be undone, scaled, measured and merged without the base")  # fmt: skip
    add("--dialect", help="what kind of LoRA it is (default: recognised)")
    add("--threads", type=int, metavar="N", help="at most this many threads (default: all cores); the bytes do not depend on it")  # fmt: skip
    add("--force", action="store_true", help="replace FILE if it exists")
    add("--dry-run", action="store_true", help="compute and report everything, write nothing")
    console.add_output_options(parser)
    parser.set_defaults(run=_lora_to_shira)


def _lora_to_shira(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from shira_format.checkpoints import open_checkpoint
    from shira_format.convert import convert, filtered
    from shira_format.lora import DIALECTS, open_lora
    from shira_format.selection import TopK, passes
    from shira_format.tensors import numel

    density = 0.01 if options.density is None and options.top_k is None else options.density
    try:
        rule = TopK(density, options.top_k, options.scope)
    except ValueError as error:
        console.usage_error(PROG, str(error))
    if options.threads is not None and options.threads < 1:
        console.usage_error(PROG, f"--threads {options.threads} is not a positive count")
    if options.dialect is not None and options.dialect not in DIALECTS:
        console.usage_error(PROG, f"--dialect {options.dialect!r} is not one of {', '.join(DIALECTS)}")
    console.terminate_like_interrupt()
    base = open_checkpoint(options.base)
    source = filtered(open_lora(options.lora, base, dialect=options.dialect), options.include, options.exclude)
    if not options.dry_run:
        console.check_output(options.output, force=options.force)
    work = sum(numel(update.shape) for update in source.updates) * passes(rule)
    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=work, unit="entries", unit_scale=True, disable=hidden, leave=False) as bar:
        report = convert(
            source, base, None if options.dry_run else options.output, rule=rule,
            include=options.include, exclude=options.exclude, self_contained=options.self_contained,
            threads=options.threads, progress=bar.update,
        )  # fmt: skip
    for text in report.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    if options.json:
        console.print_json(as_json(report, None if options.dry_run else options.output))
    else:
        print(as_text(report, None if options.dry_run else options.output))
    for text in report.warnings():
        console.notice(f"warning: {text}", quiet=options.quiet)
    return 0


def as_json(report: ConversionReport, output: Path | None) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "output": None if output is None else str(output),
        "totals": {
            "tensors": len(report.tensors),
            "nnz": report.nnz,
            "numel": report.numel,
            "density": report.density,
            "energy_kept": report.energy_kept,
            "relative_error": report.relative_error,
            "whole_tensors": len(report.whole),
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
        "notices": report.notices,
        "warnings": report.warnings(),
    }


def as_text(report: ConversionReport, output: Path | None) -> str:
    """The report as a table."""
    head = ("tensor", "shape", "entries", "density", "energy kept", "rel. error")
    rows = [
        (t.name, "x".join(map(str, t.shape)), console.count(t.nnz), console.percent(t.density),
         f"{t.energy_kept:.1%}", f"{t.relative_error:.3f}")
        for t in report.tensors
    ]  # fmt: skip
    rows.append(
        ("all", "", console.count(report.nnz), console.percent(report.density),
         f"{report.energy_kept:.1%}", f"{report.relative_error:.3f}")
    )  # fmt: skip
    lines = [console.table(head, rows)]
    if report.whole:
        lines.append(f"replaced as a whole: {', '.join(map(console.printable, report.whole))}")
    if output is None:
        lines.append("dry run: nothing was written")
    else:
        lines.append(f"{console.printable(str(output))}: {console.size(report.file_bytes or 0)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
