"""Tables of the entropy coder: how often each token occurs in each context, in 4096ths (spec, section 5.10)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.errors import FormatError
from shira_format.format.compact.bits import BitReader, BitWriter

SCALE = 12
TOTAL = 1 << SCALE
MAX_TOKENS = 256  # from the first to the last of a table
MAX_TOKEN = 1 << 12  # the bound of tokens
MAX_BITS = 61  # of a number
MAX_SPLIT = 7
_KEPT = 3  # bits behind the highest one of a frequency that a table stores


@dataclass(frozen=True)
class Table:
    """One context's frequencies.

    Attributes:
        first: its first token.
        frequencies: int64 ``[n]``, of the tokens from ``first`` on; their sum is 4096.
    """

    first: int
    frequencies: Indices

    @staticmethod
    def of(counts: Array) -> Table:
        """A table for tokens that occur so often, ``counts`` ``[tokens]``, at least one of them."""
        present = np.flatnonzero(counts)
        first, last = int(present[0]), int(present[-1])
        assert last - first < MAX_TOKENS
        some = counts[first : last + 1].astype(np.float64)
        wanted = some * (TOTAL / some.sum())
        stored = np.where(some > 0, _storable(np.maximum(np.rint(wanted), 1).astype(np.int64)), 0)
        while (surplus := int(stored.sum()) - TOTAL) > 0:
            largest = int(np.argmax(stored))
            stored[largest] = _storable(np.array([max(stored[largest] - surplus, stored[largest] - stored[largest] // 8)]))[0]  # fmt: skip
        return Table(first, _completed(stored))

    def write(self, bits: BitWriter) -> None:
        """Append it: what its largest frequency lacks to the sum of 4096 is found again by :func:`_completed`."""
        stored = self.frequencies.copy()
        largest = int(np.argmax(stored))
        stored[largest] = _storable(stored[largest : largest + 1])[0]
        bits.put(self.first, 12)
        bits.put(stored.size - 1, 8)
        for frequency in stored.tolist():
            length = frequency.bit_length()
            bits.put(length, 4)
            if length:
                kept = min(length - 1, _KEPT)
                bits.put(frequency >> (length - 1 - kept) & ((1 << kept) - 1), kept)

    @staticmethod
    def read(bits: BitReader, split: int) -> Table:
        """The next table of a stream.

        Raises:
            FormatError: it has no tokens, too many or such of too large numbers, or its frequencies are more than 4096.
        """
        first, count = bits.take(12), bits.take(8) + 1
        window, at = (
            bits.ahead((4 + _KEPT) * count),
            0,
        )  # one number, since bits taken one by one cost more than decoding
        found = []
        for _ in range(count):
            length = window >> at & 15
            kept = min(length - 1, _KEPT) if length else 0
            at += 4
            found.append((1 << kept | window >> at & ((1 << kept) - 1)) << (length - 1 - kept) if length else 0)
            at += kept
        bits.skip(at)
        stored = np.array(found, np.int64)
        if not 0 < stored.sum() <= TOTAL:
            raise FormatError("coder", f"the frequencies of a table add up to {stored.sum()}")
        if first + count > MAX_TOKEN or ((first + count - 1) >> split) - 1 + split > MAX_BITS:
            raise FormatError("coder", f"a table has the token {first + count - 1}")
        return Table(first, _completed(stored))


def _storable(frequencies: Indices) -> Indices:
    """Each number's four highest bits, the others 0."""
    lengths = np.frexp(frequencies.astype(np.float64))[1]
    dropped = np.maximum(lengths - 1 - _KEPT, 0)
    found: Indices = frequencies >> dropped << dropped
    return found


def _completed(stored: Indices) -> Indices:
    """The frequencies, the largest (of equal ones the first) raised so that they add up to 4096."""
    found = stored.copy()
    found[np.argmax(stored)] += TOTAL - stored.sum()
    return found


@dataclass(frozen=True)
class Tables:
    """The tables of all contexts of a stream.

    Attributes:
        split: bits of a number behind its highest one that its token holds.
        tables: one for each context.
    """

    split: int
    tables: tuple[Table, ...]

    @cached_property
    def firsts(self) -> Indices:
        """Their first tokens, int64 ``[contexts]``."""
        return np.array([table.first for table in self.tables], np.int64)

    @cached_property
    def frequencies(self) -> Indices:
        """int64 ``[contexts, 256]``, by token from the first on."""
        found = np.zeros((len(self.tables), MAX_TOKENS), np.int64)
        for row, table in zip(found, self.tables, strict=True):
            row[: table.frequencies.size] = table.frequencies
        return found

    @cached_property
    def starts(self) -> Indices:
        """int64 ``[contexts, 256]``: the sum of the frequencies before each."""
        return np.cumsum(self.frequencies, axis=1) - self.frequencies

    @cached_property
    def slots(self) -> Array:
        """uint32 ``[contexts, 4096]``: of each of the 4096 places the token from the first on (8 bits), its frequency less 1 (12 bits)
        and how far it is from the token's start (12 bits).
        """
        found = np.empty((len(self.tables), TOTAL), np.uint32)
        for row, frequencies, starts in zip(found, self.frequencies, self.starts, strict=True):
            token = np.repeat(np.arange(MAX_TOKENS), frequencies)
            row[:] = token | (frequencies[token] - 1) << 8 | (np.arange(TOTAL) - starts[token]) << 20
        return found

    @cached_property
    def listed(self) -> list[list[int]]:
        """:attr:`slots` as plain integers."""
        return [row.tolist() for row in self.slots]


def tokens_of(numbers: Indices, split: int) -> tuple[Indices, Indices]:
    """The token of each number, and how many of its lower bits follow.

    Args:
        numbers: int64, at least 0, below 2^61.
        split: see :class:`Tables`.
    """
    lengths = np.frexp(numbers.astype(np.float64))[1].astype(np.int64)
    lengths -= (numbers >> np.maximum(lengths - 1, 0)) == 0  # a number just below a power of two, rounded up
    rest = np.maximum(lengths - 1 - split, 0)
    return (rest << split) + (numbers >> rest), rest
