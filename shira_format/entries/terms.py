"""What entries become under one or several adapters (spec, section 4.1): ``base + sum of alpha_i (target_i - base)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.rounding import round_to
from shira_format.tensors import SparseTensor


@dataclass(frozen=True)
class Term:
    """One adapter's part of one weight.

    Attributes:
        tensor: its entries.
        alpha: their strength, not zero.
    """

    tensor: SparseTensor
    alpha: float


@dataclass(frozen=True)
class Joint:
    """The terms of one weight together.

    Attributes:
        terms: one or more.
        indices: the entries that any term touches, rising.
        places: where among these the entries of each term are; None if there is one term.
    """

    terms: Sequence[Term]
    indices: Indices
    places: Sequence[Indices] | None = None

    @classmethod
    def of(cls, terms: Sequence[Term]) -> Joint:
        """Join terms of one weight."""
        if len(terms) == 1:
            return cls(terms, terms[0].tensor.indices)
        every = np.concatenate([term.tensor.indices for term in terms])
        order = np.argsort(every, kind="stable")  # which merges lists that rise
        rising = every[order]
        first = np.ones(rising.size, bool)
        np.not_equal(rising[1:], rising[:-1], out=first[1:])
        at = np.empty(every.size, np.int64)
        at[order] = np.cumsum(first) - 1
        ends = np.cumsum([term.tensor.nnz for term in terms])
        return cls(terms, rising[first], np.split(at, ends[:-1]))

    def of_term(self, number: int, values: Array) -> Array:
        """Of ``values`` at :attr:`indices`, those at the entries of one term."""
        return values if self.places is None else np.asarray(values[self.places[number]])

    def mixed(self, base: Array) -> tuple[Array, int]:
        """The new values at :attr:`indices`, where ``base`` was, and how many entries several terms touch.

        Where one term alone touches an entry, it becomes what it would under this term alone. Where several do, their steps
        are summed in float64, smallest first, so that their order does not matter and opposite ones cancel; the sum is
        added to ``base`` and rounded once to its dtype.
        """
        if self.places is None:
            return self.terms[0].tensor.applied(base, self.terms[0].alpha), 0
        touches = np.zeros(self.indices.size, np.int32)
        for at in self.places:
            touches[at] += 1
        several = np.flatnonzero(touches > 1)
        row_of = np.empty(self.indices.size, np.int64)
        row_of[several] = np.arange(several.size)
        new = base.copy()
        steps = np.zeros((len(self.terms), several.size), np.float64)
        for row, term, at in zip(steps, self.terms, self.places, strict=True):
            here = base[at]
            new[at] = term.tensor.applied(here, term.alpha)
            shared = np.flatnonzero(touches[at] > 1)
            row[row_of[at[shared]]] = _steps(term, shared, here[shared])
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
            steps.sort(axis=0)
            total = np.zeros(several.size)
            for row in steps:
                total += row
            new[several] = round_to(base[several].astype(np.float64) + total, base.dtype)
        return new, int(several.size)


def _steps(term: Term, which: Indices, base: Array) -> Array:
    """``alpha (target - base)`` in float64 of some entries of a term."""
    values = term.tensor.values[which].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if term.tensor.value_kind == "target":
            values -= base.astype(np.float64)
        return np.asarray(term.alpha * values)
