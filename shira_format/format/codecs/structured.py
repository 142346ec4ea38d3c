"""``structured``: every n-th row or column, diagonals, and unions of these, without a stream (spec, section 5.4)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices, distinct, distinct_counts
from shira_format.errors import FormatError
from shira_format.format.codecs.base import Encoded, IndexCodec
from shira_format.format.fields import need
from shira_format.tensors import matrix_shape

KINDS = ("rows", "columns", "diagonal")
MAX_PARTS = 8
MAX_LISTED = 2**31  # most entries of a mask for which the file has no bytes

Part = dict[str, Any]


class Structured(IndexCodec):
    """SHiRA-Struct masks: the indices follow from a few numbers in the manifest."""

    name = "structured"

    def check_params(self, params: Mapping[str, Any], tensor: str) -> None:
        for part in need(params, "pattern", list, tensor):
            if not isinstance(part, dict) or part.get("kind") not in KINDS:
                raise FormatError("manifest-schema", f"a part of the pattern is not one of {KINDS}", tensor=tensor)
            need(part, "offset", int, tensor)
            if part["kind"] != "diagonal" or "step" in part:
                need(part, "step", int, tensor)

    def size(self, indices: Indices, shape: tuple[int, ...]) -> int | None:
        pattern = find_pattern(indices, shape)
        return None if pattern is None else len(json.dumps(pattern, separators=(",", ":")))

    def encode(self, indices: Indices, shape: tuple[int, ...], block_size: int) -> Encoded:
        return Encoded({"codec": self.name, "pattern": find_pattern(indices, shape)})

    def decode(self, stored: Encoded, shape: tuple[int, ...], nnz: int, base: Array | None = None) -> Indices:
        return list_pattern(stored.params["pattern"], shape, nnz)


def list_pattern(pattern: list[Part], shape: tuple[int, ...], nnz: int) -> Indices:
    """The sorted union of the parts; their sizes are compared with ``nnz`` before anything is allocated.

    Raises:
        FormatError: a part is invalid, or the union does not have ``nnz`` entries.
    """
    rows, columns = matrix_shape(shape)
    if len(pattern) > MAX_PARTS:
        raise FormatError("pattern", f"{len(pattern)} parts, at most {MAX_PARTS} are allowed")
    sized = []
    for part in pattern:
        _check_part(part, rows, columns)
        if (size := part_size(part, rows, columns)) > nnz:
            raise FormatError("count-mismatch", f"the part {part} has {size} entries, the tensor {nnz}")
        if size:  # rows or columns without elements can be many
            sized.append(part)
    if nnz > MAX_LISTED:
        raise FormatError("count-mismatch", f"a pattern of {nnz} entries; this reader's limit is {MAX_LISTED}")
    union = _NONE
    for part in sized:  # one after the other, so that memory stays at twice the union
        one = _list_part(part, rows, columns)
        union = distinct(np.concatenate([union, one])) if union.size else one
        if union.size > nnz:
            break
    if union.size != nnz:
        raise FormatError("count-mismatch", f"the pattern has {union.size} entries, the tensor {nnz}")
    return union


_NONE = np.empty(0, np.int64)


def _check_part(part: Part, rows: int, columns: int) -> None:
    kind, offset = part["kind"], part["offset"]
    if kind == "diagonal":
        good = -rows < offset < columns
    else:
        good = part["step"] >= 1 and 0 <= offset < min(part["step"], rows if kind == "rows" else columns)
    if not good:
        raise FormatError("pattern", f"the part {part} does not fit a matrix of {rows} x {columns}")


def part_size(part: Part, rows: int, columns: int) -> int:
    """The number of entries of a part."""
    offset = part["offset"]
    if part["kind"] == "diagonal":
        return int(min(rows, columns - offset) - max(0, -offset))
    along, across = (rows, columns) if part["kind"] == "rows" else (columns, rows)
    return _ceil_div(along - offset, part["step"]) * across


def _ceil_div(a: int, b: int) -> int:
    """Exact at any size, where ``len(range(...))`` fails from 2^63 on."""
    return -(-a // b)


def _list_part(part: Part, rows: int, columns: int) -> Indices:
    offset = part["offset"]
    if part["kind"] == "diagonal":
        r = np.arange(max(0, -offset), min(rows, columns - offset), dtype=np.int64)
        return np.asarray(r * (columns + 1) + offset)
    if part["kind"] == "rows":
        starts = np.arange(offset, rows, part["step"], dtype=np.int64) * columns
        return (starts[:, None] + np.arange(columns, dtype=np.int64)).ravel()
    starts = np.arange(rows, dtype=np.int64) * columns
    return (starts[:, None] + np.arange(offset, columns, part["step"], dtype=np.int64)).ravel()


def find_pattern(indices: Indices, shape: tuple[int, ...]) -> list[Part] | None:
    """The pattern whose union is exactly ``indices``, or None: full rows and full columns at one regular step each,
    then what remains as whole diagonals.
    """
    rows, columns = matrix_shape(shape)
    if indices.size == 0:
        return []
    # Three cheap tests reject nearly every unstructured mask before any sorting.
    may_have_rows = _has_full_row(indices, columns)
    may_have_columns = _may_have_full_column(indices, rows, columns)
    head = indices[: 4 * MAX_PARTS]
    few_diagonals = distinct(head % columns - head // columns).size <= MAX_PARTS
    if not (may_have_rows or may_have_columns or few_diagonals):
        return None
    pattern: list[Part] = []
    r, c = np.divmod(indices, columns)
    left = np.ones(indices.size, bool)
    for kind, may, along, across, where in (
        ("rows", may_have_rows, rows, columns, r),
        ("columns", may_have_columns, columns, rows, c),
    ):
        part = _regular_lines(kind, where, along, across) if may and left.any() else None
        if part is not None:
            pattern.append(part)
            left &= where % part["step"] != part["offset"]
    rest = (c - r)[left]
    while rest.size:  # a few times: as many diagonals as a pattern may have
        if len(pattern) == MAX_PARTS:
            return None
        pattern.append({"kind": "diagonal", "offset": int(rest.min())})
        rest = rest[rest != rest.min()]
    try:  # the remaining entries may be only parts of diagonals: compare the union
        return pattern if np.array_equal(list_pattern(pattern, shape, indices.size), indices) else None
    except FormatError:
        return None


_CHUNK = 1 << 16  # entries


def _has_full_row(indices: Indices, columns: int) -> bool:
    """Whether ``columns`` consecutive indices start at a multiple of ``columns``."""
    reach = indices.size - columns + 1
    if reach <= 0:
        return False
    for start in range(0, reach, _CHUNK):
        first = indices[start : min(start + _CHUNK, reach)]
        last = indices[start + columns - 1 : start + columns - 1 + first.size]
        if (first[last - first == columns - 1] % columns == 0).any():
            return True
    return False


def _may_have_full_column(indices: Indices, rows: int, columns: int) -> bool:
    """Whether some column occurs in each of the first rows; for a random mask the candidates run out soon."""
    if indices.size < rows:
        return False
    common: Indices | None = None
    for row in range(min(rows, 4 * MAX_PARTS)):
        start, stop = np.searchsorted(indices, [row * columns, (row + 1) * columns])
        here = indices[start:stop] - row * columns
        common = here if common is None else np.intersect1d(common, here, assume_unique=True)
        if not common.size:
            return False
    return True


def _regular_lines(kind: str, where: Indices, along: int, across: int) -> Part | None:
    """The full rows (or columns) as one part, if they are evenly spaced from end to end."""
    lines, counts = distinct_counts(where)
    full = lines[counts == across]
    if not full.size:
        return None
    # A single row or column: the step is so large that the next one is outside.
    step, offset = int(full[1] - full[0]) if full.size > 1 else along, int(full[0])
    regular = full.size == _ceil_div(along - offset, step) and bool((np.diff(full) == step).all())
    if offset >= step or not regular:
        return None
    return {"kind": kind, "step": step, "offset": offset}
