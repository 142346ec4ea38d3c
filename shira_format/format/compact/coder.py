"""The entropy coder of the compact profile: rANS with static tables, in blocks that decode apart (spec, section 5.10).

After J. Duda, "Asymmetric numeral systems" (arXiv 1311.2540), with a state of 32 bits that is refilled by words of 16. Inner loops are
compiled if numba is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core import compiled
from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError
from shira_format.format.compact.tables import MAX_TOKEN, MAX_TOKENS, SCALE, TOTAL, Table, Tables, tokens_of

LOW = 1 << 16  # the state is in [LOW, LOW << 16) between two steps
_SPLITS = (0, 1, 2, 3)
_SAMPLE = 1 << 15
# From so many numbers on numba is loaded, which takes as long as plain Python needs for them.
_MANY = 1 << 17
_TABLE_BITS, _TOKEN_BITS = 24, 6  # that a table takes in a file, about
# And more exactly: its front, the place of each token, and each that occurs.
_FRONT_BITS, _PLACE_BITS, _KEPT_BITS = 32, 4, 2.5

Words = npt.NDArray[np.uint16]


def _none() -> Array:
    return np.empty(0, np.uint8)


@dataclass(frozen=True)
class Numbers:
    """What is coded: numbers in contexts, each with a tail of bits as they are, or none of them with one.

    Attributes:
        contexts: uint8 ``[n]``.
        numbers: int64 ``[n]``, at least 0, below 2^61.
        ends: int64 ``[blocks]``: where each block ends.
        tails: unsigned integers ``[n]``: the bits that follow; empty: none.
        tail_bits: uint8 ``[n]``: how many; empty likewise.
    """

    contexts: Array
    numbers: Indices
    ends: Indices
    tails: Array = field(default_factory=_none)
    tail_bits: Array = field(default_factory=_none)


@dataclass(frozen=True)
class Coded:
    """Numbers as coded.

    Attributes:
        tables: the contexts' tables.
        words: uint16, the blocks one after the other.
        counts: int64 ``[blocks]``: words of each.
    """

    tables: Tables
    words: Words
    counts: Indices


def encode(given: Numbers, contexts: int, splits: Sequence[int] = _SPLITS) -> Coded:
    """Code numbers; every context has one at least."""
    split = _best_split(given, contexts, splits)
    if (kernels := kernels_for(given.numbers.size)) is not None:
        return _encode_compiled(kernels, given, contexts, split)
    tokens, rest = tokens_of(given.numbers, split)
    tables = Tables(split, tuple(map(Table.of, _histograms(given.contexts, tokens, contexts))))
    rows = given.contexts.astype(np.intp)
    places = tokens - tables.firsts[rows]
    steps = _steps(given, tables.frequencies[rows, places], tables.starts[rows, places], rest)
    return Coded(tables, *_encode_plainly(steps, steps.ends))


def _best_split(given: Numbers, contexts: int, splits: Sequence[int]) -> int:
    if len(splits) == 1:
        return splits[0]
    splits = fitting_splits(int(given.numbers.max()))
    step = -(-given.numbers.size // _SAMPLE)
    numbers, rows = np.ascontiguousarray(given.numbers[::step]), np.ascontiguousarray(given.contexts[::step])
    kernels = kernels_for(given.numbers.size)

    def cost(split: int) -> float:
        if kernels is not None:
            found = np.zeros((contexts, MAX_TOKEN), np.int64)
            rest = kernels.histogram(numbers, rows, split, found)
        else:
            tokens, widths = tokens_of(numbers, split)
            found, rest = _histograms(rows, tokens, contexts), int(widths.sum())
        return float(step * (entropy_bits(found) + rest) + _TOKEN_BITS * np.count_nonzero(found))

    return min(splits, key=cost)


def fitting_splits(largest: int) -> list[int]:
    """Those with which a table holds the tokens of all numbers up to the largest: of float64 not all."""
    return [split for split in _SPLITS if tokens_of(np.array([largest]), split)[0][0] < MAX_TOKENS]


def _histograms(contexts: Array, tokens: Indices, count: int) -> Indices:
    """How often each token occurs in each context, int64 ``[count, tokens]``."""
    width = int(tokens.max(initial=0)) + 1
    return np.bincount(contexts.astype(np.int64) * width + tokens, minlength=count * width).reshape(count, width)


def entropy_bits(counts: Array) -> float:
    """Bits that tokens of these counts take, each row by its own frequencies."""
    totals = counts.sum(axis=-1, dtype=np.float64)
    some = counts[counts > 0].astype(np.float64)
    totals = totals[totals > 0]
    return float(totals @ np.log2(totals) - some @ np.log2(some))


def entropies(counts: Array) -> Array:
    """Likewise of each row, float64 ``[rows]``; every row has a token."""
    totals = counts.sum(axis=-1, dtype=np.float64)
    some = counts.astype(np.float64)
    found: Array = totals * np.log2(totals) - np.einsum("ij,ij->i", some, np.log2(np.maximum(some, 1)))
    return found


def table_bits(tokens: float) -> float:
    """About how many bits a table of so many tokens takes in a file."""
    return _TABLE_BITS + _TOKEN_BITS * tokens


def tables_bits(counts: Array) -> Array:
    """About how many bits each row's table takes with its bounds, float64 ``[rows]``: tokens between others take bits, too."""
    some = counts > 0
    spans = some.shape[1] - np.argmax(some, axis=1) - np.argmax(some[:, ::-1], axis=1)
    found: Array = np.where(
        some.any(axis=1), _FRONT_BITS + _PLACE_BITS * spans + _KEPT_BITS * some.sum(axis=1), 0.0
    )
    return found


def kernels_for(numbers: int) -> Any:
    """:mod:`shira_format._core.coder_kernels`, if numba is loaded or worth loading for so many numbers; else None."""
    if not is_compiled(numbers):
        return None
    from shira_format._core import coder_kernels

    return coder_kernels


def is_compiled(numbers: int) -> bool:
    """Whether numba is loaded, which it is here if so many numbers are worth it."""
    if numbers >= _MANY:
        compiled.load()
    return compiled.loaded() is not None


def _encode_compiled(kernels: Any, given: Numbers, contexts: int, split: int) -> Coded:
    histograms = np.zeros((contexts, MAX_TOKEN), np.int64)
    bits = kernels.histogram(given.numbers, given.contexts, split, histograms)
    tables = Tables(split, tuple(map(Table.of, histograms)))
    bits += entropy_bits(histograms) + int(given.tail_bits.sum(dtype=np.int64))
    room = int(bits / 16 * 1.05) + 8 * given.ends.size + 64
    counts = np.empty(given.ends.size, np.int64)
    while True:
        words = np.empty(room, np.uint16)
        used = kernels.encode(
            given.numbers, given.contexts, given.tails, given.tail_bits, given.ends, tables.firsts, tables.frequencies,
            tables.starts, split, words, counts,
        )  # fmt: skip
        if used >= 0:
            return Coded(tables, words[:used], counts)
        room *= 2


@dataclass(frozen=True)
class _Steps:
    """Steps of the coder: in each a range of ``sizes`` from ``starts`` on, of ``1 << scales``; where each block's steps end."""

    starts: Indices
    sizes: Indices
    scales: Indices
    ends: Indices


def _steps(given: Numbers, frequencies: Indices, starts: Indices, rest: Indices) -> _Steps:
    """The steps of all blocks in the order of decoding: for each number its token, its lower bits and its tail by 16 each."""
    tails, tail_bits = np.zeros(given.numbers.size, np.uint64), np.zeros(given.numbers.size, np.int64)
    if given.tails.size:
        tails[:], tail_bits[:] = given.tails, given.tail_bits
    more, further = -(-rest // 16), -(-tail_bits // 16)
    passed = np.append(0, np.cumsum(1 + more + further))
    first = passed[:-1]
    starts_of, sizes, scales = (np.empty(passed[-1], np.int64) for _ in range(3))
    found = _Steps(starts_of, sizes, scales, passed[given.ends])
    found.starts[first], found.sizes[first], found.scales[first] = starts, frequencies, SCALE
    for bits, counts, after, values in (
        (rest, more, 1 + first, given.numbers.astype(np.uint64)),
        (tail_bits, further, 1 + first + more, tails),
    ):
        for place in range(int(counts.max(initial=0))):
            some = np.flatnonzero(counts > place)
            at, width = after[some] + place, np.minimum(bits[some] - 16 * place, 16)
            low = values[some] >> np.uint64(16 * place)
            found.starts[at] = low & ((np.uint64(1) << width.astype(np.uint64)) - np.uint64(1))
            found.sizes[at], found.scales[at] = 1, width
    return found


def _encode_plainly(steps: _Steps, ends: Indices) -> tuple[Words, Indices]:
    """The blocks, the last step of each first."""
    starts, sizes, scales = steps.starts.tolist(), steps.sizes.tolist(), steps.scales.tolist()
    words: list[int] = []  # of the last block first, and of each the last one first
    counts: list[int] = []
    at = len(starts)
    for begin in [*ends[-2::-1].tolist(), 0]:
        x, before = LOW, len(words)
        for step in range(at - 1, begin - 1, -1):
            size, scale = sizes[step], scales[step]
            if x >= size << (32 - scale):
                words.append(x & 0xFFFF)
                x >>= 16
            x = (x // size << scale) + x % size + starts[step]
        words += [x >> 16, x & 0xFFFF]
        counts.append(len(words) - before)
        at = begin
    return np.array(words[::-1], np.uint16), np.array(counts[::-1], np.int64)


class Decoder:
    """Decodes one block, step by step."""

    def __init__(self, tables: Tables, words: Words) -> None:
        """Args: ``words``: those of the block, two at least."""
        self._tables = tables
        self._words: list[int] = words.tolist()
        self._state: int = self._words[0] | self._words[1] << 16
        self._at = 2

    def number(self, context: int) -> int:
        """The next number, in a context."""
        x, split = self._state, self._tables.split
        slot = self._tables.listed[context][x & (TOTAL - 1)]
        self._advance(((slot >> 8 & 0xFFF) + 1) * (x >> SCALE) + (slot >> 20))
        token = self._tables.tables[context].first + (slot & 0xFF)
        rest = (token >> split) - 1
        if rest <= 0:
            return token
        return (token & ((1 << split) - 1) | 1 << split) << rest | self.bits(rest)

    def bits(self, width: int) -> int:
        """The next bits as they are."""
        found = 0
        for place in range(0, width, 16):
            some = min(width - place, 16)
            found |= (self._state & ((1 << some) - 1)) << place
            self._advance(self._state >> some)
        return found

    @property
    def can_begin(self) -> bool:
        """Whether the state is one that a step can leave."""
        return self._state >= LOW

    @property
    def has_ended(self) -> bool:
        """Whether the state and the words are at their end."""
        return self._state == LOW and self._at == len(self._words)

    def _advance(self, x: int) -> None:
        if x < LOW:
            x = x << 16 | (self._words[self._at] if self._at < len(self._words) else 0)
            self._at += 1
        self._state = x


def decoders(tables: Tables, words: Words, lengths: Indices) -> Iterator[Decoder]:
    """A decoder of each block; raises FormatError if its state cannot be, or is not at its end when the next one is asked for."""
    ends = np.cumsum(lengths).tolist()
    for block, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True)):
        decoder = Decoder(tables, words[end - length : end])
        if not decoder.can_begin:
            raise ended_wrong(block)
        yield decoder
        if not decoder.has_ended:
            raise ended_wrong(block)


def ended_wrong(block: int) -> FormatError:
    """The error for a block whose coder does not begin or end as it should."""
    return FormatError(
        "coder-state", f"block {block} does not begin and end in the state and at the word that it should"
    )


def decode_numbers(tables: Tables, words: Words, lengths: Indices, size: int, contexts: Array) -> Indices:
    """Numbers in known contexts, int64 ``[n]``, ``size`` of them in a block.

    Raises:
        FormatError: a block does not end where it should.
    """
    found = np.empty(contexts.size, np.int64)
    if (kernels := kernels_for(contexts.size)) is not None:
        bad = kernels.decode_numbers(
            words, np.cumsum(lengths), size, contexts, tables.slots, tables.firsts, tables.split, found
        )
        if bad >= 0:
            raise ended_wrong(bad)
        return found
    for block, decoder in enumerate(decoders(tables, words, lengths)):
        some = slice(block * size, (block + 1) * size)
        found[some] = [decoder.number(context) for context in contexts[some].tolist()]
    return found
