"""After how many steps most of what can be had is there, and what the largest size adds to the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from studies.data.plan import METHODS, SIZES
from studies.runs import Result
from studies.statistics import Case, Estimate, Floats, draws_of, drop

WANTED = 0.95  # of the best gain


@dataclass(frozen=True)
class Reach:
    """When a training reaches :data:`WANTED` of the best gain over the head alone of its task and number of examples.

    Attributes:
        task: of the study's.
        method: likewise.
        size: likewise.
        examples: that it was trained on.
        steps: of the training.
        reached: the first of the steps at which it was scored that has it; None if none has.
        low: of the 95 % interval over the texts.
        high: likewise; None if the interval has trainings that do not reach it.
    """

    task: str
    method: str
    size: str
    examples: int
    steps: int
    reached: int | None
    low: int | None
    high: int | None

    @property
    def shown(self) -> str:
        """As a cell."""
        value, low, high = (
            f">{self.steps}" if one is None else str(one) for one in (self.reached, self.low, self.high)
        )
        return f"{value} ({low} to {high})"


@dataclass(frozen=True)
class More:
    """What a method's largest size adds to a smaller one.

    Attributes:
        task: of the study's.
        method: likewise.
        smaller: size.
        larger: size.
        examples: that both were trained on.
        more: of the held-out texts are right, a share, text by text.
        low: of its 95 % interval.
        high: likewise.
    """

    task: str
    method: str
    smaller: str
    larger: str
    examples: int
    more: float
    low: float
    high: float

    @property
    def shown(self) -> str:
        """In points, as a cell."""
        return Estimate(self.more, self.low, self.high).shown(100, sign=True)


def grouped(results: Sequence[Result]) -> Mapping[tuple[str, int], list[Result]]:
    """Results by task and number of examples."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for one in results:
        groups.setdefault((one["task"], one["examples"]), []).append(one)
    return groups


def _right(margins: Sequence[Sequence[float]]) -> Floats:
    """Of each text the share of the seeds in which it is right: ``[texts]``."""
    found: Floats = (np.array(margins) > 0).mean(0)
    return found


def reaches(results: Sequence[Result]) -> Iterator[Reach]:
    """Of all trainings that were scored on their way; the best gain is drawn anew with the texts."""
    for (task, examples), group in grouped(results).items():
        margins = group[0]["margins"]
        draws = draws_of([Case.of(task, margins, margins, margins)])[task]
        draws = np.concatenate([np.arange(len(margins))[None], draws])  # the texts as they are, then as drawn
        of = {(method, size): _some(group, method, size) for size in SIZES for method in METHODS}
        of = {key: some for key, some in of.items() if some}
        alone = _right([one["start"] for one in group])[draws].mean(1)
        best = np.max([_right([one["margins"] for one in some])[draws].mean(1) for some in of.values()], axis=0)
        for (method, size), some in of.items():
            if any("during" not in one for one in some):
                continue
            steps = some[0]["steps"]
            looks = {int(step): [one["during"][step] for one in some] for step in some[0]["during"]}
            looks[steps] = [one["margins"] for one in some]
            shares = np.array([_right(looked)[draws].mean(1) for looked in looks.values()])
            has = shares >= alone + WANTED * (best - alone) - 1e-9  # what is just enough is
            first = np.where(has.any(0), np.array(list(looks))[has.argmax(0)], steps + 1)
            low, high = np.percentile(first[1:], [2.5, 97.5], method="inverted_cdf")
            when = (int(one) if one <= steps else None for one in (first[0], low, high))
            yield Reach(task, method, size, examples, steps, *when)


def _some(group: Sequence[Result], method: str, size: str) -> list[Result]:
    """Of a method and size, by seed."""
    found = [one for one in group if (one["method"], one["size"]) == (method, size)]
    return sorted(found, key=lambda one: one["seed"])


def added(results: Sequence[Result]) -> Iterator[More]:
    """Of each method and each size but the largest, over the seeds that both have."""
    *others, larger = SIZES
    for (task, examples), group in grouped(results).items():
        for method in METHODS:
            for smaller in others:
                less = {one["seed"]: one for one in _some(group, method, smaller)}
                pairs = [(one, less[one["seed"]]) for one in _some(group, method, larger) if one["seed"] in less]
                if pairs:
                    lost = drop([Case.of(task, a["margins"], b["margins"], b["start"]) for a, b in pairs])
                    more = (0.0 - one for one in (lost.value, lost.high, lost.low))  # no -0.0
                    yield More(task, method, smaller, larger, examples, *more)
