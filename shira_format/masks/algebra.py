"""Unions, intersections and differences of masks, or of the supports of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np

from shira_format._core.arrays import Indices, distinct
from shira_format.adapter import Adapter, LazyMapping
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor

Masks = Mapping[str, SparseTensor]


def union(*masks: Masks) -> Adapter:
    """The mask of all entries that one of the masks has, computed tensor by tensor when it is asked for.

    Args:
        masks: masks or adapters, of which only the entries count.

    Raises:
        ValueError: no mask is given.
        SourceError: a tensor has several shapes. Raised when the tensor is asked for.
    """
    names = list(dict.fromkeys(name for mask in _some(masks) for name in mask))
    return _combined(names, masks, lambda a, b: distinct(np.concatenate([a, b])), "union")


def intersection(*masks: Masks) -> Adapter:
    """The mask of the entries that all masks have; see :func:`union`."""
    first, *rest = _some(masks)
    names = [name for name in first if all(name in mask for mask in rest)]
    return _combined(names, masks, lambda a, b: np.intersect1d(a, b, assume_unique=True), "intersection")


def difference(mask: Masks, *others: Masks) -> Adapter:
    """The mask of the entries of ``mask`` that none of the others has; see :func:`union`."""
    return _combined(
        list(mask), (mask, *others), lambda a, b: np.setdiff1d(a, b, assume_unique=True), "difference"
    )


def _some(masks: tuple[Masks, ...]) -> tuple[Masks, ...]:
    if not masks:
        raise ValueError("no mask is given")
    return masks


def _combined(
    names: list[str], masks: tuple[Masks, ...], combine: Callable[[Indices, Indices], Indices], rule: str
) -> Adapter:
    def tensor(name: str) -> SparseTensor:
        found = [mask[name] for mask in masks if name in mask]
        for other in found[1:]:
            if other.shape != found[0].shape:
                raise SourceError(
                    f"tensor {name!r}: has the shape {list(found[0].shape)} in one mask and {list(other.shape)} in another"
                )
        indices = reduce(combine, (one.indices for one in found))
        return SparseTensor(name, found[0].shape, indices, value_kind="none", dtype=found[0].dtype)

    return Adapter(LazyMapping(names, tensor), manifest={"mask": {"rule": rule}})
