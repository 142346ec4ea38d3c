"""Values as coded streams: steps from the base's values, and floats on their own (spec, section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.compiled import as_unsigned
from shira_format.errors import FormatError
from shira_format.format.compact import stream as coded_stream
from shira_format.format.compact.bits import BitReader, BitWriter
from shira_format.format.compact.coder import (
    Decoder,
    Numbers,
    decoders,
    encode,
    ended_wrong,
    entropies,
    fitting_splits,
    kernels_for,
    tables_bits,
)
from shira_format.format.compact.contexts import exponent_field, lookup, merged, read_bounds, write_bounds
from shira_format.format.compact.tables import MAX_BITS, MAX_TOKENS, Table, Tables, tokens_of

BLOCK = 13  # bits of a block's size, as our writer chooses it
_SMALLEST, _LARGEST = 4, 20
_SPLIT, _TOKENS = 3, 480  # of steps when their contexts are chosen
_CLASSES = 256  # that may have contexts of their own
_STATE = 1  # what compiled decoders call wrong: the coder's end


def encode_steps(values: Array, base: Array) -> Array | None:
    """The stream of targets, uint8; None if a step is too large.

    Args:
        values: ``[n]`` targets.
        base: ``[n]`` the base's values, in the same dtype.
    """
    if not values.size:
        return np.empty(0, np.uint8)
    new, old = as_unsigned(np.ascontiguousarray(values)), as_unsigned(np.ascontiguousarray(base))
    shift, mask = exponent_field(values.dtype)
    steps = _Steps(new, old, shift, mask)
    counts, flips, most = steps.counted()
    if most >= 1 << (MAX_BITS - 1):
        return None
    _, split, bounds = min((_contexts(counts, split) for split in fitting_splits(most + 1)), key=itemgetter(0))
    coded = encode(steps.listed(lookup(bounds, mask + 1), flips), bounds.size - 1, (split,))
    bits = BitWriter()
    bits.put(coded.tables.split, 3)
    bits.put(BLOCK, 5)
    write_bounds(bits, bounds)
    for table in coded.tables.tables:
        table.write(bits)
    return coded_stream.write(bits, [coded.words], coded.counts.tolist(), [])


@dataclass(frozen=True)
class _Steps:
    """Steps from the base's values ``old`` to ``new``, both flat unsigned integers; where their exponent is."""

    new: Array
    old: Array
    shift: int
    mask: int

    @property
    def _top(self) -> int:
        return 1 << (8 * self.new.dtype.itemsize - 1)

    def counted(self) -> tuple[Array, int, int]:
        """How often each token occurs in each class, ``[classes, tokens]``; how many signs change; the largest distance."""
        if (kernels := kernels_for(self.new.size)) is not None:
            counts = np.zeros((self.mask + 1, _TOKENS), np.int64)
            flips, most = kernels.count_steps(
                self.new, self.old, np.uint64(self._top), self.shift, self.mask, counts, _SPLIT
            )
            return counts, int(flips), int(most)
        distances = np.abs(self._sizes(self.new) - self._sizes(self.old))
        flips, most = int(np.count_nonzero(self._flipped())), int(distances.max())
        if most >= 1 << (MAX_BITS - 1):
            return np.empty((0, 0), np.int64), flips, most
        tokens, _ = tokens_of(distances + 1, _SPLIT)
        counts = np.bincount(self._classes() * _TOKENS + tokens, minlength=(self.mask + 1) * _TOKENS)
        return counts.reshape(-1, _TOKENS), flips, most

    def listed(self, contexts: Array, flips: int) -> Numbers:
        """The numbers that code them; ``contexts`` by class. A number of 0 stands before that of an entry whose sign changes."""
        if (kernels := kernels_for(self.new.size)) is not None:
            upper = self.mask - (np.arange(2 * (self.mask + 1)) & self.mask)
            numbers = np.empty(self.new.size + flips, np.int64)
            rows, tails, widths = (np.empty(numbers.size, np.uint8) for _ in range(3))
            ends = np.empty(_ends(self.new.size).size, np.int64)
            kernels.list_steps(
                self.new, self.old, np.uint64(self._top), self.shift, contexts[upper], numbers, rows, tails, widths,
                1 << BLOCK, ends,
            )  # fmt: skip
            return Numbers(rows, numbers, ends, tails, widths)
        at, steps = np.flatnonzero(self._flipped()), self._sizes(self.new) - self._sizes(self.old)
        of = contexts[self._classes()]
        ends = _ends(self.new.size)
        ends += np.searchsorted(at, ends)
        return Numbers(
            np.insert(of, at, of[at]), np.insert(np.abs(steps) + 1, at, 0), ends,
            np.insert((steps < 0).astype(np.uint8), at, 0), np.insert((steps != 0).astype(np.uint8), at, 0),
        )  # fmt: skip

    def _sizes(self, bits: Array) -> Indices:
        found: Indices = (bits & ~bits.dtype.type(self._top)).astype(np.int64)
        return found

    def _flipped(self) -> Array:
        found: Array = (self.new ^ self.old) & self.new.dtype.type(self._top)
        return found

    def _classes(self) -> Indices:
        found: Indices = self.mask - (self.old.astype(np.int64) >> self.shift & self.mask)
        return found


def _contexts(counts: Array, split: int) -> tuple[float, int, Indices]:
    """The bits that steps take with the best bounds of their contexts, about; the split; and these bounds.

    Args:
        counts: how often each token of :data:`_SPLIT` occurs in each class, ``[classes, tokens]``.
        split: a coarser one, or the same.
    """
    fine = np.arange(_TOKENS)
    lower = np.maximum((fine >> _SPLIT) - 1, 0)  # bits below those that the fine token holds
    numbers = np.where(lower > 0, fine & ((1 << _SPLIT) - 1) | 1 << _SPLIT, fine) << lower
    tokens, rest = tokens_of(numbers, split)
    present = np.flatnonzero(counts.any(axis=1))
    used = np.zeros((present.size, int(tokens.max()) + 1))
    np.add.at(used.T, tokens, counts[present].T)
    # Of float64, which has 2047 classes, some neighbours share a context in any case: the work grows with their square.
    first = np.arange(0, present.size, -(-present.size // _CLASSES))
    used, groups = np.add.reduceat(used, first), present[first]
    used = used[:, np.flatnonzero(used.any(axis=0))[0] : np.flatnonzero(used.any(axis=0))[-1] + 1]
    passed = np.concatenate([np.zeros((1, used.shape[1])), np.cumsum(used, axis=0)])
    costs = np.full((groups.size + 1, groups.size + 1), np.inf)
    for i in range(groups.size):
        inside = passed[i + 1 :] - passed[i]
        costs[i, i + 1 :] = entropies(inside) + tables_bits(inside)
    bounds = merged(groups, costs)
    bounds[-1] = present[-1] + 1
    at = np.searchsorted(groups, bounds[:-1])
    total = float(costs[at, [*at[1:], groups.size]].sum() + counts.sum(axis=0) @ rest)
    return total, split, bounds


def _ends(size: int) -> Indices:
    found: Indices = np.minimum(np.arange(1, -(-size >> BLOCK) + 1, dtype=np.int64) << BLOCK, size)
    return found


def decode_steps(stream: Array, base: Array) -> Array:
    """The targets, in the base's dtype, ``[n]``.

    Args:
        stream: uint8.
        base: ``[n]`` the base's values, whose digest is right.

    Raises:
        FormatError: the stream breaks a rule.
    """
    if not base.size:
        return _nothing(stream, base.dtype)
    bits = BitReader(stream)
    split, size = bits.take(3), _block_size(bits)
    bounds = read_bounds(bits)
    tables = Tables(split, tuple(Table.read(bits, split) for _ in range(bounds.size - 1)))
    lengths, _, words = coded_stream.read(stream, bits.end(), -(-base.size // size))
    shift, mask = exponent_field(base.dtype)
    found = as_unsigned(base.copy())
    exponents = found >> found.dtype.type(shift) & found.dtype.type(mask)
    contexts = lookup(bounds, mask + 1)[::-1][exponents]
    if (out := contexts == bounds.size - 1).any():
        raise FormatError("impossible", f"entry {int(np.argmax(out))} has a base value whose class has no context")
    if (kernels := kernels_for(base.size)) is not None:
        why = np.zeros(1, np.int64)
        top = np.uint64(1 << (8 * found.dtype.itemsize - 1))
        bad = kernels.decode_steps(
            words, np.cumsum(lengths), size, contexts, tables.slots, tables.firsts, split, found, top, why
        )
        if bad >= 0:
            raise ended_wrong(bad) if why[0] == _STATE else _impossible(bad)
    else:
        _decode_steps_plainly(decoders(tables, words, lengths), size, contexts, found)
    return found.view(base.dtype)


def _decode_steps_plainly(blocks: Iterator[Decoder], size: int, contexts: Array, found: Array) -> None:
    top = 1 << (8 * found.dtype.itemsize - 1)
    for block, decoder in enumerate(blocks):
        some = slice(block * size, (block + 1) * size)
        new = []
        for own, context in zip(found[some].tolist(), contexts[some].tolist(), strict=True):
            sign, magnitude = own & top, own & (top - 1)
            if (number := decoder.number(context)) == 0:
                sign ^= top
                if (number := decoder.number(context)) == 0:
                    raise _impossible(block)
            if number > 1:
                magnitude += 1 - number if decoder.bits(1) else number - 1
            if not 0 <= magnitude < top:
                raise _impossible(block)
            new.append(sign | magnitude)
        found[some] = new


def encode_floats(values: Array) -> Array | None:
    """The stream of floats, uint8: their exponents coded, signs and mantissas as they are; None if there are too many exponents."""
    if not values.size:
        return np.empty(0, np.uint8)
    bits_of = as_unsigned(np.ascontiguousarray(values)).astype(np.uint64)
    shift, mask = exponent_field(values.dtype)
    exponents = (bits_of >> np.uint64(shift)).astype(np.int64) & mask
    if int(exponents.max()) - int(exponents.min()) >= MAX_TOKENS:
        return None
    low = bits_of & np.uint64((1 << shift) - 1)
    tails = bits_of >> np.uint64(8 * values.dtype.itemsize - 1) << np.uint64(shift) | low
    widths = np.full(values.size, shift + 1, np.uint8)
    given = Numbers(np.zeros(values.size, np.uint8), exponents, _ends(values.size), tails, widths)
    split = 7  # so that exponents up to 255 are tokens
    coded = encode(given, 1, (split,))
    bits = BitWriter()
    bits.put(split, 3)
    bits.put(BLOCK, 5)
    coded.tables.tables[0].write(bits)
    return coded_stream.write(bits, [coded.words], coded.counts.tolist(), [])


def decode_floats(stream: Array, dtype: np.dtype[Any], count: int) -> Array:
    """``count`` floats, ``[count]``.

    Raises:
        FormatError: the stream breaks a rule; memory stays in proportion to it.
    """
    if not count:
        return _nothing(stream, dtype)
    bits = BitReader(stream)
    split, size = bits.take(3), _block_size(bits)
    tables = Tables(split, (Table.read(bits, split),))
    lengths, _, words = coded_stream.read(stream, bits.end(), -(-count // size))
    shift, mask = exponent_field(dtype)
    if count * (shift + 1) > 16 * words.size:  # before anything of this size is allocated
        raise FormatError("coder-state", f"{words.size} words are too few for {count} values")
    found = np.empty(count, np.dtype(f"u{dtype.itemsize}"))
    if (kernels := kernels_for(count)) is not None:
        why = np.zeros(1, np.int64)
        bad = kernels.decode_floats(
            words,
            np.cumsum(lengths),
            size,
            tables.slots[0],
            int(tables.firsts[0]),
            split,
            mask + 1,
            shift,
            found,
            why,
        )
        if bad >= 0:
            raise ended_wrong(bad) if why[0] == _STATE else _impossible(bad)
    else:
        _decode_floats_plainly(decoders(tables, words, lengths), size, shift, mask, found)
    return found.view(dtype)


def _decode_floats_plainly(blocks: Iterator[Decoder], size: int, shift: int, mask: int, found: Array) -> None:
    for block, decoder in enumerate(blocks):
        some = slice(block * size, (block + 1) * size)
        new = []
        for _ in range(found[some].size):
            exponent, tail = decoder.number(0), decoder.bits(shift + 1)
            if exponent > mask:
                raise _impossible(block)
            sign = (tail >> shift) * (mask + 1)
            new.append((sign | exponent) << shift | tail & ((1 << shift) - 1))
        found[some] = new


def _block_size(bits: BitReader) -> int:
    if not _SMALLEST <= (power := bits.take(5)) <= _LARGEST:
        raise FormatError("coder", f"blocks of 2^{power} values")
    return 1 << power


def _nothing(stream: Array, dtype: np.dtype[Any]) -> Array:
    if stream.size:
        raise FormatError("stream-trailing", f"{stream.size} bytes for no values")
    return np.empty(0, dtype)


def _impossible(block: int) -> FormatError:
    return FormatError("impossible", f"block {block} has a value that no float of the dtype has")
