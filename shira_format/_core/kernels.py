"""The functions of :mod:`shira_format._core.compiled` that numba compiles; imported only if numba is installed.

They take unsigned integers, with one compilation per item size, and release the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from shira_format._core.prefetch import is_supported, prefetch

_VARINT = 8  # bytes of a code at most
_PIECE = 1 << 15  # bytes of a weight that fit a first-level cache
_AHEAD = 128  # entries: early enough for the memory to answer, late enough for the cache to still hold them
F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    return cast("F", njit(nogil=True, cache=True)(function))


if is_supported():
    _soon = prefetch
else:

    @_compiled
    def _soon(array: Any, index: Any) -> None:
        """No prefetch: slower, but correct."""


@_compiled
def take(flat: Any, indices: Any, out: Any) -> None:
    """``out = flat[indices]``."""
    for i in range(indices.size):
        if i + _AHEAD < indices.size:
            _soon(flat, indices[i + _AHEAD])
        out[i] = flat[indices[i]]


@_compiled
def put(flat: Any, indices: Any, values: Any) -> None:
    """``flat[indices] = values``."""
    for i in range(indices.size):
        if i + _AHEAD < indices.size:
            _soon(flat, indices[i + _AHEAD])
        flat[indices[i]] = values[i]


@_compiled
def overlay(values: Any, indices: Any, other: Any, other_values: Any) -> int:
    """A merge of two strictly increasing lists; see :func:`shira_format._core.compiled.overlay`."""
    i = j = met = 0
    while i < indices.size and j < other.size:
        a, b = indices[i], other[j]
        if a == b:
            values[i] = other_values[j]
            met += 1
        i += a <= b
        j += b <= a
    return met


@_compiled
def exchange(flat: Any, old: Any, old_base: Any, new: Any, new_values: Any, new_base: Any) -> None:
    """``flat[old] = old_base; new_base = flat[new]; flat[new] = new_values``, a piece of ``flat`` at a time.

    Both index lists are increasing, so that each piece is loaded once and stays in the cache for all three steps.
    """
    i = j = limit = 0
    piece = _PIECE // flat.itemsize
    while i < old.size or j < new.size:
        limit += piece
        while i < old.size and old[i] < limit:
            if i + _AHEAD < old.size:
                _soon(flat, old[i + _AHEAD])
            flat[old[i]] = old_base[i]
            i += 1
        first = j
        while j < new.size and new[j] < limit:
            if j + _AHEAD < new.size:
                _soon(flat, new[j + _AHEAD])
            new_base[j] = flat[new[j]]
            j += 1
        for k in range(first, j):
            flat[new[k]] = new_values[k]


@_compiled
def union(first: Any, second: Any, out: Any, of_first: Any, of_second: Any) -> int:
    """Merge two strictly increasing lists into ``out``, and their positions in it; returns its length.

    Which list comes next is unpredictable, so there is no branch: every step writes both positions, and the last write
    of each is the right one.
    """
    i = j = n = 0
    while i < first.size and j < second.size:
        a, b = first[i], second[j]
        out[n] = min(a, b)
        of_first[i] = n
        of_second[j] = n
        i += a <= b
        j += b <= a
        n += 1
    while i < first.size:
        out[n] = first[i]
        of_first[i] = n
        i += 1
        n += 1
    while j < second.size:
        out[n] = second[j]
        of_second[j] = n
        j += 1
        n += 1
    return n


@_compiled
def mix_bfloat16(target: Any, own: Any, factors: Any, out: Any) -> None:
    """``out = own + factors (target - own)`` of bfloat16 as its 16 bits; ``factors`` is ``[1]`` or ``[k]``."""
    for k in range(target.size):
        factor = factors[k] if factors.size > 1 else factors[0]
        origin = np.uint32(np.uint32(own[k]) << 16).view(np.float32)
        mixed = np.float32(origin + factor * (np.uint32(np.uint32(target[k]) << 16).view(np.float32) - origin))
        bits = mixed.view(np.uint32)
        near = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))  # to nearest, ties to even
        changed = np.uint32(np.uint32(0x7FC00000) if np.isnan(mixed) else near) >> 16
        out[k] = target[k] if factor == 1 else np.uint16(changed)


@_compiled
def scatter(at: Any, new: Any, own: Any, factors: Any, values: Any, base: Any, known: Any, count: Any) -> int:
    """See :func:`shira_format._core.compiled.scatter`; values are given as their bits."""
    bad = -1
    for k in range(at.size):
        n = at[k]
        if known[n] and base[n] != own[k]:
            bad = k
        base[n] = own[k]
        known[n] = True
        if factors.size == 1 or factors[k] != 0:
            count[n] += 1
            values[n] = new[k]
    return bad


@_compiled
def is_strictly_increasing(indices: Any) -> bool:
    """Whether ``indices`` are strictly increasing."""
    falls = 0
    for i in range(1, indices.size):
        falls += indices[i] <= indices[i - 1]  # counted without an early exit, so that the loop is vectorised
    return falls == 0


@_compiled
def decode_gap8(stream: Any, indices: Any) -> int:
    """Fill ``indices``; returns how many entries the stream has, of which those that do not fit are only counted."""
    at, found = -1, 0
    for i in range(stream.size):
        byte = stream[i]
        at += byte
        if byte != 255:
            at += 1
            if found < indices.size:
                indices[found] = at
            found += 1
    return found


@_compiled
def decode_varint(stream: Any, indices: Any, numel: int) -> bool:
    """Fill ``indices``; returns whether the stream is valid and has exactly so many entries, all below ``numel``."""
    at, found, i = -1, 0, 0
    while i < stream.size:
        gap, length = 0, 0
        byte: Any = 128
        while byte >= 128:
            if i == stream.size or length == _VARINT:
                return False
            byte = np.int64(stream[i])
            gap |= (byte & 127) << (7 * length)
            i += 1
            length += 1
        at += gap + 1  # no overflow: at most 2^56 more than a number below numel
        if (byte == 0 and length > 1) or at >= numel or found == indices.size:
            return False
        indices[found] = at
        found += 1
    return bool(found == indices.size)


@_compiled
def false_block(stream: Any, blocks: Any, indices: Any, block_size: int, more: int) -> int:
    """The first row of a block directory that disagrees with the decoded ``indices``, or -1.

    Bytes below ``more`` end an entry. A row is right if its offset is where the code of its entry starts: between two right
    offsets, as many entries end as a block has. See :func:`shira_format.format.codecs.gaps.check_blocks`.
    """
    for row in range(blocks.shape[0]):
        if blocks[row, 0] != indices[row * block_size]:
            return row
    at = 0
    for row in range(blocks.shape[0] - 1):
        stop = blocks[row + 1, 1]
        ends = 0
        while at < stop:
            ends += stream[at] < more
            at += 1
        if ends != block_size or stream[stop - 1] >= more:
            return row + 1
    return -1
