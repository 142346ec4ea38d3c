"""Each compiled loop against the numpy code that runs where numba is not installed, between pages without access."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy import sparse

from fuzz.guard import Guards
from fuzz.kernels import both
from fuzz.oracle import Violation
from shira_analysis.measures import product_kernels
from shira_format._core import compiled
from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import FLOATS
from shira_format.training import sampled_kernel


def make(random: Random, folder: Path) -> None:
    """The name of a loop, and a seed of its arguments."""
    case = {"loop": random.choice(sorted(_LOOPS)), "seed": random.getrandbits(48)}
    (folder / "case.json").write_text(json.dumps(case), "utf-8")


def check(folder: Path) -> None:
    """Run it."""
    case = json.loads((folder / "case.json").read_text("utf-8"))
    _LOOPS[case["loop"]](_Arguments(case["seed"]))


class _Arguments:
    """Arguments at random; what was handed out lies against a page without access."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._guards = Guards()

    def guarded(self, array: Array) -> Array:
        """A copy that ends before such a page, or begins after one."""
        return self._guards.copy(array, at_end=bool(self.random.random() < 0.7))

    def check(self) -> None:
        """Raise Violation unless the memory around is as it was."""
        if not self._guards.are_whole():
            raise Violation("memory outside of an array was written")

    def size(self) -> int:
        """How many elements: few, or more than loops take at a time."""
        return int(self.random.choice([0, 1, 2, 17, 130, 1000, 40_000], p=[0.05, 0.1, 0.1, 0.25, 0.25, 0.2, 0.05]))

    def rising(self, size: int) -> Indices:
        """Strictly increasing indices; sometimes the first is negative, or the last beyond the end."""
        share = self.random.choice([0.0, 0.02, 0.3, 1.0])
        found = np.flatnonzero(self.random.random(size) < share).astype(np.int64)
        if found.size and self.random.random() < 0.1:
            found[-1] += self.random.choice([size, 1, 2**62])
        if found.size and self.random.random() < 0.05:
            found[0] = self.random.choice([-1, -size - 1, -(2**62)])
        return self.guarded(found)

    def values(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Any bits; sometimes one more than asked for."""
        size += int(self.random.random() < 0.03)
        return self.guarded(self.random.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype))

    def dtype(self) -> np.dtype[Any]:
        """A float dtype."""
        return list(FLOATS.values())[self.random.integers(len(FLOATS))]

    def factors(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Strengths, one or all."""
        work = np.float64 if dtype == np.float64 else np.float32
        size = 1 if self.random.random() < 0.5 else size
        return self.guarded(self.random.choice([0.0, 1.0, 0.5, -3.0, 1e30], size).astype(work))


def _take(given: _Arguments) -> None:
    flat = given.values(size := given.size(), given.dtype())
    indices = given.rising(size)
    both(lambda: compiled.take(flat, indices))
    given.check()


def _changes(given: _Arguments, work: Callable[..., Any], changed: list[Array], *others: Any) -> None:
    """``work(*changed, *others)`` both ways, each from the same state; the state afterwards is compared, too."""
    before = [array.copy() for array in changed]

    def run() -> Any:
        for array, old in zip(changed, before, strict=True):
            array[...] = old
        result = work(*changed, *others)
        return result, [array.copy() for array in changed]

    try:
        both(run)
    finally:
        given.check()


def _put(given: _Arguments) -> None:
    dtype, size = given.dtype(), given.size()
    indices = given.rising(size)
    _changes(given, compiled.put, [given.values(size, dtype)], indices, given.values(indices.size, dtype))


def _exchange(given: _Arguments) -> None:
    dtype, size = given.dtype(), given.size()
    old, new = given.rising(size), given.rising(size)
    others = old, given.values(old.size, dtype), new, given.values(new.size, dtype)
    _changes(given, compiled.exchange, [given.values(size, dtype)], *others)


def _overlay(given: _Arguments) -> None:
    dtype, size = given.dtype(), given.size()
    indices, other = given.rising(size), given.rising(size)
    _changes(
        given,
        compiled.overlay,
        [given.values(indices.size, dtype)],
        indices,
        other,
        given.values(other.size, dtype),
    )


def _union(given: _Arguments) -> None:
    size = given.size()
    lists = [given.rising(size) for _ in range(given.random.integers(1, 5))]
    lists = [np.sort(one) if (np.diff(one) > 0).all() else one[:1] for one in lists]
    every, places = both(lambda: compiled.union(lists))
    given.check()
    if not all(np.array_equal(every[at], one) for one, at in zip(lists, places, strict=True)):
        raise Violation("the places in a union are not those of the lists")


def _mixed(given: _Arguments) -> None:
    dtype, size = given.dtype(), given.size()
    target, own, factors = given.values(size, dtype), given.values(size, dtype), given.factors(size, dtype)
    both(lambda: compiled.mixed(target, own, factors))
    given.check()


def _scatter(given: _Arguments) -> None:
    dtype, size = given.dtype(), given.size()
    at, truth = given.rising(size), given.values(size, dtype)
    inside = at[(at >= 0) & (at < truth.size)]
    own = given.guarded(truth[inside]) if given.random.random() < 0.7 else given.values(at.size, dtype)
    known = given.guarded(given.random.random(size) < 0.5)
    changed = [given.values(size, dtype), given.guarded(truth), known, given.guarded(np.zeros(size, np.int32))]
    new, factors = given.values(at.size, dtype), given.factors(at.size, dtype)
    if factors.size == 1:
        factors[:] = 0.5

    def work(values: Array, base: Array, known: Array, count: Array) -> int:
        return compiled.scatter(at, new, own, factors, values, base, known, count)

    _changes(given, work, changed)


def _rises(given: _Arguments) -> None:
    indices = given.rising(given.size())
    if given.random.random() < 0.5:
        given.random.shuffle(indices)
    both(lambda: compiled.is_strictly_increasing(indices))


def _matrix(given: _Arguments, rows: int, columns: int) -> Any:
    dense = np.where(given.random.random((rows, columns)) < 0.2, given.random.integers(-4, 5, (rows, columns)), 0)
    return sparse.csr_array(dense.astype(np.float64))


def _product(given: _Arguments) -> None:
    rows, inner, columns = (int(side) for side in given.random.integers(0, 30, 3))
    left, right = _matrix(given, rows, inner), _matrix(given, inner, columns)
    arguments: list[Any] = [
        given.guarded(part) for one in (left, right) for part in (one.indptr, one.indices, one.data)
    ]
    energy, nonzero, _ = product_kernels.measure(*[*arguments, columns])
    given.check()
    dense = left.toarray() @ right.toarray()
    if (energy, nonzero) != (float((dense**2).sum()), int(np.count_nonzero(dense))):
        raise Violation(f"energy {energy} and {nonzero} cells of a product that has others")


def _sampled(given: _Arguments) -> None:
    rows, columns = (int(side) for side in given.random.integers(1, 40, 2))
    first = int(given.random.integers(0, 4))
    factors = [
        given.random.integers(-3, 4, (first + sampled_kernel.TOKENS, side)).astype(np.float32)
        for side in (rows, columns)
    ]
    chosen = np.flatnonzero(given.random.random(rows * columns) < 0.3)
    starts = np.searchsorted(chosen // columns, np.arange(rows + 1)).astype(np.int32)
    places = (chosen % columns).astype(np.int32)
    outer, inner = (given.guarded(factor.view(np.uint32)) for factor in factors)
    out = given.guarded(np.zeros(chosen.size, np.float32))
    sampled_kernel.products(outer, inner, first, given.guarded(starts), given.guarded(places), out)
    given.check()
    if not np.array_equal(out, (factors[0][first:].T @ factors[1][first:]).reshape(-1)[chosen]):
        raise Violation("entries of a product are not those of the product")


_LOOPS: dict[str, Callable[[_Arguments], None]] = {
    "exchange": _exchange, "mixed": _mixed, "overlay": _overlay, "product": _product, "put": _put, "rises": _rises,
    "sampled": _sampled, "scatter": _scatter, "take": _take, "union": _union,
}  # fmt: skip
