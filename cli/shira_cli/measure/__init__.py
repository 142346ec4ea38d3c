"""``shira-measure``: what adapters are, in numbers, and how two of one base lie to each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shira_cli import console
from shira_cli.measure import loras, one, pairs

PROG = "shira-measure"

EXAMPLE = """examples:
  shira-measure adapter.st --rank
  shira-measure adapter.st --base my-model/ --lora my-lora/ --spectrum
  shira-measure adapter.st other.st --base my-model/ --moments moments.safetensors --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(
        PROG, "Measure adapters: how much they change and where, and each pair of several side by side.", EXAMPLE
    )
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="an adapter file; several must be of one base")
    add("--base", help="the checkpoint that they were made for; needed for those that are not self-contained")
    add("--rank", action="store_true", help="exact rank with a certificate, numerical, stable and effective rank; seconds for a large weight")  # fmt: skip
    add(
        "--spectrum",
        action="store_true",
        help="singular values: a line for each tensor, and all with --json; includes --rank",
    )
    add("--histogram", action="store_true", help="how many deltas are how large (--json has it always, for each tensor)")  # fmt: skip
    add("--lora", action="append", default=[], type=Path, metavar="L", help="norms and ranks of a LoRA of any dialect beside them, which needs --base; may be repeated; includes --rank")  # fmt: skip
    add("--include", action="append", default=[], metavar="REGEX", help="measure only tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out tensors in whose name this is found; may be repeated")  # fmt: skip
    pairs.add_options(parser)
    console.add_output_options(parser)
    options = parser.parse_args(argv)
    options.rank = options.rank or options.spectrum or bool(options.lora)
    if options.lora and options.base is None:
        console.usage_error(PROG, "--lora needs --base, against which its names and shapes are resolved")
    if len(options.adapters) == 1 and (options.moments or options.transposed or options.spectral):
        console.usage_error(
            PROG, "--moments, --transposed and --spectral are about pairs: name two adapters or more"
        )
    return console.run(PROG, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    from shira_analysis.measures.deltas import open_deltas
    from shira_format.checkpoints import open_checkpoint

    base = None if options.base is None else open_checkpoint(options.base)
    for text in () if base is None else base.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    files = [
        open_deltas(path, base, include=options.include, exclude=options.exclude) for path in options.adapters
    ]
    text, found = one.run(options, files)
    result: dict[str, Any] = {"adapters": found}
    if options.lora:
        assert base is not None
        compared, result["loras"] = loras.run(options, base)
        text = f"{compared}\n\n{text}"
    if len(files) > 1:
        between, result["pairs"] = pairs.run(options, files)
        text += f"\n\n{between}"
    if options.json:
        console.print_json(result)
    else:
        print(text)
    return 0
