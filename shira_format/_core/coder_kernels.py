"""The inner loops of the entropy coder (:mod:`shira_format.format.compact`) that numba compiles; imported only if it is installed.

Decoders return -1, or the number of the block in which something is wrong; which rule that breaks, the caller knows by ``why``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shira_format._core.kernels import _compiled

_LOW = 1 << 16
_LENGTHS = np.array([value.bit_length() for value in range(256)], np.uint8)
_STATE, _COUNT, _VALUE = 1, 2, 3  # what is wrong: the coder's end, the number of entries, a value


@_compiled
def _word(words: Any, at: Any, stop: Any) -> Any:
    return np.int64(words[at]) if at < stop else np.int64(0)


@_compiled
def _number(words: Any, at: Any, stop: Any, x: Any, slots: Any, first: Any, split: Any) -> Any:
    """The next number, where the words go on, and the state."""
    slot = np.int64(slots[x & 4095])
    x = (((slot >> 8) & 0xFFF) + 1) * (x >> 12) + (slot >> 20)
    if x < _LOW:
        x = x << 16 | _word(words, at, stop)
        at += 1
    token = first + (slot & 0xFF)
    rest = (token >> split) - 1
    if rest <= 0:
        return token, at, x
    high = token & ((1 << split) - 1) | 1 << split
    low, at, x = _bits(words, at, stop, x, rest)
    return high << rest | np.int64(low), at, x


@_compiled
def _bits(words: Any, at: Any, stop: Any, x: Any, width: Any) -> Any:
    """The next ``width`` bits, where the words go on, and the state."""
    found = np.uint64(0)
    place = 0
    while place < width:
        some = min(width - place, 16)
        found |= np.uint64(x & ((1 << some) - 1)) << np.uint64(place)
        x >>= some
        if x < _LOW:
            x = x << 16 | _word(words, at, stop)
            at += 1
        place += 16
    return found, at, x


@_compiled
def _start(words: Any, at: Any, stop: Any) -> Any:
    return _word(words, at, stop) | _word(words, at + 1, stop) << 16


@_compiled
def _token(number: Any, split: Any) -> Any:
    """A number's token, and how many of its lower bits follow."""
    length, high = 0, number
    while high >= 256:
        high >>= 8
        length += 8
    rest = length + np.int64(_LENGTHS[high]) - 1 - split
    rest = max(rest, np.int64(0))
    return (rest << split) + (number >> rest), rest


@_compiled
def histogram(numbers: Any, contexts: Any, split: int, counts: Any) -> int:
    """Count the tokens of each context in ``counts``, int64 ``[contexts, tokens]``; returns how many bits follow them all."""
    bits = 0
    for i in range(numbers.size):
        token, rest = _token(numbers[i], split)
        counts[contexts[i], token] += 1
        bits += rest
    return bits


@_compiled
def _put(words: Any, at: Any, x: Any, value: Any, width: Any) -> Any:
    """Code the lowest ``width`` bits of a value as they are; returns the state and where the words begin."""
    place = (width + 15) // 16 * 16
    while place > 0:
        place -= 16
        some = min(width - place, 16)
        if x >= np.int64(1) << (32 - some):
            at -= 1
            words[at] = x & 0xFFFF
            x >>= 16
        x = x << some | np.int64((value >> np.uint64(place)) & np.uint64((1 << some) - 1))
    return x, at


@_compiled
def encode(
    numbers: Any,
    contexts: Any,
    tails: Any,
    tail_bits: Any,
    block_ends: Any,
    firsts: Any,
    frequencies: Any,
    starts: Any,
    split: int,
    words: Any,
    counts: Any,
) -> int:
    """Fill ``words`` with the blocks and ``counts`` with their numbers of words; returns how many, or -1 if there is no room.

    A block is written from its end backwards, at the end of ``words``, and then moved to its place. ``tails`` may be empty.
    """
    used = 0
    begin: Any = 0
    for block in range(block_ends.size):
        at = words.size
        x: Any = _LOW
        for i in range(block_ends[block] - 1, begin - 1, -1):
            if at - used < 16:
                return -1
            token, rest = _token(numbers[i], split)
            if tails.size:
                x, at = _put(words, at, x, np.uint64(tails[i]), np.int64(tail_bits[i]))
            if rest:
                x, at = _put(words, at, x, np.uint64(numbers[i]), rest)
            context = contexts[i]
            size = frequencies[context, token - firsts[context]]
            if x >= size << 20:
                at -= 1
                words[at] = x & 0xFFFF
                x >>= 16
            x = (x // size << 12) + x % size + starts[context, token - firsts[context]]
        begin = block_ends[block]
        if at - used < 2:
            return -1
        at -= 2
        words[at] = x & 0xFFFF
        words[at + 1] = x >> 16
        count = words.size - at
        for k in range(count):
            words[used + k] = words[at + k]
        counts[block] = count
        used += count
    return used


@_compiled
def count_steps(new: Any, old: Any, top: Any, shift: int, mask: int, counts: Any, token_split: int) -> Any:
    """Count the tokens of the steps from ``old`` to ``new``, bits of floats, in ``counts``, int64 ``[classes, tokens]``.

    Returns:
        How many signs differ, and the largest distance.
    """
    flips, most = 0, np.int64(0)
    magnitude = top - np.uint64(1)
    for i in range(new.size):
        a, b = np.uint64(new[i]), np.uint64(old[i])
        distance = abs(np.int64(a & magnitude) - np.int64(b & magnitude))
        most = max(most, distance)
        flips += (a ^ b) & top != 0
        if distance < 1 << 60:  # of one beyond, the caller hears by the largest
            token, _ = _token(distance + 1, token_split)
            counts[mask - (np.int64(b >> np.uint64(shift)) & mask), token] += 1
    return flips, most


@_compiled
def list_steps(
    new: Any,
    old: Any,
    top: Any,
    shift: int,
    contexts: Any,
    numbers: Any,
    rows: Any,
    tails: Any,
    tail_bits: Any,
    block: int,
    ends: Any,
) -> None:
    """The numbers that code the steps from ``old`` to ``new``, their contexts and tails, and where each block's end.

    Args:
        new: bits of the targets.
        old: bits of the base's values.
        top: the bit of the sign.
        shift: of the exponent.
        contexts: uint8, by the bits from the exponent on.
        numbers: int64, filled; likewise the next three.
        rows: uint8: contexts.
        tails: uint8.
        tail_bits: uint8.
        block: values of a block.
        ends: int64, filled.
    """
    at = 0
    magnitude = top - np.uint64(1)
    for i in range(new.size):
        a, b = np.uint64(new[i]), np.uint64(old[i])
        step = np.int64(a & magnitude) - np.int64(b & magnitude)
        context = contexts[np.int64(b >> np.uint64(shift))]
        if (a ^ b) & top:  # a number of 0 stands before that of an entry whose sign changes
            numbers[at], rows[at], tails[at], tail_bits[at] = 0, context, 0, 0
            at += 1
        numbers[at], rows[at], tails[at], tail_bits[at] = abs(step) + 1, context, step < 0, step != 0
        at += 1
        if (i + 1) % block == 0 or i + 1 == new.size:
            ends[i // block] = at


@_compiled
def decode_ranks(
    words: Any, ends: Any, counts: Any, slots: Any, firsts: Any, split: int, found: Any, of_context: Any, why: Any
) -> int:
    """For each block and context the numbers up to a 0, which ends the context; ``counts`` says how many a block has.

    Args:
        words: of all blocks.
        ends: where the words of each block end.
        counts: numbers of each block, zeros not counted.
        slots: see :attr:`Tables.slots`.
        firsts: see :attr:`Tables.firsts`.
        split: see :class:`Tables`.
        found: int64, filled with the numbers.
        of_context: int64 ``[blocks, contexts]``, filled with their counts.
        why: int64 ``[1]``: filled if something is wrong.
    """
    at = done = 0
    for block in range(ends.size):
        stop = ends[block]
        x = _start(words, at, stop)
        if x < _LOW:
            why[0] = _STATE
            return block
        at += 2
        last = done + counts[block]
        for context in range(firsts.size):
            row, first, before = slots[context], firsts[context], done
            while True:
                number, at, x = _number(words, at, stop, x, row, first, split)
                if number == 0:
                    break
                if done == last:
                    why[0] = _COUNT
                    return block
                found[done] = number
                done += 1
            of_context[block, context] = done - before
        if done != last:
            why[0] = _COUNT
            return block
        if x != _LOW or at != stop:
            why[0] = _STATE
            return block
    return -1


@_compiled
def decode_numbers(
    words: Any, ends: Any, size: int, contexts: Any, slots: Any, firsts: Any, split: int, found: Any
) -> int:
    """Blocks of ``size`` numbers each, in known contexts, to ``found``."""
    at = 0
    for block in range(ends.size):
        stop = ends[block]
        x = _start(words, at, stop)
        if x < _LOW:
            return block
        at += 2
        for i in range(block * size, min((block + 1) * size, found.size)):
            context = contexts[i]
            found[i], at, x = _number(words, at, stop, x, slots[context], firsts[context], split)
        if x != _LOW or at != stop:
            return block
    return -1


@_compiled
def decode_steps(
    words: Any,
    ends: Any,
    size: int,
    contexts: Any,
    slots: Any,
    firsts: Any,
    split: int,
    values: Any,
    top: Any,
    why: Any,
) -> int:
    """Blocks of ``size`` values each: ``values``, the base's bits, become the targets'; ``top`` is the bit of the sign."""
    at = i = 0
    for block in range(ends.size):
        stop = ends[block]
        x = _start(words, at, stop)
        if x < _LOW:
            why[0] = _STATE
            return block
        at += 2
        for i in range(block * size, min((block + 1) * size, values.size)):
            context = contexts[i]
            own = np.uint64(values[i])
            sign, magnitude = own & top, np.int64(own & (top - np.uint64(1)))
            number, at, x = _number(words, at, stop, x, slots[context], firsts[context], split)
            if number == 0:
                sign ^= top
                number, at, x = _number(words, at, stop, x, slots[context], firsts[context], split)
                if number == 0:
                    why[0] = _VALUE
                    return block
            if number > 1:
                down, at, x = _bits(words, at, stop, x, 1)
                magnitude += (1 - number) if down else (number - 1)
            if magnitude < 0 or np.uint64(magnitude) >= top:
                why[0] = _VALUE
                return block
            values[i] = sign | np.uint64(magnitude)
        if x != _LOW or at != stop:
            why[0] = _STATE
            return block
    return -1


@_compiled
def decode_floats(
    words: Any,
    ends: Any,
    size: int,
    slots: Any,
    first: int,
    split: int,
    exponents: int,
    mantissa: int,
    values: Any,
    why: Any,
) -> int:
    """Blocks of ``size`` values each: the exponent, of which there are ``exponents``, and then sign and mantissa as they are."""
    at = 0
    for block in range(ends.size):
        stop = ends[block]
        x = _start(words, at, stop)
        if x < _LOW:
            why[0] = _STATE
            return block
        at += 2
        for i in range(block * size, min((block + 1) * size, values.size)):
            exponent, at, x = _number(words, at, stop, x, slots, first, split)
            tail, at, x = _bits(words, at, stop, x, mantissa + 1)
            if exponent >= exponents:
                why[0] = _VALUE
                return block
            low = tail & ((np.uint64(1) << np.uint64(mantissa)) - np.uint64(1))
            sign = (tail >> np.uint64(mantissa)) * np.uint64(exponents)
            values[i] = (sign | np.uint64(exponent)) << np.uint64(mantissa) | low
        if x != _LOW or at != stop:
            why[0] = _STATE
            return block
    return -1
