"""Factors with a core (Tucker decomposition), as LoHa and LoKr of PEFT have them for convolutions."""

from __future__ import annotations

import math

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError

_MOST = 1 << 26  # elements of a product of small factors


def with_core(core: Array, down: Array, where: str) -> Array:
    """``einsum("i j ..., j r -> i r ...")`` in float64: ``core`` is ``[R, R, *kernel]``, ``down`` ``[R, in]``; gives ``[R, in, *kernel]``.

    Raises:
        SourceError: the shapes do not fit, or the product is excessively large.
    """
    if core.ndim < 3 or down.ndim != 2 or core.shape[:2] != (down.shape[0],) * 2:
        raise SourceError(
            f"{where}: a core of shape {list(core.shape)} does not fit factors of shape {list(down.shape)}"
        )
    check_size(down.size * math.prod(core.shape[2:]), where)
    return np.asarray(
        np.einsum("ij...,jr->ir...", core.astype(np.float64), down.astype(np.float64), optimize=True)
    )


def check_size(elements: int, where: str) -> None:
    """Refuse a product of small factors that would take excessive memory."""
    if elements > _MOST:
        raise SourceError(f"{where}: a product of its factors has {elements} elements, more than {_MOST}")
