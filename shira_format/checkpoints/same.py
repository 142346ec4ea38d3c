"""Whether two stored tensors have the same bits, in bounded memory."""

from __future__ import annotations

import numpy as np

from shira_format._core.arrays import as_bytes
from shira_format.checkpoints.base import Checkpoint
from shira_format.tensors import numel


def same_bits(a: Checkpoint, name: str, b: Checkpoint, other: str, step: int = 1 << 20) -> bool:
    """Whether two tensors of one dtype and shape have the same bits."""
    size = numel(a.shape(name))
    for start in range(0, size, step):
        stop = min(start + step, size)
        if not np.array_equal(as_bytes(a.part(name, start, stop)), as_bytes(b.part(other, start, stop))):
            return False
    return True


def same_tensor(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    return (a.dtype(name), a.shape(name)) == (b.dtype(other), b.shape(other)) and same_bits(a, name, b, other)
