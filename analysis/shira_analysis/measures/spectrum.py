"""Singular values in float64, and rank measures computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.measures.deltas import Float64s, without_empty

LARGEST = 1 << 14  # shorter side of the largest matrix that is decomposed: a few times 2 GB


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a matrix, and measures of them.

    Attributes:
        shape: the matrix's shape.
        values: singular values in decreasing order, float64, without the zeros due to empty rows and columns.
        eps: the machine epsilon of the weight's dtype.
    """

    shape: tuple[int, int]
    values: Float64s
    eps: float

    @property
    def spectral_norm(self) -> float:
        """The largest singular value; 0 for a matrix without entries."""
        return float(self.values[0]) if self.values.size else 0.0

    def rank_at(self, eps: float) -> int | None:
        """How many singular values are above ``max(m, n) * eps`` times the largest, as in ``numpy.linalg.matrix_rank``.

        None if the tolerance is at least the largest singular value, as for bfloat16 (eps 2^-7) from 128 rows on.
        """
        if not self.spectral_norm:
            return 0
        share = max(self.shape) * eps
        return int(np.count_nonzero(self.values > share * self.spectral_norm)) if share < 1 else None

    @property
    def numerical_rank(self) -> int:
        """:meth:`rank_at` float64's epsilon, the precision of the computation.

        With a side of 2^52 or more the tolerance counts the singular values instead: most of that side is empty.
        """
        eps = float(np.finfo(np.float64).eps)
        if (rank := self.rank_at(eps)) is not None:
            return rank
        return int(np.count_nonzero(self.values > self.values.size * eps * self.spectral_norm))

    @property
    def dtype_rank(self) -> int | None:
        """:meth:`rank_at` the epsilon of the weight's dtype."""
        return self.rank_at(self.eps)

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm; 0 for a zero matrix."""
        scaled = self._scaled()
        return float(np.dot(scaled, scaled))

    @property
    def effective_rank(self) -> float:
        """The exp of the entropy of the singular values over their sum (Roy and Vetterli 2007); 0 for a zero matrix."""
        scaled = self._scaled()
        if not scaled.size:
            return 0.0
        share = scaled / scaled.sum()
        share = share[share > 0]
        return math.exp(-float(np.dot(share, np.log(share))))

    @property
    def frobenius(self) -> float:
        """The Frobenius norm."""
        return self.spectral_norm * math.sqrt(self.stable_rank)

    def holding(self, share: float) -> int:
        """How many of the largest singular values reach a ``share``, in (0, 1], of the energy (the sum of squares); 0 for a zero matrix."""
        sums = np.cumsum(self._scaled() ** 2)
        return int(np.searchsorted(sums, share * sums[-1])) + 1 if sums.size else 0

    def _scaled(self) -> Float64s:
        return self.values / self.spectral_norm if self.spectral_norm else self.values[:0]

    def as_json(self, *, values: bool = False) -> dict[str, Any]:
        """Plain JSON values; ``values`` includes the singular values."""
        found: dict[str, Any] = {
            "spectral_norm": self.spectral_norm,
            "numerical_rank": self.numerical_rank,
            "dtype_rank": self.dtype_rank,
            "dtype_eps": self.eps,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
        }
        return found | ({"singular_values": self.values.tolist()} if values else {})


def spectrum_of(matrix: Any, eps: float) -> Spectrum | None:
    """The spectrum of a ``csr_array`` in float64; None if it is too large (:data:`LARGEST`).

    Memory is a few times the square of the shorter side, not counting empty rows and columns: the longer side is processed in
    parts, with a QR factor that has the same singular values.
    """
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    kept = without_empty(matrix)
    tall = kept if kept.shape[0] >= kept.shape[1] else kept.T.tocsr()
    side = int(tall.shape[1])
    if side > LARGEST:
        return None
    if not side:
        return Spectrum(shape, np.empty(0), eps)
    if tall.shape[0] < 2 * side:
        dense = tall.toarray()
    else:
        dense = np.empty((0, side))
        for start in range(0, tall.shape[0], step := max(side, 1024)):
            dense = _qr_factor(np.concatenate([dense, tall[start : start + step].toarray()]))
    return Spectrum(shape, np.linalg.svd(dense, compute_uv=False), eps)


def spectrum_of_dense(matrix: npt.NDArray[Any], eps: float) -> Spectrum | None:
    """The spectrum of a dense ``[m, n]`` array of floats; None if it is too large (:data:`LARGEST`)."""
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    if min(shape) > LARGEST:
        return None
    if not min(shape):
        return Spectrum(shape, np.empty(0), eps)
    return Spectrum(shape, np.linalg.svd(matrix.astype(np.float64), compute_uv=False), eps)


def spectrum_of_product(up: npt.NDArray[Any], down: npt.NDArray[Any], eps: float) -> Spectrum:
    """The spectrum of ``up @ down``, ``[m, r]`` and ``[r, n]``, without forming the product, from two triangular factors."""
    left = _qr_factor(up.astype(np.float64))
    right = _qr_factor(down.astype(np.float64).T)
    values = np.linalg.svd(left @ right.T, compute_uv=False)
    return Spectrum((int(up.shape[0]), int(down.shape[1])), np.asarray(values, np.float64), eps)


def _qr_factor(matrix: Float64s) -> Float64s:
    """R of ``matrix`` = Q R, which has the same singular values."""
    return np.asarray(np.linalg.qr(matrix, mode="r"), np.float64)
