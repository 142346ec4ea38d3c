"""The loops over the elements of a weight and their classes (:mod:`shira_format.format.codecs.classes`) that numba compiles; imported
only if it is installed.

What an element's context is, is looked up: by the upper bits of the base's value alone, or also by row and column.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format._core.kernels import _compiled

_NEVER = 1 << 62


@_compiled
def count_lines(indices: Any, rows: Any, columns: Any) -> None:
    """Count the entries of each row and column, int64."""
    row, first = 0, 0
    width = columns.size
    for i in range(indices.size):
        while indices[i] - first >= width:
            row += 1
            first += width
        rows[row] += 1
        columns[indices[i] - first] += 1


@_compiled
def count_classes(bits: Any, shift: int, mask: int, rows: Any, columns: Any, indices: Any, counts: Any) -> None:
    """Count the entries of each class, in ``counts``, int64 ``[exponents, lines]``.

    Args:
        bits: the base's, flat; empty: exponents count as 0.
        shift: of the exponent in the bits.
        mask: of the exponent after that.
        rows: the number of each row; empty: there are no lines.
        columns: the number of each column.
        indices: the entries.
        counts: changed.
    """
    row, first = 0, 0
    width = columns.size
    for i in range(indices.size):
        at = indices[i]
        of_line = np.int64(0)
        if width:
            while at - first >= width:
                row += 1
                first += width
            of_line = rows[row] + columns[at - first]
        of_base = mask - (np.int64(bits[at] >> shift) & mask) if bits.size else 0
        counts[of_base, of_line] += 1


@_compiled
def arrange(numbers: Any, of: Any, ends: Any, contexts: int, items: Any, rows: Any) -> None:
    """Sort the numbers of each block by context, with a 0 after each context.

    Args:
        numbers: int64 ``[n]``.
        of: uint8 ``[n]``: their contexts.
        ends: of each block the number of the entry after its last one.
        contexts: how many there are.
        items: int64 ``[n + blocks * contexts]``, zeros, filled.
        rows: uint8, as many, filled with the contexts of the items.
    """
    place = np.empty(contexts, np.int64)
    begin, out = np.int64(0), 0
    for block in range(ends.size):
        place[:] = 0
        for i in range(begin, ends[block]):
            place[of[i]] += 1
        for context in range(contexts):
            count = place[context]
            place[context] = out
            for k in range(out, out + count + 1):
                rows[k] = context
            out += count + 1
        for i in range(begin, ends[block]):
            items[place[of[i]]] = numbers[i]
            place[of[i]] += 1
        begin = ends[block]


@_compiled
def ranks_by_base(
    bits: Any, shift: int, contexts: Any, block: int, ends: Any, indices: Any, found: Any, of: Any
) -> None:
    """For each entry its context and its rank, from 1: how many elements of the context lie after the entry of this context before
    it, in the same block, up to the entry.

    Args:
        bits: the base's, flat.
        shift: of the upper bits, sign and exponent.
        contexts: uint8: the context by these.
        block: elements of a block.
        ends: of each block the number of the entry after its last one.
        indices: the entries.
        found: int64, filled.
        of: uint8, filled.
    """
    passed = np.empty(256, np.int64)
    n = 0
    for number in range(ends.size):
        passed[:] = 0
        i = number * block
        while n < ends[number]:
            for k in range(i, indices[n] + 1):
                passed[contexts[bits[k] >> shift]] += 1
            i = indices[n] + 1
            context = contexts[bits[i - 1] >> shift]
            found[n] = passed[context]
            of[n] = context
            passed[context] = 0
            n += 1


@_compiled
def ranks_by_lines(
    bits: Any,
    shift: int,
    exponents: Any,
    rows: Any,
    columns: Any,
    contexts: Any,
    block: int,
    ends: Any,
    indices: Any,
    found: Any,
    of: Any,
) -> None:
    """As :func:`ranks_by_base`.

    Args:
        bits: the base's, flat, or empty.
        shift: see :func:`ranks_by_base`.
        exponents: int64: what the upper bits add to a class number.
        rows: the number of each row, 0 for one without entries.
        columns: the number of each column.
        contexts: uint8: the context of a class number.
        block: see :func:`ranks_by_base`; likewise the others.
        ends: likewise.
        indices: likewise.
        found: likewise.
        of: likewise.
    """
    passed = np.empty(256, np.int64)
    n = 0
    for number in range(ends.size):
        passed[:] = 0
        i = number * block
        while n < ends[number]:
            entry, context = indices[n], contexts[0]
            while i <= entry:
                row = i // columns.size
                first = row * columns.size
                stop = min(first + columns.size, entry + 1)
                if rows[row] == 0:
                    i = stop
                while i < stop:
                    number_of = rows[row] + columns[i - first]
                    if bits.size:
                        number_of += exponents[bits[i] >> shift]
                    context = contexts[number_of]
                    passed[context] += 1
                    i += 1
            found[n] = passed[context]
            of[n] = context
            passed[context] = 0
            n += 1


@_compiled
def _first_ranks(numbers: Any, counts: Any, n: int, at: Any, until: Any, left: Any) -> int:
    """Where each context's ranks begin and end, from the ``n``-th on, and the first of each; returns where all end."""
    left[:] = _NEVER
    for context in range(counts.size):
        at[context] = n
        n += counts[context]
        until[context] = n
        if at[context] < n:
            left[context] = numbers[at[context]]
    return n


@_compiled
def positions_by_base(
    bits: Any, shift: int, contexts: Any, block: int, first: int, numbers: Any, of_context: Any, out: Any
) -> int:
    """The inverse of :func:`ranks_by_base`; returns -1, or the block (from ``first``) in which a context has fewer elements than
    its ranks say.

    Args:
        bits: see :func:`ranks_by_base`; likewise the next three.
        shift: likewise.
        contexts: likewise.
        block: likewise.
        first: the number of the first block.
        numbers: the ranks, by block and context.
        of_context: int64 ``[blocks, contexts]``: how many there are.
        out: int64, filled with the entries.
    """
    left, at, until = np.empty(256, np.int64), np.empty(256, np.int64), np.empty(256, np.int64)
    n = 0
    for number in range(of_context.shape[0]):
        end = _first_ranks(numbers, of_context[number], n, at, until, left)
        begin = (first + number) * block
        for i in range(begin, min(begin + block, bits.size)):
            context = contexts[bits[i] >> shift]
            left[context] -= 1
            if left[context] == 0:
                out[n] = i
                n += 1
                at[context] += 1
                left[context] = numbers[at[context]] if at[context] < until[context] else _NEVER
        if n != end:
            return number
    return -1


@_compiled
def positions_by_lines(
    bits: Any,
    shift: int,
    exponents: Any,
    rows: Any,
    columns: Any,
    contexts: Any,
    block: int,
    first: int,
    numbers: Any,
    of_context: Any,
    out: Any,
) -> int:
    """The inverse of :func:`ranks_by_lines`, whose arguments these are; for the others see :func:`positions_by_base`."""
    left, at, until = np.empty(256, np.int64), np.empty(256, np.int64), np.empty(256, np.int64)
    n = 0
    for number in range(of_context.shape[0]):
        end = _first_ranks(numbers, of_context[number], n, at, until, left)
        i = (first + number) * block
        last = min(i + block, rows.size * columns.size)
        while i < last:
            row = i // columns.size
            begin = row * columns.size
            stop = min(begin + columns.size, last)
            if rows[row] == 0:
                i = stop
            while i < stop:
                number_of = rows[row] + columns[i - begin]
                if bits.size:
                    number_of += exponents[bits[i] >> shift]
                context = contexts[number_of]
                left[context] -= 1
                if left[context] == 0:
                    out[n] = i
                    n += 1
                    at[context] += 1
                    left[context] = numbers[at[context]] if at[context] < until[context] else _NEVER
                i += 1
        if n != end:
            return number
    return -1
