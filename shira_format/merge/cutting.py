"""Cutting a result to a density: its largest changes."""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import working_dtype
from shira_format.entries.aligned import Contribution
from shira_format.selection import TopK
from shira_format.tensors import SparseTensor


def largest(size: Array, count: int) -> Indices:
    """Positions of the ``count`` largest of some magnitudes, rising; of equal ones the first."""
    if count >= size.size:
        return np.arange(size.size, dtype=np.int64)
    if count <= 0:
        return np.empty(0, np.int64)
    floor = np.partition(size, size.size - count)[size.size - count]
    chosen = size > floor
    equal = np.flatnonzero(size == floor)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def cut(tensor: SparseTensor, density: float) -> tuple[SparseTensor, float, float]:
    """The largest changes of a tensor, so many that they are a share ``density`` of its elements.

    Args:
        tensor: deltas, or targets with their base's values.
        density: in (0, 1].

    Returns:
        The tensor, the sum of squares of its changes, and that of those that are left.

    Raises:
        SourceError: a change that is NaN or infinite, which has no place in an order.
        BaseRequired: targets without their base's values.
    """
    wide = np.float64 if working_dtype(tensor.dtype) == np.float64 else np.float32
    delta = Contribution(tensor, label="the result").delta
    energy = float(delta @ delta)
    kept = largest(np.abs(delta).astype(wide), TopK(density).count(tensor.numel))
    if kept.size == tensor.nnz:
        return tensor, energy, energy
    base = None if tensor.base is None else tensor.base[kept]
    small = SparseTensor(
        tensor.name, tensor.shape, tensor.indices[kept], tensor.values[kept], value_kind=tensor.value_kind, dtype=tensor.dtype, base=base
    )  # fmt: skip
    return small, energy, float(delta[kept] @ delta[kept])
