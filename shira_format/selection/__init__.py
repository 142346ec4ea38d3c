"""Exact top-k by magnitude over changes that are computed tile by tile and never held whole.

Ties are broken by position: the lower index is taken first, and under the global scope the earlier tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from shira_format.entries.changes import Change
from shira_format.entries.selected import Entries
from shira_format.selection.radix import Edge, Survey, common_dtype, cut
from shira_format.selection.rule import AMOUNTS, TopK
from shira_format.selection.spool import Spool
from shira_format.selection.stages import CollectStage, Engine, LocalEngine, SelectStage, SurveyStage
from shira_format.selection.workers import Progress, Workers, single_threaded_blas

__all__ = [
    "AMOUNTS",
    "Engine",
    "LocalEngine",
    "Progress",
    "TopK",
    "Workers",
    "passes",
    "select",
    "single_threaded_blas",
]


def select(
    changes: Sequence[Change], rule: TopK, engine: Engine, *, folder: Path | None = None
) -> Iterator[Entries]:
    """The selected entries of each change, in order; those of one tensor are in memory at a time.

    Args:
        changes: what to select from.
        rule: how many to select.
        engine: the threads of this process (:class:`LocalEngine`), or a cluster; the result is the same.
        folder: for a temporary file, under the global scope.

    Raises:
        SourceError: a change holds NaN or Inf.
    """
    return (
        _select_global(changes, rule, engine, folder)
        if rule.scope == "global"
        else engine.map(SelectStage(rule), changes)
    )


def passes(rule: TopK) -> int:
    """How often each change is computed."""
    return 2 if rule.scope == "global" or rule.energy is not None else 1


def _select_global(
    changes: Sequence[Change], rule: TopK, engine: Engine, folder: Path | None
) -> Iterator[Entries]:
    dtype, size = common_dtype(changes), sum(change.size for change in changes)
    surveying, seen, energies = SurveyStage(rule, dtype, rule.lowest(dtype)), Survey.empty(rule), []
    for survey in engine.map(surveying, changes):
        seen.add(survey)
        energies.append(survey.energy)
        if rule.energy is None:  # anything below the k largest so far is not selected
            surveying.floor = Edge(rule, seen, size, dtype).floor
    edge = Edge(rule, seen, size, dtype)
    with Spool(folder) as spool:
        places = []
        for entries in engine.map(CollectStage(edge.reach), changes):
            edge.see(entries.values)
            places.append(spool.put(entries))
        value, ties = edge.decide()
        for place, energy in zip(places, energies, strict=True):
            entries, ties = cut(spool.get(place), value, ties, energy)
            yield entries
