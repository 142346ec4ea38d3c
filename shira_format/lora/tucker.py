"""Factors with a core (Tucker decomposition), as LoCon, LoHa and LoKr have them for convolutions."""

from __future__ import annotations

import math

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError

_MOST = 1 << 26  # elements of a product of small factors


def with_core(core: Array, down: Array, where: str, size: int = 0) -> Array:
    """``einsum("i j ..., j r -> i r ...")`` in float64: ``core`` is ``[R, R, *kernel]``, ``down`` ``[R, in]``; gives ``[R, in, *kernel]``.

    Args:
        core, down: the factors.
        where: how messages start.
        size: elements of the weight, as many of which the product may have in any case.

    Raises:
        SourceError: the shapes do not fit, or the product is excessively large.
    """
    if core.ndim < 3 or down.ndim != 2 or core.shape[:2] != (down.shape[0],) * 2:
        raise SourceError(
            f"{where}: a core of shape {list(core.shape)} does not fit factors of shape {list(down.shape)}"
        )
    check_size(down.size * math.prod(core.shape[2:]), where, size)
    return np.asarray(
        np.einsum("ij...,jr->ir...", core.astype(np.float64), down.astype(np.float64), optimize=True)
    )


def check_size(elements: int, where: str, size: int = 0) -> None:
    """Refuse a product of small factors that would take excessive memory; ``size``: elements of the weight."""
    if elements > max(_MOST, size):
        than = f"the weight has {size}" if size else f"more than {_MOST}"
        raise SourceError(f"{where}: a product of its factors has {elements} elements, {than}")
