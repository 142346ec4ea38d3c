"""Limiting the density of a merged tensor: only its largest deltas are kept."""

from __future__ import annotations

import numpy as np

from shira_format._core.dtypes import working_dtype
from shira_format.entries.aligned import Contribution
from shira_format.selection import TopK
from shira_format.selection.topk import largest
from shira_format.tensors import SparseTensor


def limit_density(tensor: SparseTensor, density: float) -> tuple[SparseTensor, float, float]:
    """Keep the largest deltas of a tensor, at most a share ``density`` of the weight's elements.

    Args:
        tensor: deltas, or targets with their base's values.
        density: in (0, 1].

    Returns:
        The tensor, the energy (the sum of squares) of all its deltas, and that of those that are kept.

    Raises:
        SourceError: a delta is NaN or infinite.
        BaseRequired: targets without their base's values.
    """
    delta = Contribution(tensor, label="the result").delta
    energy = float(delta @ delta)
    kept = largest(np.abs(delta).astype(working_dtype(tensor.dtype)), TopK(density).count(tensor.numel))
    if kept.all():
        return tensor, energy, energy
    base = None if tensor.base is None else tensor.base[kept]
    small = SparseTensor(
        tensor.name, tensor.shape, tensor.indices[kept], tensor.values[kept], value_kind=tensor.value_kind, dtype=tensor.dtype, base=base
    )  # fmt: skip
    return small, energy, float(delta[kept] @ delta[kept])
