"""From the factors that a method gives to the entries of the result: ``base + sum of factor_i * delta_i``.

The rule is that of live adapters (spec, section 4.1), so that a merge and the adapters together give the same bits: an entry
with one contribution becomes what that adapter alone would make of it at this strength, and at strength 1 its target bit for
bit; one with several gets the sum of their steps in float64, smallest first, added to the base's value and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Indices, array_digest, bits_differ
from shira_format._core.compiled import mixed, scatter
from shira_format._core.dtypes import working_dtype
from shira_format._core.rounding import round_to
from shira_format.entries.aligned import AlignedEntries, Contribution, Factor, Floats
from shira_format.errors import BaseMismatch, SourceError
from shira_format.tensors import SparseTensor


def mix(joined: AlignedEntries, factors: Sequence[Factor], *, self_contained: bool) -> SparseTensor | None:
    """The result for one weight, or None if nothing is left of it.

    Args:
        joined: the weight.
        factors: for each part, from a method; an entry with the factor 0 is left out.
        self_contained: keep the base's values.

    Returns:
        Targets if any contribution is a target, else deltas.

    Raises:
        SourceError: a weight that is infinite in the weight's working dtype.
        BaseRequired: targets at entries of which nobody tells the base's values.
        BaseMismatch: the parts are of different bases.
    """
    active = [
        number for number, factor in enumerate(factors) if joined.parts[number].tensor.nnz and np.any(factor)
    ]
    _check_idle(joined, active)
    if not active:
        return None
    if len(active) == 1 and np.all(np.equal(factors[active[0]], 1)):
        return framed(joined.parts[active[0]].tensor, self_contained=self_contained)
    if all(joined.parts[number].tensor.value_kind == "delta" for number in active):
        return _deltas(joined, factors, active)
    laid = _Laid(joined)
    # Targets first: they tell the base's values, which deltas may lack.
    for number in sorted(active, key=lambda number: joined.parts[number].tensor.base is None):
        laid.put(number, factors[number])
    several, sums = _several(joined, factors, active, laid.count)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        sums += laid.base[several].astype(np.float64)
    laid.values[several] = round_to(sums, joined.dtype)
    kept = slice(None) if laid.count.all() else np.flatnonzero(laid.count)
    base = laid.base[kept]
    known = {"base": base} if self_contained else {"base_digest": array_digest(base)}
    return SparseTensor(
        joined.name, joined.shape, joined.indices[kept], laid.values[kept], dtype=joined.dtype, **known
    )


class _Laid:
    """Entries of one weight on which parts are laid one after the other, right where one alone contributes.

    Attributes:
        values: ``[n]`` what the entries become.
        base: ``[n]`` what they are in the base.
        count: int32 ``[n]``: how many parts contribute.
    """

    def __init__(self, joined: AlignedEntries) -> None:
        self._joined = joined
        self.values, self.base = np.empty(joined.size, joined.dtype), np.empty(joined.size, joined.dtype)
        self._known = np.zeros(joined.size, bool)
        self.count = np.zeros(joined.size, np.int32)

    def put(self, number: int, factor: Factor) -> None:
        """Lay one part.

        Raises:
            SourceError: its weight is infinite in the working dtype.
            BaseRequired: its entries' base values are not known.
            BaseMismatch: they are other ones than another part's.
        """
        part, at = self._joined.parts[number], self._joined.places[number]
        tensor = part.tensor
        own = tensor.base
        if own is None:
            if tensor.value_kind == "target" or not self._known[at].all():
                raise part.needs_base()
            own = self.base[at]
            if tensor.base_digest is not None and array_digest(own) != tensor.base_digest:
                raise _other_base(part)
        wide = working_dtype(self._joined.dtype)
        if abs(part.weight) > float(np.finfo(wide).max):
            raise SourceError(f"{part.label}: the weight {part.weight:g} is infinite in {wide}")
        with np.errstate(over="ignore"):  # a factor of a method may be infinite, as its result then is
            strength = np.atleast_1d(np.asarray(factor, wide))
        # A delta of 0 stands for the base's value where there is no target to lay.
        target = tensor.values if tensor.value_kind == "target" else own
        new = mixed(target, own, strength)
        if scatter(at, new, own, strength, self.values, self.base, self._known, self.count) >= 0:
            raise _other_base(part)
        if tensor.value_kind == "delta":
            some = np.flatnonzero(np.broadcast_to(strength, at.shape))
            with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
                step = tensor.values[some].astype(strength.dtype)
                step *= strength if strength.size == 1 else strength[some]
                self.values[at[some]] = (own[some].astype(strength.dtype) + step).astype(own.dtype)


def _check_idle(joined: AlignedEntries, active: Sequence[int]) -> None:
    """Compare the bases of adapters of which nothing is taken, which are not laid, with the others'.

    Raises:
        BaseMismatch: they are of different bases.
    """
    known = [
        number
        for number, part in enumerate(joined.parts)
        if part.tensor.nnz and part.weight and part.tensor.base is not None
    ]
    if len(known) < 2 or set(known) <= set(active):
        return
    base, seen = np.empty(joined.size, joined.dtype), np.zeros(joined.size, bool)
    for number in known:
        at, own = joined.places[number], joined.parts[number].tensor.base
        assert own is not None
        if (bits_differ(base[at], own) & seen[at]).any():
            raise _other_base(joined.parts[number])
        base[at], seen[at] = own, True


def _other_base(part: Contribution) -> BaseMismatch:
    return BaseMismatch(
        f"{part.label}: tensor {part.tensor.name!r}: other base values than another adapter's where entries meet: these "
        "are not adapters of one base"
    )


def _several(
    joined: AlignedEntries, factors: Sequence[Factor], active: Sequence[int], count: npt.NDArray[np.int32]
) -> tuple[Indices, Floats]:
    """The entries with several contributions, and the sums of their steps, float64."""
    several = np.flatnonzero(count > 1) if len(active) > 1 else np.empty(0, np.int64)
    if not several.size:
        return several, np.empty(0)
    steps = np.zeros((len(active), several.size))
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        for row, number in zip(steps, active, strict=True):
            met = np.searchsorted(joined.places[number], several)
            met[met == joined.places[number].size] = 0
            here = np.flatnonzero(joined.places[number][met] == several)
            met, factor = met[here], factors[number]
            row[here] = (factor[met] if isinstance(factor, np.ndarray) else factor) * _steps(
                joined.parts[number], met
            )
        steps.sort(axis=0)  # so that the order of the adapters does not matter
        total = np.zeros(several.size)
        for row in steps:
            total += row
    return several, total


def _steps(part: Contribution, which: Indices) -> Floats:
    """The deltas of some entries, float64."""
    values: Floats = part.tensor.values[which].astype(np.float64)
    if part.tensor.value_kind == "target":
        assert part.tensor.base is not None
        values -= part.tensor.base[which].astype(np.float64)
    return values


def _deltas(joined: AlignedEntries, factors: Sequence[Factor], active: Sequence[int]) -> SparseTensor:
    """The sum of deltas, which are bound to no values of a base."""
    total, count = np.zeros(joined.size), np.zeros(joined.size, np.int32)
    for number in active:
        at, factor = joined.places[number], factors[number]
        some = np.flatnonzero(np.broadcast_to(factor, at.shape))
        with np.errstate(over="ignore"):
            total[at[some]] = (factor * joined.parts[number].delta)[some]
        count[at[some]] += 1
    several, sums = _several(joined, factors, active, count)
    total[several] = sums
    kept = slice(None) if count.all() else np.flatnonzero(count)
    dtypes = {joined.parts[number].tensor.values.dtype for number in active}
    dtype = dtypes.pop() if len(dtypes) == 1 else max(map(working_dtype, dtypes), key=lambda one: one.itemsize)
    values = round_to(total[kept], dtype)
    return SparseTensor(joined.name, joined.shape, joined.indices[kept], values, value_kind="delta")


def framed(tensor: SparseTensor, *, self_contained: bool) -> SparseTensor:
    """A tensor with its base's values, if it has them, or without."""
    if tensor.base is None or self_contained:
        return tensor
    return SparseTensor(
        tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind=tensor.value_kind, dtype=tensor.dtype,
        base_digest=tensor.base_digest,
    )  # fmt: skip
