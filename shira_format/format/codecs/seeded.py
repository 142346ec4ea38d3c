"""``random``: entries drawn by a permutation that a text, the seed, determines (spec, section 5.7)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded, IndexCodec
from shira_format.format.fields import need
from shira_format.tensors import MAX_NUMEL, numel

Words = npt.NDArray[np.uint64]

MAX_SEED = 4096  # bytes of UTF-8
_CHUNK = 1 << 15  # numbers that are permuted at a time, so that they stay in the cache
_ROUNDS = 4


class Permutation:
    """A permutation of the numbers below ``size``: a Feistel network whose round keys are the SHA-256 of a text.

    Numbers that leave the range are permuted again until they return, which takes less than two steps on average.

    Example:
        >>> Permutation("0 w", 10).of(np.arange(10))
        array([...])
    """

    def __init__(self, seed: str, size: int) -> None:
        """Args: ``seed``: any text; ``size``: at least 1, at most 2^53."""
        self.size = size
        digest = hashlib.sha256(seed.encode()).digest()
        self._keys: Words = np.frombuffer(digest, "<u8").astype(np.uint64)
        bits = max(2, (size - 1).bit_length())
        self._right = bits // 2
        self._left = bits - self._right

    def of(self, numbers: Indices) -> Indices:
        """Where ``numbers`` (int64 ``[n]``, below ``size``) go, int64 ``[n]``."""
        return self._walk(numbers, self._once)

    def back(self, numbers: Indices) -> Indices:
        """The numbers that go to ``numbers``: the inverse of :meth:`of`."""
        return self._walk(numbers, self._once_back)

    def _walk(self, numbers: Indices, step: Any) -> Indices:
        found = np.empty(numbers.size, np.int64)
        for start in range(0, numbers.size, _CHUNK):
            chunk = step(numbers[start : start + _CHUNK].astype(np.uint64))
            outside = np.flatnonzero(chunk >= self.size)
            while outside.size:
                moved = step(chunk[outside])
                chunk[outside] = moved
                outside = outside[moved >= self.size]
            found[start : start + _CHUNK] = chunk
        return found

    def _once(self, numbers: Words) -> Words:
        left, right = numbers >> np.uint64(self._right), numbers & _ones(self._right)
        widths = (self._left, self._right)
        for number in range(_ROUNDS):
            width = widths[number % 2]
            left, right = right, left ^ self._mixed(right, number, width)
        return (left << np.uint64(self._right)) | right

    def _once_back(self, numbers: Words) -> Words:
        left, right = numbers >> np.uint64(self._right), numbers & _ones(self._right)
        widths = (self._left, self._right)
        for number in reversed(range(_ROUNDS)):
            width = widths[number % 2]
            left, right = right ^ self._mixed(left, number, width), left
        return (left << np.uint64(self._right)) | right

    def _mixed(self, half: Words, number: int, width: int) -> Words:
        """The upper ``width`` bits of the finaliser of SplitMix64 (Steele, Lea and Flood, 2014) of key plus half."""
        word = half + self._keys[number]
        word ^= word >> np.uint64(30)
        word *= np.uint64(0xBF58476D1CE4E5B9)
        word ^= word >> np.uint64(27)
        word *= np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
        found: Words = word >> np.uint64(64 - width)
        return found


def _ones(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def drawn(seed: str, size: int, count: int, band: int = 0) -> Indices:
    """The ``count`` numbers below ``size`` that the seed draws, int64, strictly increasing.

    Args:
        seed: any text.
        size: of the range.
        count: how many.
        band: 0: the first so many that the permutation gives, 1: the next so many, ...; ``(band + 1) * count <= size``.
    """
    if count == 0:
        return np.empty(0, np.int64)
    found = Permutation(seed, size).of(np.arange(band * count, (band + 1) * count, dtype=np.int64))
    found.sort()
    return found


def check_band(params: Mapping[str, Any], tensor: str) -> None:
    """Raise FormatError unless ``band``, if it is there, is a count."""
    if "band" in params and not 0 <= need(params, "band", int, tensor) <= MAX_NUMEL:
        raise FormatError("manifest-schema", f"band {params['band']}", tensor=tensor)


def check_reach(params: Mapping[str, Any], shape: tuple[int, ...], nnz: int) -> int:
    """The band; raises FormatError if it ends beyond the tensor."""
    band = int(params.get("band", 0))
    if (band + 1) * nnz > numel(shape):
        raise FormatError(
            "count-mismatch", f"band {band} of {nnz} entries each, in a tensor of {numel(shape)} elements"
        )
    return band


class Seeded(IndexCodec):
    """No bits for random masks."""

    name = "random"
    own_text = "seed"
    feature = "random"

    def check_params(self, params: Mapping[str, Any], tensor: str) -> None:
        seed = need(params, "seed", str, tensor)
        try:
            length = len(seed.encode())
        except UnicodeEncodeError:
            length = MAX_SEED + 1
        if length > MAX_SEED:
            raise FormatError("manifest-schema", f"a seed of more than {MAX_SEED} bytes of UTF-8", tensor=tensor)
        check_band(params, tensor)

    def is_implied(self, params: Mapping[str, Any]) -> bool:
        return True

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        return None  # only who drew the entries knows the seed

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        raise ValueError("entries do not tell the seed that drew them")

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        band = check_reach(stored.params, shape, nnz)
        return drawn(stored.params["seed"], numel(shape), nnz, band)


def encode_drawn(indices: Indices, shape: tuple[int, ...], seed: str, band: int = 0) -> Encoded | None:
    """The entries by the seed that drew them; None if it did not."""
    count = indices.size
    if not count or (band + 1) * count > numel(shape):
        return None
    few = drawn_first(seed, numel(shape), count, band)
    at = np.minimum(np.searchsorted(indices, few), count - 1)
    if not np.array_equal(indices[at], few):
        return None
    if not np.array_equal(drawn(seed, numel(shape), count, band), indices):
        return None
    return Encoded({"codec": Seeded.name, "seed": seed} | ({"band": band} if band else {}))


def drawn_first(seed: str, size: int, count: int, band: int) -> Indices:
    """A few of :func:`drawn`, by which most other masks are told apart at once."""
    first = band * count
    return Permutation(seed, size).of(np.arange(first, first + min(count, 16), dtype=np.int64))
