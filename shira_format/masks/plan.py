"""How a mask is chosen: a rule, a size, runs and bands; from the scores of weights to their entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from shira_format._core.arrays import Indices
from shira_format._core.threads import Progress, Workers
from shira_format.errors import SourceError
from shira_format.format.codecs.runs import LENGTHS
from shira_format.masks.base import Gradients, PlacedRule, Rule, ScoredRule
from shira_format.masks.limits import Limits
from shira_format.masks.rand import Rand
from shira_format.masks.rows import best_of_rows
from shira_format.masks.scores import Ranking
from shira_format.masks.size import Size
from shira_format.masks.weights import Weight
from shira_format.selection import LocalEngine, TopK, select


@dataclass(frozen=True)
class MaskPlan:
    """A mask to be made: which weights, by what rule, how large.

    Attributes:
        rule: see :class:`shira_format.masks.base.Rule`.
        size: see :class:`Size`.
        runs: entries of an aligned run; 1: single entries.
        band: 0: the best entries, 1: the next so many, and so on.
        limits: masks within and without which entries are chosen; None: all may be.
    """

    rule: Rule
    size: Size
    runs: int = 1
    band: int = 0
    limits: Limits | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be meant."""
        if self.runs != 1 and self.runs not in LENGTHS:
            raise ValueError(f"runs of {self.runs} entries; known are {', '.join(map(str, LENGTHS))}")
        if self.band < 0:
            raise ValueError(f"band {self.band}; bands count from 0")
        if isinstance(self.rule, PlacedRule) and (self.runs != 1 or self.band or self.size.scope != "tensor"):
            raise ValueError(
                f"the rule {self.rule.name!r} ranks nothing: runs, band and scope have no meaning with it"
            )
        if isinstance(self.rule, PlacedRule) and self.limits is not None:
            raise ValueError(
                f"the rule {self.rule.name!r} ranks nothing, and cannot choose within or without masks: combine its mask with these"
            )

    def taken(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that have entries within the limits.

        Raises:
            SourceError: none has.
        """
        found = [weight for weight in weights if self.limits is None or self.limits.takes(weight)]
        if not found:
            raise SourceError("no weight has entries within the masks")
        return found

    @property
    def scope(self) -> str:
        """The scope, that of the rule if it has one."""
        return self.rule.scope or self.size.scope

    def masks(
        self,
        weights: Sequence[Weight],
        gradients: Gradients | None,
        workers: Workers,
        progress: Progress = lambda _: None,
    ) -> Iterator[tuple[Weight, Indices]]:
        """Each weight with its entries: int64, flat, strictly increasing.

        Args:
            weights: to be masked.
            gradients: if the rule needs them.
            workers: the threads that compute; the result does not depend on their number.
            progress: called with numbers of elements, :attr:`passes` times those of all weights.

        Raises:
            SourceError: see :func:`make_mask`.
        """
        if isinstance(self.rule, PlacedRule):
            for weight in weights:
                yield weight, self.rule.indices(weight, self.size.of(weight))
                progress(weight.size)
            return
        assert isinstance(self.rule, ScoredRule)
        rule = self.rule

        def ranked(weight: Weight) -> Ranking:
            allowed = None if self.limits is None else self.limits.of(weight, self.runs)
            return Ranking(rule.scores(weight, gradients), self.runs, allowed)

        engine = LocalEngine(workers, lambda count: progress(count * self.runs))
        if self.scope == "global":
            found = self._global(
                [ranked(weight) for weight in weights], self.size.of_all(weights), engine, workers
            )
        elif self.scope == "row":
            found = (self._of_rows(ranked(weight), engine) for weight in weights)
        else:
            found = (self._of_one(ranked(weight), engine, workers) for weight in weights)
        for weight, (ranking, places) in zip(weights, found, strict=True):
            yield weight, ranking.entries(places)

    def passes(self) -> int:
        """How often each weight is read."""
        return (2 if self.scope == "global" else 1) * (2 if self.band else 1)

    def _of_one(self, ranking: Ranking, engine: LocalEngine, workers: Workers) -> tuple[Ranking, Indices]:
        count = self._in_runs(self.size.of(ranking.scores.weight))
        self._check_band(count, ranking.available, f"tensor {ranking.name!r}: ")
        if isinstance(self.rule, Rand) and ranking.allowed is None:
            for _ in self._ends():
                engine.progress(ranking.size)
            return ranking, self.rule.drawn(ranking.scores.weight, ranking.size, count, self.band)
        return ranking, self._band(
            *(_first(_best([ranking], times * count, "tensor", engine, workers)) for times in self._ends())
        )

    def _of_rows(self, ranking: Ranking, engine: LocalEngine) -> tuple[Ranking, Indices]:
        weight = ranking.scores.weight
        count = self._in_runs(self.size.of_row(weight))
        width = weight.matrices[1 if weight.inputs_first else 2] // self.runs
        if ranking.allowed is not None:
            rows, columns = weight.matrices[1], weight.matrices[2] // self.runs
            width = ranking.allowed.least_of_rows(rows, columns, inputs_first=bool(weight.inputs_first))
        self._check_band(count, width, f"tensor {weight.name!r}: a row: ")
        return ranking, self._band(
            *(best_of_rows(ranking, times * count, engine.progress) for times in self._ends())
        )

    def _global(
        self, rankings: list[Ranking], total: int, engine: LocalEngine, workers: Workers
    ) -> Iterator[tuple[Ranking, Indices]]:
        count = self._in_runs(total)
        self._check_band(count, sum(ranking.available for ranking in rankings), "")
        found = [_best(rankings, times * count, "global", engine, workers) for times in self._ends()]
        for ranking, *parts in zip(rankings, *found, strict=True):
            yield ranking, self._band(*parts)

    def _in_runs(self, entries: int) -> int:
        """The runs of so many entries, rounded to the nearest count, at least 1."""
        return max(min(entries, 1), (2 * entries + self.runs) // (2 * self.runs))

    def _ends(self) -> tuple[int, ...]:
        """Up to which multiple of the count the ranking is taken, and from which on."""
        return (self.band + 1, self.band) if self.band else (1,)

    @staticmethod
    def _band(upper: Indices, lower: Indices | None = None) -> Indices:
        return upper if lower is None else np.setdiff1d(upper, lower, assume_unique=True)

    def _check_band(self, count: int, size: int, where: str) -> None:
        what = "entries" if self.runs == 1 else "runs"
        if self.limits is not None and (self.band + 1) * count > size:
            raise SourceError(f"{where}{(self.band + 1) * count} {what} are wanted, and {size} may be chosen")
        if self.band and (self.band + 1) * count > size:
            raise SourceError(
                f"{where}band {self.band} of {count} {what} each ends at the rank {(self.band + 1) * count} of {size}"
            )

    @property
    def notes(self) -> dict[str, Any]:
        """For the manifest."""
        mask = {"rule": self.rule.name} | self.rule.notes
        mask |= {"runs": self.runs} if self.runs > 1 else {}
        mask |= {"band": self.band} if self.band else {}
        limits = {} if self.limits is None else self.limits.notes
        return {"mask": mask, "selection": {"rule": "mask"} | self.size.notes | {"scope": self.scope} | limits}


def _best(
    rankings: list[Ranking], count: int, scope: str, engine: LocalEngine, workers: Workers
) -> Iterator[Indices]:
    if count == 0:
        return repeat(np.empty(0, np.int64), len(rankings))
    found = select(rankings, TopK(None, count, scope), engine, workers)
    return (entries.indices for entries in workers.ahead(found))


def _first(found: Iterator[Indices]) -> Indices:
    (only,) = found
    return only
