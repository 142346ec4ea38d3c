"""From selected entries to a tensor of the file, with its account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from shira_format.arrays import Array, digest
from shira_format.changes import Change, Entries
from shira_format.convert.report import TensorReport
from shira_format.dtypes import dtype_name, working_dtype
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor


def sparse_target(
    change: Change, entries: Entries, *, self_contained: bool = False, frame: Callable[[], dict[str, Any]] = dict
) -> tuple[SparseTensor, TensorReport]:
    """The selected entries as targets; those whose target has the bits of the base are dropped.

    Args:
        change: what was selected from.
        entries: what was selected.
        self_contained: keep the base's values.
        frame: makes more arguments of the tensor: ``base_name``, ``rows``, ``new_rows``.

    Raises:
        SourceError: a target that is not finite where the base is.
    """
    work = working_dtype(change.weight_dtype)
    bad = np.isfinite(entries.base.astype(work)) & ~np.isfinite(entries.target.astype(work))
    if bad.any():
        raise SourceError(
            f"tensor {change.name!r}: base + update overflows {dtype_name(change.weight_dtype)} "
            f"at flat index {entries.indices[bad][0]}"
        )
    stored = entries.kept(different(entries.base, entries.target))
    tensor = target_tensor(change.name, change.shape, stored, self_contained=self_contained, **frame())
    wide = stored.values.astype(np.float64)
    energy_stored = float(np.dot(wide, wide))
    missed = stored.target.astype(np.float64) - stored.base.astype(np.float64) - wide
    # Energy and stored part come from sums in different precision; what rounds below zero is zero.
    error = max(0.0, entries.energy - energy_stored) + float(np.dot(missed, missed))
    report = TensorReport(
        change.name, change.shape, dtype_name(change.weight_dtype), tensor.nnz,
        max(entries.energy, energy_stored), energy_stored, error,
    )  # fmt: skip
    return tensor, report


def target_tensor(
    name: str, shape: tuple[int, ...], entries: Entries, *, self_contained: bool, **frame: Any
) -> SparseTensor:
    """``entries`` as a tensor of the format, with the base's values or their digest."""
    return SparseTensor(
        name, shape, entries.indices, entries.target,
        base=entries.base if self_contained else None,
        base_digest=None if self_contained else digest(entries.base), **frame,
    )  # fmt: skip


def different(a: Array, b: Array) -> Array:
    """Where the bits of two arrays of one dtype differ."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return np.asarray(a.view(unsigned) != b.view(unsigned))


def rounded(number: float) -> float:
    """To six digits: sums of floats may differ beyond that between machines, and bytes of files should not."""
    return float(f"{number:.6g}")
