"""How many entries to fit: the fewest that keep a share of the effect, or as many as a file has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from shira_format._core.text import count, file_size, percent
from shira_format.convert.fit.quality import Effect
from shira_format.convert.fit.task import Entries, TaughtBatch
from shira_format.errors import SourceError

FIRST = 0.01  # density of the first fit of a search for a share of the effect
MOST = 0.2  # density beyond which no search goes: what is denser is hardly sparse
_STEP = 4.0  # from one density to the next, until one reaches the goal and one does not
NEAR = 1.2  # the density that is found is at most so many times one that misses the goal
ROOM = 0.98  # share of the bytes that a file has to fill, unless there are no more entries to take
_TRIES = 6


@dataclass(frozen=True)
class Trial:
    """One fit of a search.

    Attributes:
        budget: how many entries.
        density: share of the entries of all weights.
        fit: how near the fitted entries are to the source, on the inputs that the density is chosen by.
        plain: the same of the plain cut to as many entries.
        file_bytes: size of the adapter file with the nearer of the two; 0 if it is not known.
        entries: what was fitted.
    """

    budget: int
    density: float
    fit: Effect
    plain: Effect
    file_bytes: int
    entries: Entries = field(repr=False)

    @property
    def kept(self) -> Literal["fit", "plain"]:
        """Which of the two a file holds: the nearer one."""
        return "fit" if self.fit.r2 >= self.plain.r2 else "plain"

    @property
    def effect(self) -> Effect:
        """How near to the source a file is."""
        return self.fit if self.kept == "fit" else self.plain

    @property
    def r2(self) -> float:
        """How much of the effect a file keeps."""
        return self.effect.r2

    def reaches(self, keep: float) -> bool:
        """Whether so much of the effect is kept; an R^2 that is no number keeps nothing."""
        return self.r2 >= keep

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        fit, plain = (
            {key: one[key] for key in ("r2", "low", "high")} for one in (self.fit.as_dict(), self.plain.as_dict())
        )
        return {
            "budget": self.budget, "density": self.density, "kept": self.kept, "fit": fit, "plain": plain,
            "file_bytes": self.file_bytes or None,
        }  # fmt: skip


# Fits so many entries, from entries of a denser fit if there is one.
Attempt = Callable[[int, Entries | None], Trial]


@dataclass
class Search:
    """The fits of a search, in the order in which they were made.

    Attributes:
        numel: elements of all weights that are fitted.
        attempt: makes one.
        trials: those that were made.
    """

    numel: int
    attempt: Attempt
    trials: list[Trial] = field(default_factory=list)

    def at(self, budget: int) -> Trial:
        """Fit so many entries, starting from the sparsest of the denser fits."""
        denser = [trial for trial in self.trials if trial.budget > budget]
        start = min(denser, key=lambda trial: trial.budget).entries if denser else None
        self.trials.append(self.attempt(budget, start))
        return self.trials[-1]

    def entries(self, density: float) -> int:
        """A density as a number of entries, at least one."""
        return min(self.numel, max(1, round(density * self.numel)))


def fewest_entries(search: Search, keep: float, *, most: float = MOST) -> Trial:
    """The sparsest fit that keeps a share of the effect.

    From 1 % on the density changes in steps of four until one fit reaches the share and one misses it; then the geometric mean of the two is
    tried, until they are no more than 20 % apart (:data:`NEAR`). As fits are noisy, a lower density might reach the share by chance.

    Args:
        search: what fits.
        keep: the least R^2, in (0, 1).
        most: the highest density that is tried.

    Raises:
        ValueError: ``keep`` is out of range.
        SourceError: no density up to ``most`` reaches it; the message has the best that was reached.
    """
    if not 0 < keep < 1:
        raise ValueError(f"a share of {keep} of the effect cannot be kept: it must be in (0, 1)")
    top = search.entries(most)
    trial = search.at(min(top, search.entries(FIRST)))
    if not trial.reaches(keep):
        missed = trial
        while not missed.reaches(keep):
            if missed.budget == top:
                raise _unreached(search, keep, most)
            missed, below = search.at(min(top, round(missed.budget * _STEP))), missed
        reached, missed_budget = missed, below.budget
    else:
        reached, missed_budget = trial, 0
        while reached.budget > 1 and not missed_budget:
            trial = search.at(max(1, round(reached.budget / _STEP)))
            if not trial.reaches(keep):
                missed_budget = trial.budget
            else:
                reached = trial
    while missed_budget and reached.budget > max(missed_budget * NEAR, missed_budget + 1):
        trial = search.at(round(math.sqrt(reached.budget * missed_budget)))
        if not trial.reaches(keep):
            missed_budget = trial.budget
        else:
            reached = trial
    return reached


def _unreached(search: Search, keep: float, most: float) -> SourceError:
    best = max(search.trials, key=lambda trial: trial.r2)
    return SourceError(
        f"no density up to {percent(most)} keeps {keep:g} of the effect (R²): the best is {best.r2:.3f} at {percent(best.density)}; more steps "
        "or more texts may reach it, or ask for less"
    )


def fullest_file(search: Search, max_bytes: int, size: Callable[[int], int], *, most: float = MOST) -> Trial:
    """The densest fit whose adapter file has no more than ``max_bytes``.

    The file fills at least 98 % (:data:`ROOM`) of them, unless a density of ``most`` takes fewer, or no number of entries comes as near in six
    fits.

    Args:
        search: what fits.
        max_bytes: of the whole file.
        size: the size of a file with so many entries that are not fitted, which is quickly made, to begin near.
        most: the highest density that is tried.

    Raises:
        SourceError: not even one entry has room.
    """
    fixed, top = size(1), search.entries(most)
    if fixed > max_bytes:
        raise SourceError(
            f"a file with a single entry has {_bytes(fixed)}, more than {_bytes(max_bytes)}: that much is taken by the header and by "
            "what is stored whole"
        )
    budget = _unfitted(max_bytes, size, fixed, top)
    best: Trial | None = None
    over = top + 1  # the fewest entries that are known to have no room
    for _ in range(_TRIES):
        trial = search.at(budget)
        if trial.file_bytes <= max_bytes:
            best = trial if best is None or trial.budget > best.budget else best
            if trial.budget == top or trial.file_bytes >= ROOM * max_bytes:
                break
        else:
            over = min(over, trial.budget)
        aim = (max_bytes + ROOM * max_bytes) / 2 - fixed
        below = 0 if best is None else best.budget
        budget = round(trial.budget * aim / max(1, trial.file_bytes - fixed))
        budget = min(over - 1, top, max(below + 1, budget, 1))
        if budget <= below:
            break
    if best is None:
        least = min(search.trials, key=lambda trial: trial.file_bytes)
        raise SourceError(f"no fit has room in {_bytes(max_bytes)}: the smallest file has {_bytes(least.file_bytes)} with {count(least.budget)} entries")  # fmt: skip
    return best


def _unfitted(max_bytes: int, size: Callable[[int], int], fixed: int, top: int) -> int:
    """About how many entries have room, by the sizes of files that are not fitted."""
    budget = min(top, max(1, (max_bytes - fixed) // 4))
    for _ in range(3):
        found = size(budget) - fixed
        if found <= 0:
            return budget
        budget = min(top, max(1, int(budget * (max_bytes - fixed) / found)))
    return budget


def _bytes(number: int) -> str:
    return f"{count(number)} bytes" if number < 10_000 else file_size(number)


def halved(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Held-out batches in two parts: one to choose the density by, and one to measure what was chosen.

    The rows of a batch of tensors go to the two in turns; a batch that cannot be divided goes to one of them.

    Raises:
        SourceError: there is but one input.
    """
    parts: tuple[list[Any], list[Any]] = [], []
    turn = 0
    for batch in batches:
        rows = _rows(batch)
        if rows is None or rows < 2:
            parts[turn % 2].append(batch)
            turn += 1
            continue
        for first in range(2):
            parts[(turn + first) % 2].append(_every_second(batch, first))
        turn += rows
    if not parts[0] or not parts[1]:
        raise SourceError(
            "a single input is held out: a search needs two, one to choose the density by and one to measure it on; give more inputs"
        )
    return parts


def input_count(batches: Sequence[Any]) -> int:
    """How many inputs batches have; one that cannot be divided counts as one."""
    return sum(_rows(batch) or 1 for batch in batches)


def _rows(batch: Any) -> int | None:
    """How many inputs a batch has, if its tensors can be divided by their first dimension."""
    values = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    sizes = {len(value) if isinstance(value, Tensor) and value.ndim else None for value in values}
    return sizes.pop() if len(sizes) == 1 else None


def _every_second(batch: Any, first: int) -> Any:
    if isinstance(batch, Mapping):
        some = {name: value[first::2] for name, value in batch.items()}
        return TaughtBatch(some, batch.weights) if isinstance(batch, TaughtBatch) else some
    return batch[first::2]
