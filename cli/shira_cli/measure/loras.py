"""``shira-measure --lora``: norms, ranks and singular values of LoRAs, beside those of adapters."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_cli.measure.one import RANK_HEAD, rank_row, spectra
from shira_format._core import text

if TYPE_CHECKING:
    from shira_analysis.measures.adapter import Ranks
    from shira_analysis.measures.lora import LoraMeasures
    from shira_analysis.measures.rank import RankReport
    from shira_format.checkpoints import Checkpoint

HEAD = (RANK_HEAD[0], "norm", *RANK_HEAD[1:])


def run(options: argparse.Namespace, base: Checkpoint) -> tuple[str, list[dict[str, Any]]]:
    """Measure each LoRA of ``--lora``; the tables for people, and the same and more as JSON values."""
    from tqdm import tqdm

    from shira_analysis.measures.lora import measure_lora

    hidden = options.quiet or not sys.stderr.isatty()
    found = []
    with tqdm(unit="updates", disable=hidden, leave=False) as bar:
        for path in options.lora:
            one = measure_lora(path, base, include=options.include, exclude=options.exclude, progress=bar.update)
            for text in one.notices:
                console.notice(f"note: {text}", quiet=options.quiet)
            found.append(one)
    return "\n\n".join(_text(one, options) for one in found), [
        one.as_json(values=options.spectrum) for one in found
    ]


def _text(found: LoraMeasures, options: argparse.Namespace) -> str:
    from shira_analysis.measures.lora import frobenius_of

    rows: list[tuple[str, float | None, RankReport | Ranks]] = []
    if options.tensors:
        rows += [(report.name, frobenius_of(report), report) for _, report in found.tensors]
    rows += [(name, group.frobenius, group.ranks) for name, group in (*found.kinds.items(), ("all", found.total))]
    cells = [rank_row(name, rank) for name, _, rank in rows]
    others = (
        f"; {text.counted(len(found.others), 'tensor')} replaced or shifted as a whole" if found.others else ""
    )
    lines = [
        f"{text.printable(str(found.path))}: LoRA, updates of {text.counted(found.total.tensors, 'tensor')}{others}",
        text.table(HEAD, [
            [cell[0], "-" if norm is None else f"{norm:.4g}", *cell[1:]]
            for cell, (_, norm, _) in zip(cells, rows, strict=True)
        ]),
    ]  # fmt: skip
    if options.spectrum:
        lines.append(spectra((report.name, report) for _, report in found.tensors))
    return "\n".join(lines)
