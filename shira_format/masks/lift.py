"""LIFT: the largest entries of a low-rank approximation (Liu et al., arXiv 2506.00772; github.com/zihanghliu/LIFT)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.threads import single_threaded_blas
from shira_format.errors import SourceError
from shira_format.masks.base import Gradients, ScoredRule
from shira_format.masks.last import LastOne
from shira_format.masks.scores import Scores
from shira_format.masks.weights import Weight
from shira_format.tensors import numel

_ROWS = 1 << 18  # elements of the rows that are read at a time


@dataclass(frozen=True)
class Lift(ScoredRule):
    """``|W_r|``, where ``W_r = U_r S_r V_r^T`` is the best approximation of rank ``r`` of the weight.

    The singular vectors of the shorter side come from the eigenvectors of its Gram matrix in float64. A weight with more rows than
    columns is never in memory; one with fewer is, once, and ``W_r`` never is. Each matrix of a stack is one of its own.

    Attributes:
        rank: ``r``; the authors' runs take 32 to 128, by the size of the model.
    """

    name: ClassVar[str] = "lift"
    rank: int = 64
    _kept: LastOne[list[tuple[Array, Array]]] = field(default_factory=LastOne, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError unless the rank is positive."""
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} is not a positive number")

    @property
    def notes(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def scores(self, weight: Weight, gradients: Gradients | None) -> Scores:
        """``|W_r|`` in float64, computed in tiles of whole rows."""
        count, rows, columns = weight.matrices

        def approximations() -> list[tuple[Array, Array]]:
            with single_threaded_blas():
                return [low_rank(weight, at * rows * columns, rows, columns, self.rank) for at in range(count)]

        def fill(start: int, stop: int, out: Array) -> None:
            factors = self._kept.get(weight, approximations)
            at = start
            while at < stop:
                matrix, inside = divmod(at, rows * columns)
                last = min(stop, (matrix + 1) * rows * columns)
                left, right = factors[matrix]
                first = inside // columns
                piece = out[at - start : last - start].reshape(-1, columns)
                np.matmul(left[first : first + len(piece)], right, out=piece)
                at = last
            np.abs(out, out=out)

        return Scores(weight, fill, np.dtype(np.float64), max(columns, 1))


def low_rank(weight: Weight, start: int, rows: int, columns: int, rank: int) -> tuple[Array, Array]:
    """The factors ``[m, r]`` and ``[r, n]``, float64, of the best approximation of rank ``r`` of one matrix.

    Args:
        weight: that has the matrix.
        start: the flat position of its first element.
        rows: ``m``.
        columns: ``n``.
        rank: ``r``; less if the matrix is smaller.

    Raises:
        SourceError: the matrix holds NaN or Inf.
    """
    from scipy.linalg import eigh

    step = max(1, _ROWS // max(columns, 1))

    def block(first: int) -> Array:
        last = min(first + step, rows)
        return weight.part(start + first * columns, start + last * columns).astype(np.float64).reshape(-1, columns)

    firsts = range(0, rows, step)
    whole = np.concatenate([block(first) for first in firsts]) if rows < columns else None
    side = min(rows, columns)
    gram = np.zeros((side, side)) if whole is None else whole @ whole.T
    if whole is None:
        for first in firsts:
            piece = block(first)
            gram += piece.T @ piece
    if not np.isfinite(gram).all():
        raise SourceError(f"tensor {weight.name!r}: holds NaN or Inf, or is too large for its squares")
    kept = min(rank, side)
    if kept == 0 or not numel(gram.shape):
        return np.zeros((rows, 0)), np.zeros((0, columns))
    _, vectors = eigh(gram, subset_by_index=[side - kept, side - 1])
    if whole is not None:
        return vectors, vectors.T @ whole
    return np.concatenate([block(first) @ vectors for first in firsts]), np.ascontiguousarray(vectors.T)
