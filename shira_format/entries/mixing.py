"""What entries become under several adapters: ``base + sum of factor_i * delta_i`` (spec, section 4.1).

One rule for live weights and merges, so that a merge and the adapters together give the same bits. An entry with one
contribution becomes what that adapter alone makes of it at this strength. With several, their steps are summed in
float64 in ascending order (so that the order of the adapters does not matter), added to the base and rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shira_format._core import fits
from shira_format._core.arrays import Array, Indices, array_digest, bits_differ
from shira_format._core.compiled import scatter
from shira_format._core.dtypes import round_to, with_one_nan, working_dtype
from shira_format.entries.aligned import AlignedEntries, Contribution, Factor, Floats, common_dtype
from shira_format.errors import BaseMismatch, SourceError
from shira_format.tensors import SparseTensor


def mix_values(aligned: AlignedEntries, base: Array) -> tuple[Array, int]:
    """The new values of all entries under all parts at their weights (not 0), from the base's values ``[n]``.

    Returns:
        The values ``[n]`` in the base's dtype, and the number of entries that several parts have.
    """
    if len(aligned.parts) == 1:
        return aligned.parts[0].tensor.applied(base, aligned.parts[0].weight), 0
    values = base.copy()
    for number, part in enumerate(aligned.parts):
        values[aligned.places[number]] = part.tensor.applied(aligned.of_part(number, base), part.weight)
    weights = [part.weight for part in aligned.parts]
    return values, _mix_shared(aligned, weights, range(len(weights)), aligned.counts, base, values)


def mix(aligned: AlignedEntries, factors: Sequence[Factor], *, self_contained: bool) -> SparseTensor | None:
    """The merged entries of one weight, or None if none are left.

    Args:
        aligned: the adapters' entries, with base values where they are known.
        factors: for each part, from a merge method; entries with factor 0 are left out.
        self_contained: whether the result keeps the base's values.

    Returns:
        Targets if any contribution is a target, else deltas.

    Raises:
        SourceError: a weight that is infinite in the working dtype.
        BaseRequired: targets at entries whose base values are not known.
        BaseMismatch: the parts are of different bases.
    """
    active = [
        number for number, factor in enumerate(factors) if aligned.parts[number].tensor.nnz and np.any(factor)
    ]
    _check_inactive(aligned, active)
    if not active:
        return None
    if len(active) == 1 and np.all(np.equal(factors[active[0]], 1)):
        return keep_base(aligned.parts[active[0]].tensor, self_contained=self_contained)
    if all(aligned.parts[number].tensor.value_kind == "delta" for number in active):
        return _sum_deltas(aligned, factors, active)
    scattered = _Scattered(aligned)
    # Targets first: they have the base's values, which deltas may lack.
    for number in sorted(active, key=lambda number: aligned.parts[number].tensor.base is None):
        scattered.add(number, factors[number])
    _mix_shared(aligned, factors, active, scattered.count, scattered.base, scattered.values)
    kept = slice(None) if scattered.count.all() else np.flatnonzero(scattered.count)
    base = scattered.base[kept]
    known = {"base": base} if self_contained else {"base_digest": array_digest(base)}
    return SparseTensor(
        aligned.name, aligned.shape, aligned.indices[kept], scattered.values[kept], dtype=aligned.dtype, **known
    )


class _Scattered:
    """The entries of one weight, to which parts are added; right where one part alone contributes.

    Attributes:
        values: ``[n]`` the new values.
        base: ``[n]`` the base's values.
        count: int32 ``[n]``: the number of parts that contribute.
    """

    def __init__(self, aligned: AlignedEntries) -> None:
        self._aligned = aligned
        self.values, self.base = np.empty(aligned.size, aligned.dtype), np.empty(aligned.size, aligned.dtype)
        self._known = np.zeros(aligned.size, bool)
        self.count = np.zeros(aligned.size, np.int32)

    def add(self, number: int, factor: Factor) -> None:
        """Add one part.

        Raises:
            SourceError: its weight is infinite in the working dtype.
            BaseRequired: the base's values at its entries are not known.
            BaseMismatch: they are not those of another part.
        """
        part, at = self._aligned.parts[number], self._aligned.places[number]
        own = part.tensor.base
        if own is None:
            if part.tensor.value_kind == "target" or not self._known[at].all():
                raise fits.base_required(part.what)
            own = self.base[at]
            if part.tensor.base_digest is not None and array_digest(own) != part.tensor.base_digest:
                raise _other_base(part)
        work = working_dtype(self._aligned.dtype)
        if abs(part.weight) > float(np.finfo(work).max):
            raise SourceError(f"{part.label}: the weight {part.weight:g} is infinite in {work}")
        with np.errstate(over="ignore"):  # a method's factor may be infinite, and its result then is
            strength = np.atleast_1d(np.asarray(factor, work))
        new = part.tensor.applied(own, strength)
        if scatter(at, new, own, strength, self.values, self.base, self._known, self.count) >= 0:
            raise _other_base(part)


def _check_inactive(aligned: AlignedEntries, active: Sequence[int]) -> None:
    """Compare the base values of all parts if some of them contribute nothing, and so are not compared later.

    Raises:
        BaseMismatch: they differ.
    """
    known = [
        number
        for number, part in enumerate(aligned.parts)
        if part.tensor.nnz and part.weight and part.tensor.base is not None
    ]
    if len(known) < 2 or set(known) <= set(active):
        return
    base, seen = np.empty(aligned.size, aligned.dtype), np.zeros(aligned.size, bool)
    for number in known:
        at, own = aligned.places[number], aligned.parts[number].tensor.base
        assert own is not None
        if (bits_differ(base[at], own) & seen[at]).any():
            raise _other_base(aligned.parts[number])
        base[at], seen[at] = own, True


def _other_base(part: Contribution) -> BaseMismatch:
    return BaseMismatch(
        f"{part.what}: its base values differ from another adapter's at entries of both: these are not adapters of one base"
    )


def _mix_shared(
    aligned: AlignedEntries,
    factors: Sequence[Factor],
    active: Sequence[int],
    count: npt.NDArray[np.int32],
    base: Array,
    values: Array,
) -> int:
    """Set ``values`` where several parts contribute; the number of these entries."""
    shared, sums = _sum_shared(aligned, factors, active, count, base)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        sums += base[shared].astype(np.float64)
    values[shared] = with_one_nan(round_to(sums, values.dtype))
    return int(shared.size)


def _sum_shared(
    aligned: AlignedEntries,
    factors: Sequence[Factor],
    active: Sequence[int],
    count: npt.NDArray[np.int32],
    base: Array | None,
) -> tuple[Indices, Floats]:
    """The entries with several contributions, and the sums of their steps, float64. ``base`` is needed for targets."""
    shared = np.flatnonzero(count > 1) if len(active) > 1 else np.empty(0, np.int64)
    if not shared.size:
        return shared, np.empty(0)
    column = np.empty(count.size, np.int64)
    column[shared] = np.arange(shared.size)
    steps = np.zeros((len(active), shared.size))
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        for row, number in zip(steps, active, strict=True):
            tensor, factor = aligned.parts[number].tensor, factors[number]
            which = np.flatnonzero(count[aligned.places[number]] > 1)
            at = aligned.places[number][which]
            delta: Floats = tensor.values[which].astype(np.float64)
            if tensor.value_kind == "target":
                assert base is not None
                delta -= base[at].astype(np.float64)
            row[column[at]] = (factor[which] if isinstance(factor, np.ndarray) else factor) * delta
        return shared, sum_ascending(steps)


def sum_ascending(block: Floats) -> Floats:
    """The sums of the columns of ``[parts, n]``, in ascending order of their numbers; sorts ``block`` in place."""
    block.sort(axis=0)
    total = np.zeros(block.shape[1])
    for row in block:
        total += row
    return total


def _sum_deltas(aligned: AlignedEntries, factors: Sequence[Factor], active: Sequence[int]) -> SparseTensor:
    """The sum of deltas, which need no base values."""
    total, count = np.zeros(aligned.size), np.zeros(aligned.size, np.int32)
    for number in active:
        at, factor = aligned.places[number], factors[number]
        which = np.flatnonzero(np.broadcast_to(factor, at.shape))
        with np.errstate(over="ignore"):
            total[at[which]] = (factor * aligned.parts[number].delta)[which]
        count[at[which]] += 1
    shared, sums = _sum_shared(aligned, factors, active, count, None)
    total[shared] = sums
    kept = slice(None) if count.all() else np.flatnonzero(count)
    dtype = common_dtype({aligned.parts[number].tensor.values.dtype for number in active})
    values = round_to(total[kept], dtype)
    return SparseTensor(aligned.name, aligned.shape, aligned.indices[kept], values, value_kind="delta")


def keep_base(tensor: SparseTensor, *, self_contained: bool) -> SparseTensor:
    """``tensor`` as it is if ``self_contained``, else without the base's values."""
    if tensor.base is None or self_contained:
        return tensor
    return SparseTensor(
        tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind=tensor.value_kind, dtype=tensor.dtype,
        base_digest=tensor.base_digest,
    )  # fmt: skip
