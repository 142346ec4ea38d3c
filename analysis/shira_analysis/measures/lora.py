"""Measures of a LoRA, comparable with those of a sparse adapter: norms, ranks, singular values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shira_analysis.measures.adapter import Ranks, combine_ranks
from shira_analysis.measures.layer_kinds import KINDS, layer_kind
from shira_analysis.measures.rank import RankReport, rank_of_update
from shira_format.errors import SourceError
from shira_format.names.filters import name_filter

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint


@dataclass(frozen=True)
class LoraGroup:
    """Measures of several updates.

    Attributes:
        tensors: number of updates.
        frobenius: their joint Frobenius norm; None unless all singular values were computed.
        ranks: their ranks.
    """

    tensors: int
    frobenius: float | None
    ranks: Ranks

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"tensors": self.tensors, "frobenius": self.frobenius, "rank": self.ranks.as_json()}


@dataclass(frozen=True, eq=False)
class LoraMeasures:
    """Measures of one LoRA.

    Attributes:
        path: the LoRA's path.
        source: its metadata: dialect, rank, alpha and so on.
        tensors: layer kind and rank report of each selected update.
        kinds: totals per kind of layer, in the order of :data:`shira_analysis.measures.layer_kinds.KINDS`.
        total: totals over all updates.
        others: tensors that are replaced or shifted as a whole, which are not measured.
        notices: notices for the user.
    """

    path: Path
    source: dict[str, Any]
    tensors: tuple[tuple[str, RankReport], ...]
    kinds: dict[str, LoraGroup]
    total: LoraGroup
    others: tuple[str, ...]
    notices: tuple[str, ...]

    def as_json(self, *, values: bool = False) -> dict[str, Any]:
        """Plain JSON values; ``values`` includes each update's singular values."""
        return {
            "lora": str(self.path),
            "source": self.source,
            "total": self.total.as_json(),
            "kinds": {kind: group.as_json() for kind, group in self.kinds.items()},
            "tensors": [
                {
                    "name": report.name,
                    "kind": kind,
                    "matrix": list(report.shape),
                    "frobenius": frobenius_of(report),
                    "rank": report.as_json(values=values),
                }
                for kind, report in self.tensors
            ],
            "whole_tensors": list(self.others),
        }


def frobenius_of(report: RankReport) -> float | None:
    """The Frobenius norm of one update; None if its singular values were not computed."""
    return None if report.spectrum is None else report.spectrum.frobenius


def measure_lora(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> LoraMeasures:
    """Measure a LoRA of any dialect, holding at most one dense update in memory.

    Args:
        lora: its path; see :func:`shira_format.lora.open_lora`.
        base: the checkpoint that it adapts, as a path or open.
        include: regexes; only updates of weights whose name contains a match are measured.
        exclude: regexes; updates of weights whose name contains a match are skipped.
        progress: called with 1 after each update.

    Raises:
        SourceError: not a LoRA of this base, an update is not finite, no update is selected, or a package is missing.
    """
    from shira_format.checkpoints import open_checkpoint
    from shira_format.lora import open_lora

    chosen = name_filter(include, exclude)
    source = open_lora(lora, open_checkpoint(base))
    updates = [update for update in source.updates if chosen(update.name)]
    if not updates:
        raise SourceError(f"{lora}: no update is left by the choice of names")
    tensors = []
    for update in updates:
        try:
            tensors.append((layer_kind(update.name, update.shape), rank_of_update(update)))
        except SourceError as error:
            raise SourceError(f"{lora}: {error}") from None
        progress(1)
    kinds = {kind: [report for of_kind, report in tensors if of_kind == kind] for kind in KINDS}
    return LoraMeasures(
        Path(lora),
        source.source,
        tuple(tensors),
        {kind: _group(group) for kind, group in kinds.items() if group},
        _group(report for _, report in tensors),
        tuple(name for name in (*source.whole, *source.additions) if chosen(name)),
        tuple(source.notices),
    )


def _group(reports: Iterable[RankReport]) -> LoraGroup:
    reports = list(reports)
    norms = [norm for report in reports if (norm := frobenius_of(report)) is not None]
    known = len(norms) == len(reports)
    return LoraGroup(len(reports), float(np.linalg.norm(norms)) if known else None, combine_ranks(reports))
