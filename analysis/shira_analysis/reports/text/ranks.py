"""Ranks and singular values, of adapters and LoRAs alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shira_format._core.text import count, number, table

if TYPE_CHECKING:
    from shira_analysis.measures.adapter import Ranks
    from shira_analysis.measures.rank import RankReport

RANK_HEAD = ("", "full", "exact rank", "numerical", "stable", "effective")
SPECTRUM_HEAD = ("", "largest", "second", "median", "smallest", "50 %", "90 %", "99 %")
SHARES = (0.5, 0.9, 0.99)


def spectra(reports: Iterable[tuple[str, RankReport]]) -> str:
    """A line of singular values for each tensor."""
    rows = []
    for name, report in reports:
        if (found := report.spectrum) is None:
            rows.append([name, "too large", *[""] * (len(SPECTRUM_HEAD) - 2)])
            continue
        values = found.values[: found.numerical_rank]  # what follows is rounding
        chosen = [
            values[i] if i < values.size else None for i in (0, 1, values.size // 2, max(0, values.size - 1))
        ]
        rows.append([
            name,
            *("-" if value is None else f"{value:.3g}" for value in chosen),
            *(count(found.holding(share)) for share in SHARES),
        ])  # fmt: skip
    return table(SPECTRUM_HEAD, rows)


def rank_row(name: str, rank: RankReport | Ranks) -> list[str]:
    """The cells below :data:`RANK_HEAD`."""
    known = rank.as_json()
    return [
        name,
        count(known["full_rank"]),
        _interval(known.get("rank_at_least"), known.get("rank_at_most")),
        _whole(known.get("numerical_rank")),
        number(known.get("stable_rank", known.get("mean_stable_rank")), ".1f"),
        number(known.get("effective_rank", known.get("mean_effective_rank")), ".1f"),
    ]


def _interval(low: int | None, high: int | None) -> str:
    return _whole(low) if low == high else f"{_whole(low)} to {_whole(high)}"


def _whole(value: int | None) -> str:
    return "-" if value is None else count(value)
