"""What entries become under one or several adapters (spec, section 4.1): ``base + sum of alpha_i (target_i - base)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from shira_format.arrays import Array
from shira_format.changes import narrowed
from shira_format.codecs import Indices
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


def union(terms: Sequence[Term]) -> Indices:
    """The entries that any term touches, rising."""
    return reduce(np.union1d, (term.tensor.indices for term in terms))


def at_entries(indices: Indices, values: Array, tensor: SparseTensor) -> Array:
    """Of ``values`` at ``indices``, those at the entries of ``tensor``, which are all among them."""
    if indices is tensor.indices:
        return values
    return np.asarray(values[np.searchsorted(indices, tensor.indices)])


def mixed(terms: Sequence[Term], indices: Indices, base: Array) -> tuple[Array, int]:
    """The new values at ``indices``, the union of the terms' entries, and how many entries several terms touch.

    Where one term alone touches an entry, it becomes what it would under this term alone. Where several do, the sum is
    in float64, smallest step first, so that their order does not matter, and rounded once to the dtype of ``base``.
    """
    if len(terms) == 1:
        return terms[0].tensor.applied(base, terms[0].alpha), 0
    places = [np.searchsorted(indices, term.tensor.indices) for term in terms]
    touches = np.zeros(indices.size, np.int32)
    for at in places:
        touches[at] += 1
    new = base.copy()
    several = np.flatnonzero(touches > 1)
    steps = np.zeros((len(terms), several.size), np.float64)
    for row, (term, at) in enumerate(zip(terms, places, strict=True)):
        new[at] = term.tensor.applied(base[at], term.alpha)
        shared = touches[at] > 1
        step = _steps(term, shared, base[at[shared]])
        steps[row, np.searchsorted(several, at[shared])] = step
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        steps.sort(axis=0)
        total = base[several].astype(np.float64)
        for step in steps:
            total += step
        new[several] = narrowed(total, base.dtype)
    return new, int(several.size)


def _steps(term: Term, which: Array, base: Array) -> Array:
    """``alpha (target - base)`` in float64 of some entries of a term."""
    values = term.tensor.values[which].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if term.tensor.meaning == "target":
            values -= base.astype(np.float64)
        return np.asarray(term.alpha * values)
