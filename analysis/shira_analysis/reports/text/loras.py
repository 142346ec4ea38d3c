"""Report of the norms and ranks of LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shira_analysis.reports.text.ranks import RANK_HEAD, rank_row, spectra
from shira_format._core.text import counted, number, printable, table

if TYPE_CHECKING:
    from shira_analysis.measures.adapter import Ranks
    from shira_analysis.measures.lora import LoraMeasures
    from shira_analysis.measures.rank import RankReport

HEAD = (RANK_HEAD[0], "norm", *RANK_HEAD[1:])


def as_text(found: Sequence[LoraMeasures], *, tensors: bool, spectrum: bool) -> str:
    """A table for each LoRA."""
    return "\n\n".join(_text(one, tensors=tensors, spectrum=spectrum) for one in found)


def _text(found: LoraMeasures, *, tensors: bool, spectrum: bool) -> str:
    from shira_analysis.measures.lora import frobenius_of

    rows: list[tuple[str, float | None, RankReport | Ranks]] = []
    if tensors:
        rows += [(report.name, frobenius_of(report), report) for _, report in found.tensors]
    rows += [(name, group.frobenius, group.ranks) for name, group in (*found.kinds.items(), ("all", found.total))]
    cells = [rank_row(name, rank) for name, _, rank in rows]
    others = f"; {counted(len(found.others), 'tensor')} replaced or shifted as a whole" if found.others else ""
    lines = [
        f"{printable(str(found.path))}: LoRA, updates of {counted(found.total.tensors, 'tensor')}{others}",
        table(HEAD, [
            [cell[0], number(norm, ".4g"), *cell[1:]]
            for cell, (_, norm, _) in zip(cells, rows, strict=True)
        ]),
    ]  # fmt: skip
    if spectrum:
        lines.append(spectra((report.name, report) for _, report in found.tensors))
    return "\n".join(lines)
