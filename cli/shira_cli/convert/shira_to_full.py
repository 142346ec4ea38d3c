"""``shira-convert shira_to_full``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shira_cli import console
from shira_cli.convert import common

DESCRIPTION = """\
Write the base with an adapter applied, as a folder of safetensors files sharded as the base is, with its config and
tokenizer. At strength 1 an exact patch gives the fine-tune bit for bit; the wrong base is refused, and nothing is
written."""


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(
        commands, "shira_to_full", help="an adapter and its base, to a full checkpoint", description=DESCRIPTION,
        example="patch.st --base my-model/ -o my-tune-again/",
    )  # fmt: skip
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file")
    add("--base", required=True, help="the checkpoint that it was made for, of any layout")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--alpha", type=float, metavar="A", help="strength (default: the adapter's own, usually 1)")
    add(
        "--files-from",
        type=Path,
        metavar="FOLDER",
        help="copy config and tokenizer from this folder, not the base's",
    )
    common.add_filters(parser)
    add("--threads", type=int, metavar="N", help="at most this many threads (default: all cores)")
    add("--force", action="store_true", help="replace DIR if it exists, with all that is in it")
    add("--dry-run", action="store_true", help="read and check everything, write nothing")
    console.add_output_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import math

    from tqdm import tqdm

    from shira_format import AdapterFile
    from shira_format.checkpoints import open_checkpoint
    from shira_format.export.full import RestorePlan
    from shira_format.names.filters import name_filter

    if options.alpha is not None and not math.isfinite(options.alpha):
        console.usage_error(common.PROG, f"--alpha {options.alpha} is not a finite number")
    if options.threads is not None and options.threads < 1:
        console.usage_error(common.PROG, f"--threads {options.threads} is not a positive count")
    console.terminate_like_interrupt()
    base = open_checkpoint(options.base)
    output = None if options.dry_run else options.output
    if output is not None:
        console.check_output_folder(output, [options.adapter, base.path, *base.files], force=options.force)
    plan = RestorePlan(
        AdapterFile(options.adapter, separate_maps=True),
        base,
        options.alpha,
        name_filter(options.include, options.exclude),
    )
    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        report = plan.write(output, options.files_from, options.threads, bar.update)
    for text in report.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    if options.json:
        console.print_json({"output": None if output is None else str(output)} | asdict(report))
        return 0
    print(
        f"{report.patched} tensors patched, {report.whole} stored whole, {report.removed} removed; "
        f"{report.verified} compared with the digest of the whole result"
    )
    if output is None:
        print("dry run: nothing was written")
        return 0
    for name, size in report.files.items():
        print(f"{text_.printable(str(output / name))}: {text_.file_size(size)}")
    return 0
