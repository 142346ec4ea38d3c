"""Struct: regular rows or columns and the diagonal (SHiRA, arXiv 2406.13175, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Indices
from shira_format.errors import SourceError
from shira_format.format.codecs.structured import Part, list_pattern, part_size
from shira_format.masks.base import PlacedRule
from shira_format.masks.weights import Weight


@dataclass(frozen=True)
class Struct(PlacedRule):
    """Every ``step``-th row (or column) and a diagonal of each matrix.

    A mask has as many rows as the size allows, and seldom exactly that many entries; with ``exact`` the first entries that are left
    make up the count. Without ``exact`` a file holds it as a pattern of a few bytes, if the weight is one matrix.

    Attributes:
        lines: ``"rows"`` or ``"columns"``: of the matrix view, the first dimension against all others.
        step: from one row to the next; None: the smallest with which the mask is no larger than asked for.
        offset: the first row; masks of one step whose offsets differ have no row in common.
        diagonal: which one: 0 is the main diagonal, a positive number one above it; None: none.
        exact: see above.
    """

    name: ClassVar[str] = "struct"
    lines: str = "rows"
    step: int | None = None
    offset: int = 0
    diagonal: int | None = 0
    exact: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be meant."""
        if self.lines not in ("rows", "columns"):
            raise ValueError(f"lines {self.lines!r} are neither 'rows' nor 'columns'")
        if self.step is not None and self.step < 1:
            raise ValueError(f"step {self.step} is not a positive number")
        if self.offset < 0 or (self.step is not None and self.offset >= self.step):
            raise ValueError(f"offset {self.offset} is not from 0 to the step")

    @property
    def notes(self) -> dict[str, Any]:
        """Lines, offset, diagonal, and the step if it is given."""
        notes: dict[str, Any] = {"lines": self.lines, "offset": self.offset}
        return notes | {key: getattr(self, key) for key in ("step", "diagonal") if getattr(self, key) is not None}

    def indices(self, weight: Weight, count: int) -> Indices:
        """The entries, see the class.

        Raises:
            SourceError: ``count`` is less than one line and the diagonal, or the weight has no such line or diagonal.
        """
        matrices, rows, columns = weight.matrices
        if not weight.size:
            return np.empty(0, np.int64)
        pattern = self.pattern(weight, count)
        one = list_pattern(pattern, (rows, columns), _union_size(pattern, rows, columns))
        found: Indices = (np.arange(matrices)[:, None] * (rows * columns) + one).reshape(-1)
        if self.exact and found.size != count:
            found = _filled(found, count, weight)
        return found

    def pattern(self, weight: Weight, count: int) -> list[Part]:
        """The pattern of each matrix, as the codec ``structured`` has it (spec, section 5.4).

        Raises:
            SourceError: see :meth:`indices`.
        """
        matrices, rows, columns = weight.matrices
        lines = rows if self.lines == "rows" else columns
        extra: list[Part] = []
        if self.diagonal is not None:
            if not -rows < self.diagonal < columns:
                raise SourceError(
                    f"tensor {weight.name!r}: a matrix of {rows} x {columns} has no diagonal {self.diagonal}"
                )
            extra = [{"kind": "diagonal", "offset": self.diagonal}]
        if self.offset >= lines:
            raise SourceError(
                f"tensor {weight.name!r}: has {lines} {self.lines}, and none at the offset {self.offset}"
            )

        def pattern(step: int) -> list[Part]:
            return [{"kind": self.lines, "step": step, "offset": self.offset}, *extra]

        if self.step is not None:
            return pattern(self.step)
        low, high = self.offset + 1, max(lines, self.offset + 1)  # a larger step never has more lines
        if _union_size(pattern(high), rows, columns) * matrices > count:
            raise SourceError(
                f"tensor {weight.name!r}: {count} entries are fewer than one of its {self.lines} and the diagonal have in "
                f"{matrices} matrices of {rows} x {columns}"
            )
        while low < high:
            middle = (low + high) // 2
            fits = _union_size(pattern(middle), rows, columns) * matrices <= count
            low, high = (low, middle) if fits else (middle + 1, high)
        return pattern(low)


def _union_size(pattern: list[Part], rows: int, columns: int) -> int:
    """Entries of lines and, if there is one, a diagonal, each counted once."""
    lines, *rest = pattern
    size = part_size(lines, rows, columns)
    for part in rest:
        first = max(0, -part["offset"])  # the diagonal's first row
        first += 0 if lines["kind"] == "rows" else part["offset"]  # its first column
        length = part_size(part, rows, columns)
        below = [max(0, -(-(end - lines["offset"]) // lines["step"])) for end in (first, first + length)]
        size += length - (below[1] - below[0])
    return size


def _filled(found: Indices, count: int, weight: Weight) -> Indices:
    """``found`` and the first positions that are not in it, so that there are ``count``."""
    if found.size > count:
        raise SourceError(f"tensor {weight.name!r}: the step gives {found.size} entries, more than {count}")
    first = np.arange(min(count, weight.size))  # of which no more than found.size are taken already
    rest = np.setdiff1d(first, found, assume_unique=True)[: count - found.size]
    return np.sort(np.concatenate([found, rest]))
