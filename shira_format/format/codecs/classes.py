"""``classes``: ranks among the elements that are about as likely to be entries, entropy coded (spec, section 5.9).

How likely that is, an element's class tells: the exponent of the base's value (a weight that is small in magnitude shows smaller
changes), how many entries its row and its column have, or both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices, distinct
from shira_format._core.compiled import as_unsigned
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded, IndexCodec, IndexRange, Streams, cut
from shira_format.format.compact import stream as coded_stream
from shira_format.format.compact.bits import BitReader, BitWriter
from shira_format.format.compact.coder import (
    Coded,
    Numbers,
    Words,
    decode_numbers,
    decoders,
    encode,
    ended_wrong,
    entropy_bits,
    is_compiled,
    kernels_for,
    table_bits,
)
from shira_format.format.compact.contexts import exponent_field, lookup, merged, read_bounds, write_bounds
from shira_format.format.compact.tables import Table, Tables
from shira_format.format.fields import flag
from shira_format.tensors import matrix_shape, numel

MAX_LINES = 1 << 24  # rows and columns together
MAX_BLOCK, MAX_SCANNED = 45, 20  # bits of a block's size, and of one whose elements are looked at
_ENTRIES = 1 << 13  # of a block, about
_SMALLEST = 12
_LINES = 1 << 12  # numbers of rows and columns of a block
MAX_LINE = 63  # of these
_NONE = 4096  # a column's number in place of 0: no class number reaches it
_LOOKUP = 2 * _NONE + 2048
_COUNTED = 14  # tokens of an ordinary table of ranks
_CHUNK, _CHUNKS = 1 << 12, 64


def _nothing() -> Indices:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Terms:
    """What class numbers are sums of.

    Attributes:
        bits: the base's, flat unsigned integers; empty: exponents count as 0.
        shift: of the exponent in the bits.
        mask: of the exponent, after that.
        rows: int64, the number of each row, 0 for one without entries; empty: there are neither rows nor columns.
        columns: likewise of the columns, with ``_NONE`` for 0.
    """

    bits: Array
    shift: int = 0
    mask: int = 0
    rows: Indices = field(default_factory=_nothing)
    columns: Indices = field(default_factory=_nothing)

    def of(self, at: Indices) -> Indices:
        """The class numbers of elements, int64; ``_NONE`` or more for those in rows or columns without entries."""
        found = np.zeros(at.size, np.int64)
        if self.bits.size:
            found += self.mask - (self.bits[at].astype(np.int64) >> self.shift & self.mask)
        if self.rows.size:
            row, column = np.divmod(at, self.columns.size)
            found += np.where(self.rows[row] > 0, self.rows[row], _NONE) + self.columns[column]
        return found

    def with_lines(self, rows: Indices, columns: Indices) -> Terms:
        """These terms with the numbers of rows and columns, 0 for those without entries."""
        return replace(self, rows=rows, columns=np.where(columns > 0, columns, _NONE))

    def scan(self, what: str, contexts: Array, *arguments: Any) -> Any:
        """Run a compiled loop over elements, whose contexts are looked up in ``contexts`` by class number."""
        kernels = _kernels()
        upper = self.mask - (np.arange(2 * (self.mask + 1)) & self.mask)  # of the bits of sign and exponent
        if self.rows.size:
            lines = self.bits, self.shift, upper, self.rows, self.columns, contexts
            return getattr(kernels, f"{what}_by_lines")(*lines, *arguments)
        return getattr(kernels, f"{what}_by_base")(self.bits, self.shift, contexts[upper], *arguments)

    @property
    def scans(self) -> bool:
        """Whether elements have to be looked at to find the one of a rank."""
        return bool(self.bits.size or self.rows.size)


def of_base(base: Array) -> Terms:
    """Class numbers from the exponents of a flat weight."""
    return Terms(as_unsigned(base), *exponent_field(base.dtype))


class Classes(IndexCodec):
    """For masks of rows and columns that have more entries than others, and for steps of training on a known base."""

    name = "classes"
    feature = "compact"

    def check_params(self, params: Mapping[str, Any], tensor: str) -> None:
        flag(params, "base", tensor)

    def needs_base(self, params: Mapping[str, Any]) -> bool:
        return bool(params.get("base", False))

    def streams(self, params: Mapping[str, Any], nnz: int) -> Streams:
        return {"indices": ("U8", None)}

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        return None  # it is for the compact profile: see encode_classes

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        return encode_classes(indices, shape)

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        assert stored.stream is not None
        if nnz == 0:
            if stored.stream.size:
                raise FormatError("stream-trailing", f"{stored.stream.size} bytes for no entries")
            return np.empty(0, np.int64)
        front = _read(stored.stream, shape, nnz, base)
        return _indices(front, slice(0, front.entries.size))

    def decode_range(
        self, stored: Encoded, shape: tuple[int, ...], nnz: int, start: int, stop: int
    ) -> IndexRange | None:
        if self.needs_base(stored.params) or nnz == 0:
            return None
        assert stored.stream is not None
        front = _read(stored.stream, shape, nnz, None)
        some = slice(start >> front.block, (max(stop, start + 1) - 1 >> front.block) + 1)
        indices = _indices(front, some)
        return cut(indices, start, stop, before=int(front.entries[: some.start].sum()))


# Reading


@dataclass(frozen=True)
class _Front:
    """A checked stream; the words of its blocks are not decoded yet."""

    terms: Terms
    size: int  # elements of the tensor
    block: int  # bits of a block's size
    bounds: Indices
    tables: Tables
    lengths: Indices  # words of each block
    entries: Indices  # of each block
    words: Words


def _read(stream: Array, shape: tuple[int, ...], nnz: int, base: Array | None) -> _Front:
    bits, size = BitReader(stream), numel(shape)
    split, block, has_lines = bits.take(3), bits.take(6), bits.take(1)
    if not _SMALLEST <= block <= (MAX_BLOCK if base is None and not has_lines else MAX_SCANNED):
        raise FormatError("coder", f"blocks of 2^{block} elements")
    rows, columns = matrix_shape(shape)
    if has_lines and rows + columns > MAX_LINES:
        raise FormatError("coder", f"numbers of {rows} rows and {columns} columns")
    bounds = read_bounds(bits)
    line_tables = Tables(split, tuple(Table.read(bits, split) for _ in range(2 * has_lines)))
    tables = Tables(split, tuple(Table.read(bits, split) for _ in range(bounds.size - 1)))
    blocks, line_blocks = _parts(size, 1 << block), _parts(rows + columns, _LINES) if has_lines else 0
    lengths, entries, words = coded_stream.read(stream, bits.end(), line_blocks + blocks, blocks)
    if (found := int(entries.sum())) != nnz:
        raise FormatError("count-mismatch", f"the blocks have {found} entries, the tensor {nnz}")
    terms = Terms(np.empty(0, np.uint8)) if base is None else of_base(base)
    if has_lines:
        ahead = int(lengths[:line_blocks].sum())
        numbers = _line_numbers(line_tables, words[:ahead], lengths[:line_blocks], rows, columns)
        terms, words, lengths = terms.with_lines(*numbers), words[ahead:], lengths[line_blocks:]
    return _Front(terms, size, block, bounds, tables, lengths, entries, words)


def _parts(size: int, step: int) -> int:
    return -(-size // step)


def _line_numbers(
    tables: Tables, words: Words, lengths: Indices, rows: int, columns: int
) -> tuple[Indices, Indices]:
    contexts = np.repeat(np.array([0, 1], np.uint8), [rows, columns])
    found = decode_numbers(tables, words, lengths, _LINES, contexts)
    if int(found.max(initial=0)) > MAX_LINE:
        raise FormatError("coder", f"a row or column has the number {found.max()}")
    return found[:rows], found[rows:]


def _indices(front: _Front, some: slice) -> Indices:
    """The entries of some of the blocks."""
    starts = np.cumsum(front.lengths) - front.lengths
    lengths, entries = front.lengths[some], front.entries[some]
    if not lengths.size:
        return np.empty(0, np.int64)
    words = front.words[int(starts[some][0]) : int(starts[some][-1] + lengths[-1])]
    numbers, of_context = _ranks(front.tables, words, lengths, entries)
    if not front.terms.scans:
        if float(np.sum(numbers, dtype=np.float64)) > 2.0 * front.size + 2:  # before the sum could overflow
            raise FormatError("impossible", "a rank leads out of its block")
        found = np.cumsum(numbers)
        passed = np.cumsum(entries) - entries  # where each block begins
        before = np.repeat(np.where(passed > 0, found[passed - 1], 0) if found.size else passed, entries)
        begins = np.repeat((np.arange(entries.size) + some.start) << front.block, entries)
        found += begins - before - 1
        ends = np.minimum(begins + (1 << front.block), front.size)
        if (found >= ends).any():
            raise FormatError("impossible", "a rank leads out of its block")
        return found
    return _scanned(front, numbers, of_context, some.start)


def _ranks(tables: Tables, words: Words, lengths: Indices, entries: Indices) -> tuple[Indices, Indices]:
    """The ranks of some blocks by context, and how many each context has, int64 ``[blocks, contexts]``."""
    contexts = len(tables.tables)
    found = np.empty(int(entries.sum()), np.int64)
    of_context = np.zeros((entries.size, contexts), np.int64)
    if (kernels := kernels_for(found.size)) is not None:
        why = np.zeros(1, np.int64)
        bad = kernels.decode_ranks(
            words, np.cumsum(lengths), entries, tables.slots, tables.firsts, tables.split, found, of_context, why
        )
        if bad >= 0:
            raise ended_wrong(bad) if why[0] == 1 else _miscounted(bad)
        return found, of_context
    done = 0
    for block, decoder in enumerate(decoders(tables, words, lengths)):
        numbers: list[int] = []
        for context in range(contexts):
            before = len(numbers)
            while number := decoder.number(context):
                numbers.append(number)
                if len(numbers) > entries[block]:
                    raise _miscounted(block)
            of_context[block, context] = len(numbers) - before
        if len(numbers) != entries[block]:
            raise _miscounted(block)
        found[done : done + len(numbers)] = numbers
        done += len(numbers)
    return found, of_context


def _miscounted(block: int) -> FormatError:
    return FormatError("count-mismatch", f"block {block} has another number of entries than its count says")


def _scanned(front: _Front, numbers: Indices, of_context: Indices, first: int) -> Indices:
    """The entries of blocks from the ``first`` on, found by looking at all elements."""
    contexts, terms = lookup(front.bounds, _LOOKUP), front.terms
    found, bad = np.empty(numbers.size, np.int64), -1
    if is_compiled(numbers.size):
        bad = terms.scan("positions", contexts, 1 << front.block, first, numbers, of_context, found)
    else:
        done = 0
        for block, counts in enumerate(of_context):
            begin = (first + block) << front.block
            of = contexts[terms.of(np.arange(begin, min(begin + (1 << front.block), front.size)))]
            for context, count in enumerate(counts.tolist()):
                members = np.flatnonzero(of == context)
                places = np.cumsum(numbers[done : done + count]) - 1
                if count and not (
                    numbers[done : done + count].max() <= members.size and places[-1] < members.size
                ):
                    bad = block
                    break
                found[done : done + count] = members[places] + begin
                done += count
            found[done - int(counts.sum()) : done].sort()
    if bad >= 0:
        rule = "base-mismatch" if terms.bits.size else "impossible"
        raise FormatError(rule, f"block {first + bad} has fewer elements of a class than its ranks say")
    return found


# Writing


def encode_classes(indices: Indices, shape: tuple[int, ...], base: Array | None = None) -> Encoded:
    """The entries, by the classes that take the fewest bits.

    Args:
        indices: int64 ``[nnz]``, strictly increasing.
        shape: of the tensor.
        base: its values in the base, flat, if a reader may be asked for them.
    """
    if not indices.size:
        return Encoded({"codec": Classes.name}, np.empty(0, np.uint8))
    size = numel(shape)
    terms, bounds = _best_terms(indices, shape, base)
    wanted = max(size * _ENTRIES // indices.size, 1).bit_length()
    block = min(
        max(wanted, _SMALLEST), MAX_SCANNED if terms.scans else MAX_BLOCK, max(size.bit_length(), _SMALLEST)
    )
    blocks, contexts = _parts(size, 1 << block), bounds.size - 1
    ends = np.searchsorted(indices, np.minimum(np.arange(1, blocks + 1) << block, size))
    numbers, of = _numbers(terms, bounds, block, ends, indices)
    coded = encode(_by_context(numbers, of, ends, contexts), contexts)
    split = coded.tables.split
    bits = BitWriter()
    bits.put(split, 3)
    bits.put(block, 6)
    bits.put(bool(terms.rows.size), 1)
    write_bounds(bits, bounds)
    lines = _coded_lines(terms, split)
    for one in (*lines, coded):
        for table in one.tables.tables:
            table.write(bits)
    lengths = [count for one in (*lines, coded) for count in one.counts.tolist()]
    stream = coded_stream.write(
        bits, [one.words for one in (*lines, coded)], lengths, np.diff(ends, prepend=0).tolist()
    )
    return Encoded({"codec": Classes.name} | ({"base": True} if terms.bits.size else {}), stream)


def _by_context(numbers: Indices, of: Array, ends: Indices, contexts: int) -> Numbers:
    """The numbers of each block by context; each context of each block ends in a 0."""
    blocks = ends.size
    items = np.zeros(numbers.size + blocks * contexts, np.int64)
    rows = np.empty(items.size, np.uint8)
    if is_compiled(numbers.size):
        _kernels().arrange(numbers, of, ends, contexts, items, rows)
    else:
        key = np.repeat(np.arange(blocks), np.diff(ends, prepend=0)) * contexts + of
        order = np.argsort(key, kind="stable")
        rows[:] = np.repeat(
            np.arange(blocks * contexts) % contexts, np.bincount(key, minlength=blocks * contexts) + 1
        )
        items[np.arange(numbers.size) + key[order]] = numbers[order]
    return Numbers(rows, items, ends + np.arange(1, blocks + 1) * contexts)


def _kernels() -> Any:
    from shira_format._core import class_kernels

    return class_kernels


def _coded_lines(terms: Terms, split: int) -> list[Coded]:
    if not terms.rows.size:
        return []
    numbers = np.concatenate([terms.rows, np.where(terms.columns == _NONE, 0, terms.columns)])
    contexts = np.repeat(np.array([0, 1], np.uint8), [terms.rows.size, terms.columns.size])
    ends = np.minimum(np.arange(1, _parts(numbers.size, _LINES) + 1) * _LINES, numbers.size)
    return [encode(Numbers(contexts, numbers, ends), 2, (split,))]


def _numbers(terms: Terms, bounds: Indices, block: int, ends: Indices, indices: Indices) -> tuple[Indices, Array]:
    """The rank of each entry among the elements of its context since the one before it, from 1, and its context."""
    found, of = np.empty(indices.size, np.int64), np.zeros(indices.size, np.uint8)
    starts = ends - np.diff(ends, prepend=0)
    if not terms.scans:
        found[:] = np.diff(indices, prepend=-1)
        some = np.flatnonzero(ends > starts)
        found[starts[some]] = indices[starts[some]] - (some << block) + 1
        return found, of
    contexts = lookup(bounds, _LOOKUP)
    if is_compiled(indices.size):
        terms.scan("ranks", contexts, 1 << block, ends, indices, found, of)
        return found, of
    for number, (first, last) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if first == last:
            continue
        begin = number << block
        every = contexts[terms.of(np.arange(begin, int(indices[last - 1]) + 1))]
        own = indices[first:last] - begin
        of[first:last] = every[own]
        for context in distinct(every[own]).tolist():
            at = np.flatnonzero(of[first:last] == context)
            places = np.searchsorted(np.flatnonzero(every == context), own[at])
            found[first + at] = np.diff(places, prepend=-1)
    return found, of


def _best_terms(indices: Indices, shape: tuple[int, ...], base: Array | None) -> tuple[Terms, Indices]:
    """The terms that take the fewest bits, and the bounds of their contexts."""
    nothing = Terms(np.empty(0, np.uint8))
    rows, columns = matrix_shape(shape)
    terms, side = nothing, 0.0
    line_sizes: Array = np.ones(1)
    if rows + columns <= min(indices.size, MAX_LINES):
        terms = nothing.with_lines(*_numbers_of_lines(indices, rows, columns))
        numbers = [np.bincount(lines[(lines > 0) & (lines < _NONE)]) for lines in (terms.rows, terms.columns)]
        side = sum(
            entropy_bits(np.bincount(lines)[None]) + table_bits(one.size)
            for lines, one in zip((terms.rows, terms.columns), numbers, strict=True)
        )
        line_sizes = np.convolve(numbers[0].astype(np.float64), numbers[1])
    own = nothing if base is None else of_base(base)
    counts = _counts(replace(own, rows=terms.rows, columns=terms.columns), indices)
    everything = np.array([float(numel(shape))])
    known = [(nothing, counts.sum(keepdims=True)[0], everything, 0.0)]
    if terms.rows.size:
        known.append((terms, counts.sum(axis=0), line_sizes, side))
    if base is not None:
        share = _shares(own, base.size)
        known.append((own, counts.sum(axis=1), np.convolve(everything, share), 0.0))
        if terms.rows.size:
            both = replace(own, rows=terms.rows, columns=terms.columns)
            known.append((both, _of_sums(counts), np.convolve(line_sizes, share), side))
    return min((_contexts(*one) for one in known), key=lambda found: found[2])[:2]


def _counts(terms: Terms, indices: Indices) -> Array:
    """How many entries have each exponent's term and each line's, int64 ``[exponents, lines]``."""
    found = np.zeros((terms.mask + 1, 2 * MAX_LINE + 1 if terms.rows.size else 1), np.int64)
    if is_compiled(indices.size):
        _kernels().count_classes(terms.bits, terms.shift, terms.mask, terms.rows, terms.columns, indices, found)
        return found
    of_base = replace(terms, rows=_nothing(), columns=_nothing()).of(indices)
    of_lines = replace(terms, bits=terms.bits[:0]).of(indices)
    key = of_base * found.shape[1] + of_lines
    return np.bincount(key, minlength=found.size).reshape(found.shape)


def _of_sums(counts: Array) -> Array:
    """How many entries have each sum of two terms."""
    found = np.zeros(sum(counts.shape), np.int64)
    for exponent in np.flatnonzero(counts.any(axis=1)).tolist():
        found[exponent : exponent + counts.shape[1]] += counts[exponent]
    return found


def _numbers_of_lines(indices: Indices, rows: int, columns: int) -> tuple[Indices, Indices]:
    """One more than the logarithm of how many entries each row and column has, rounded; 0 if it has none."""
    counts = np.zeros(rows, np.int64), np.zeros(columns, np.int64)
    if is_compiled(indices.size):
        _kernels().count_lines(indices, *counts)
    else:
        row = indices // columns
        counts[0][:] = np.bincount(row, minlength=rows)
        counts[1][:] = np.bincount(indices - row * columns, minlength=columns)
    found = [np.where(one > 0, np.rint(np.log2(np.maximum(one, 1))) + 1, 0).astype(np.int64) for one in counts]
    return found[0], found[1]


def _shares(terms: Terms, size: int) -> Array:
    """The share of the elements in each class, from some of them."""
    step = _CHUNK * max(1, size // (_CHUNK * _CHUNKS))
    some = np.concatenate([terms.bits[start : start + _CHUNK] for start in range(0, size, step)])
    counts = np.bincount((some >> terms.shift & terms.mask).astype(np.int64), minlength=terms.mask + 1)[::-1]
    found: Array = counts / counts.sum()
    return found


def _contexts(terms: Terms, counts: Indices, elements: Array, side: float) -> tuple[Terms, Indices, float]:
    """The terms, the best bounds of their contexts, and about how many bits they take.

    Args:
        terms: the terms.
        counts: how many entries are in each class.
        elements: how many elements are in each class, about.
        side: bits that the numbers of rows and columns take.
    """
    classes = np.flatnonzero(counts)
    inside = np.append(0.0, np.cumsum(counts[classes]))
    # All elements between the first class and the last one of a context are in it.
    passed = np.append(0.0, np.cumsum(elements))
    upper = passed[np.minimum(classes + 1, passed.size - 1)]
    lower = passed[np.minimum(classes, passed.size - 1)]
    k = np.maximum(inside[None, :] - inside[:, None], 0)
    n = np.zeros_like(k)
    n[:-1, 1:] = np.maximum(upper[None, :] - lower[:, None], 0)
    n = np.maximum(n, k)
    costs = _x_log_x(n) - _x_log_x(k) - _x_log_x(n - k) + table_bits(_COUNTED)
    bounds = merged(classes, costs)
    total, at = side, np.searchsorted(classes, bounds[:-1])
    for i, j in zip(at, [*at[1:], classes.size], strict=True):
        total += float(costs[i, j])
    return terms, bounds, total


def _x_log_x(x: Array) -> Array:
    found: Array = x * np.log2(np.where(x > 0, x, 1))
    return found
