"""Selected entries as target values: the sparse tensor of the file, and its account."""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format._core.arrays import Array, array_digest, bits_differ
from shira_format._core.dtypes import dtype_name, working_dtype
from shira_format._core.rounding import upcast
from shira_format.convert.report import TensorReport
from shira_format.entries.changes import Change
from shira_format.entries.selected import Entries
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor

_STEP = 1 << 18  # entries at a time


def sparse_target(
    change: Change, entries: Entries, *, self_contained: bool = False, **options: Any
) -> tuple[SparseTensor, TensorReport]:
    """The selected entries as targets; those whose target has the bits of the base are dropped.

    Args:
        change: what was selected from.
        entries: what was selected.
        self_contained: keep the base's values.
        options: further arguments of the tensor: ``base_name``, ``rows``, ``new_rows``.

    Raises:
        SourceError: a target that is not finite where the base is.
    """
    energy_stored = error = 0.0
    moved = np.empty(entries.size, bool)
    for start in range(0, entries.size, _STEP):
        part = entries.kept(slice(start, start + _STEP))
        base, target = _wide(part.base), _wide(part.target)
        if not np.isfinite(target).all() and (bad := np.isfinite(base) & ~np.isfinite(target)).any():
            raise SourceError(
                f"tensor {change.name!r}: base + update overflows {dtype_name(change.weight_dtype)} "
                f"at flat index {part.indices[bad][0]}"
            )
        here = bits_differ(part.base, part.target)
        moved[start : start + _STEP] = here
        with np.errstate(invalid="ignore"):  # where both are infinite, nothing is stored
            missed = target - base - part.values
        energy_stored += _energy(part.values, here)
        error += _energy(missed, here)
    stored = entries if moved.all() else entries.kept(np.flatnonzero(moved))
    tensor = target_tensor(change.name, change.shape, stored, self_contained=self_contained, **options)
    # Energy and stored part come from sums in different precision; what rounds below zero is zero.
    error += max(0.0, entries.energy - energy_stored)
    report = TensorReport(
        change.name, change.shape, dtype_name(change.weight_dtype), tensor.nnz,
        max(entries.energy, energy_stored), energy_stored, error,
    )  # fmt: skip
    return tensor, report


def target_tensor(
    name: str, shape: tuple[int, ...], entries: Entries, *, self_contained: bool, **options: Any
) -> SparseTensor:
    """``entries`` as a tensor of the format, with the base's values or their digest."""
    return SparseTensor(
        name, shape, entries.indices, entries.target,
        base=entries.base if self_contained else None,
        base_digest=None if self_contained else array_digest(entries.base), **options,
    )  # fmt: skip


def _wide(array: Array) -> Array:
    return upcast(array, np.empty(array.shape, working_dtype(array.dtype)))


def _energy(values: Array, which: Array) -> float:
    """The sum of squares of some, in float64."""
    wide = values[which].astype(np.float64)
    return float(np.dot(wide, wide))
