"""``magnitude``: the entries of the base's largest magnitudes, or those that follow them (spec, section 5.8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.format.codecs.base import Encoded, IndexCodec
from shira_format.format.codecs.seeded import check_band, check_reach

_SAMPLE = 1 << 12


class Magnitude(IndexCodec):
    """No bits for masks of the largest weights; a reader needs the base's tensor."""

    name = "magnitude"
    feature = "magnitude"

    def check_params(self, params: Mapping[str, Any], tensor: str) -> None:
        check_band(params, tensor)

    def needs_base(self, params: Mapping[str, Any]) -> bool:
        return True

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        return None  # only the base tells

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        raise ValueError("entries do not tell the base's magnitudes")

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        assert base is not None
        band = check_reach(stored.params, shape, nnz)
        return largest(base, nnz, band)


def largest(base: Array, count: int, band: int = 0) -> Indices:
    """The flat positions of the largest magnitudes, int64 ``[count]``, strictly increasing.

    The magnitude of a float is its bits without the sign, as an unsigned integer, so that NaN is above infinity and the order is
    that of numbers otherwise. Of equal magnitudes the one of the lower index comes first.

    Args:
        base: the flat weight, floats of any dtype.
        count: how many.
        band: 0: the largest, 1: the next so many, ...; ``(band + 1) * count <= base.size``.
    """
    if count == 0:
        return np.empty(0, np.int64)
    sizes = magnitudes(base)
    upper = _first(sizes, (band + 1) * count)
    return upper if band == 0 else np.setdiff1d(upper, _first(sizes, band * count), assume_unique=True)


def magnitudes(values: Array) -> Array:
    """The bits of flat floats without the sign, unsigned integers of the same size."""
    width = values.dtype.itemsize
    unsigned = np.dtype(f"u{width}")
    found: Array = np.ascontiguousarray(values).view(unsigned) & unsigned.type((1 << (8 * width - 1)) - 1)
    return found


def _first(sizes: Array, count: int) -> Indices:
    """The positions of the ``count`` largest, of equal ones those of lower index."""
    if count == sizes.size:
        return np.arange(count, dtype=np.int64)
    least = _ranked(sizes, count)
    found = sizes >= least
    surplus = int(np.count_nonzero(found)) - count
    if surplus:  # the last of those that equal the least
        equal = np.flatnonzero(sizes == least)
        found[equal[equal.size - surplus :]] = False
    return np.flatnonzero(found)


def _ranked(sizes: Array, count: int) -> Any:
    """The ``count``-th largest."""
    if sizes.dtype.itemsize <= 2:
        bins = np.bincount(sizes, minlength=1)
        return np.flatnonzero(np.cumsum(bins[::-1]) >= count)[0] * -1 + bins.size - 1
    return np.partition(sizes, sizes.size - count)[sizes.size - count]


def encode_largest(indices: Indices, base: Array) -> Encoded | None:
    """The entries as the largest magnitudes of the flat base, or the band after; None if they are not.

    The number of elements above the largest entry tells the band.
    """
    count = indices.size
    if not count:
        return None
    inside = magnitudes(base[indices])
    sample = magnitudes(base[:: max(1, base.size // _SAMPLE)])
    low, high = inside.min(), inside.max()
    # Of a mask that is none of magnitudes, entries lie among all others.
    between = int(np.count_nonzero((sample > low) & (sample < high)))
    if between > 8 + 4 * count * sample.size // base.size:
        return None
    band = round(int(np.count_nonzero(magnitudes(base) > high)) / count)
    if (band + 1) * count > base.size or not np.array_equal(largest(base, count, band), indices):
        return None
    return Encoded({"codec": Magnitude.name} | ({"band": band} if band else {}))
