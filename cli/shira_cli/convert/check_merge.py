"""``shira-convert check_merge``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_cli.convert import common
from shira_format._core import text

if TYPE_CHECKING:
    from shira_analysis.merging.check.report import LayerVerdict, MergeVerdict

EXIT_CODES = {"yes": 0, "no": 1, "inconclusive": 3}
EXIT_UNREADABLE = 2

DESCRIPTION = """\
Does a merged checkpoint hold a LoRA, at which strength, layer by layer? What its weights have become is compared with
what the base and the LoRA say that they should be, entry by entry, up to the rounding of its dtype. All three may be of
any kind that the other commands read; LORA may also be an adapter file of ours.

exit codes:
  0  yes: every adapted tensor holds it at the expected strength (1, or --strength), and all others are the base's
  1  no: nothing was merged, or only some layers; another strength; something else was added; another base; other
     tensors changed as well; or it is a PEFT model that was not unloaded
  2  an input cannot be read or does not fit, or wrong usage
  3  inconclusive: rounding to the merged dtype hides the update, or the weights are quantised
"""


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(
        commands, "check_merge", help="does a merged checkpoint hold a LoRA?", description=DESCRIPTION,
        example="--base my-model/ --lora my-lora/ --merged my-merged-model/",
    )  # fmt: skip
    add = parser.add_argument
    add("--base", required=True, help="the checkpoint before")
    add("--lora", required=True, help="what should have been merged: a LoRA, or an adapter file")
    add("--merged", required=True, help="the checkpoint after")
    add("--strength", type=float, metavar="S", help="the strength that is expected (default: 1; of an adapter file, its own)")  # fmt: skip
    add("--layers-only", action="store_true", help="do not compare the tensors that the LoRA leaves alone")
    add("--include", action="append", default=[], metavar="REGEX", help="look only at tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out tensors in whose name this is found; may be repeated")  # fmt: skip
    add("--dialect", help="what kind of LoRA it is (default: recognised)")
    add("--threads", type=int, metavar="N", help="at most this many threads (default: all cores)")
    console.add_output_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import math

    from shira_format import ShiraError
    from shira_format.lora import DIALECTS

    if options.strength is not None and (not math.isfinite(options.strength) or options.strength == 0):
        console.usage_error(common.PROG, f"--strength {options.strength} is not a number other than 0")
    if options.threads is not None and options.threads < 1:
        console.usage_error(common.PROG, f"--threads {options.threads} is not a positive count")
    if options.dialect is not None and options.dialect not in DIALECTS:
        console.usage_error(common.PROG, f"--dialect {options.dialect!r} is not one of {', '.join(DIALECTS)}")
    try:
        report = _report(options)
    except (ShiraError, OSError, MemoryError) as error:
        # Elsewhere a failure is 1, which says "no" here.
        if os.environ.get(console.DEBUG):
            raise
        console.complain(common.PROG, str(error) or type(error).__name__)
        return EXIT_UNREADABLE
    for text in report.notices:
        console.notice(f"note: {text}", quiet=options.quiet)
    code = EXIT_CODES[report.answer]
    if options.json:
        from shira_analysis.merging.check.check import as_json

        console.print_json({"exit_code": code} | as_json(report))
    else:
        print(report_text(report))
    return code


def _report(options: argparse.Namespace) -> MergeVerdict:
    from tqdm import tqdm

    from shira_analysis.merging.check.check import MergeCheck, open_source
    from shira_format.checkpoints import open_checkpoint
    from shira_format.names.filters import name_filter

    chosen = name_filter(options.include, options.exclude)
    base, merged = open_checkpoint(options.base), open_checkpoint(options.merged)
    source = open_source(options.lora, base, dialect=options.dialect)
    check = MergeCheck(
        base, source, merged, strength=options.strength, chosen=chosen, others=not options.layers_only
    )
    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=check.size, unit="entries", unit_scale=True, disable=hidden, leave=False) as bar:
        return check.run(options.threads, bar.update)


def report_text(report: MergeVerdict) -> str:
    """The report as a table, with the answer at the end."""
    head = ("tensor", "verdict", "strength", "fits from", "to", "bits equal", "off by", "residual")
    lines = [text.table(head, map(_row, report.layers))]
    reasons: dict[tuple[str, str], list[str]] = {}
    for layer in report.layers:
        if layer.reason:
            reasons.setdefault((layer.verdict, layer.reason), []).append(layer.name)
    lines += [
        f"{verdict}: {text.printable(reason)}: {_some(names)}" for (verdict, reason), names in reasons.items()
    ]
    if report.others is not None:
        lines.append(
            f"tensors that it leaves alone: {report.others.compared} compared, {len(report.others.changed)} changed"
        )
        for words, names in (
            ("changed", report.others.changed), ("changed with the adapted one that they are tied to", report.others.tied),
            ("not in the merged checkpoint", report.others.missing), ("new in the merged checkpoint", report.others.new),
            ("quantised, and not compared", report.others.unclear),
        ):  # fmt: skip
            if names:
                lines.append(f"  {words}: {_some(names)}")
    lines.append(f"{report.answer}: {text.printable(report.sentence)}")
    return "\n".join(lines)


def _row(layer: LayerVerdict) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        layer.name, layer.verdict, number(layer.strength, ".4f"), number(layer.low, ".5g"), number(layer.high, ".5g"),
        "" if layer.equal is None else f"{100 * layer.equal:.4g} %", "" if layer.off is None else f"{layer.off:.3g} ulp",
        number(layer.residual, ".2g"),
    )  # fmt: skip


def _some(names: list[str], most: int = 8) -> str:
    text = ", ".join(map(text.printable, names[:most]))
    return text if len(names) <= most else f"{text}, ... ({len(names)})"
