"""The rank of an adapter's tensor: exact with proven bounds, numerical at a stated tolerance, stable and effective.

The *exact rank* is that of target - base in rational numbers, without rounding; :mod:`shira_analysis.measures.certificate`
gives proven lower and upper bounds.

The *numerical rank* counts singular values above ``max(m, n) * eps`` times the largest: even a matrix of full exact rank may have
singular values that float64 cannot distinguish from 0. LoRAs are measured in the same way, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from shira_analysis.measures.certificate import Bounds, bounds_of, of_kronecker, of_product
from shira_analysis.measures.deltas import delta_values, entries_matrix
from shira_analysis.measures.modular import PRIMES, Int64s, residues
from shira_analysis.measures.spectrum import Spectrum, spectrum_of, spectrum_of_dense, spectrum_of_product
from shira_format._core.arrays import Array
from shira_format._core.dtypes import dtype_name
from shira_format.errors import SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.products import Dense, Kronecker, LowRank
from shira_format.tensors import SparseTensor, matrix_shape


@dataclass(frozen=True, eq=False)
class RankReport:
    """The rank of one tensor.

    Attributes:
        name: the tensor's name.
        shape: the shape of its matrix view.
        dtype: the dtype of the weight or of the computed update, by its safetensors name.
        nnz: entries with a nonzero delta, or nonzero elements of a dense update; None if no matrix was computed.
        bounds: bounds of the exact rank; None if not requested or if the update exists only rounded.
        spectrum: the singular values; None if not requested or if the matrix is too large.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    nnz: int | None
    bounds: Bounds | None
    spectrum: Spectrum | None

    @property
    def full(self) -> int:
        """The highest rank that the shape allows."""
        return min(self.shape)

    def as_json(self, *, values: bool = False) -> dict[str, Any]:
        """Plain JSON values; ``values`` includes the singular values."""
        found: dict[str, Any] = {"full_rank": self.full, "nonzero": self.nnz}
        if self.bounds is not None:
            found |= {
                "exact_rank": self.bounds.exact,
                "rank_at_least": self.bounds.lower,
                "rank_at_most": self.bounds.upper,
                "primes": list(self.bounds.primes),
            }
        return found | (self.spectrum.as_json(values=values) if self.spectrum is not None else {})


def rank_of(
    tensor: SparseTensor, base: Any = None, *, exact: bool = True, spectrum: bool = True, primes: int = len(PRIMES)
) -> RankReport:
    """The rank of a tensor's deltas, in its matrix view.

    Args:
        tensor: targets or deltas.
        base: the full weight, ``[*shape]``; by default the base values in ``tensor``.
        exact: compute bounds of the exact rank.
        spectrum: compute the singular values.
        primes: how many primes to try, at most, until the bounds are equal.

    Raises:
        SourceError: a mask, a delta that is not finite, far more rows than entries, or scipy or python-flint is missing.
        BaseRequired: targets without base values.
        BaseMismatch: ``base`` is not the base of this tensor.
    """
    deltas = delta_values(tensor, base)
    start = None
    if tensor.value_kind == "target":
        start = tensor.base if base is None else tensor.at_entries(base)
        assert start is not None  # delta_values would have raised
    kept = np.flatnonzero(deltas)  # a rounded difference of two floats is 0 only if they are equal
    matrix = entries_matrix(tensor.name, tensor.shape, tensor.indices[kept], deltas[kept])

    def images(prime: int) -> Int64s:
        found = residues(tensor.values[kept], prime)
        return found if start is None else (found - residues(start[kept], prime)) % prime

    return RankReport(
        tensor.name, matrix_shape(tensor.shape), dtype_name(tensor.dtype), int(kept.size),
        bounds_of(matrix, images, primes=primes) if exact else None,
        spectrum_of(matrix, _eps(tensor.dtype)) if spectrum else None,
    )  # fmt: skip


def rank_of_update(
    update: Update, *, exact: bool = True, spectrum: bool = True, primes: int = len(PRIMES)
) -> RankReport:
    """The rank of one update of a LoRA, in the matrix view of its weight.

    For a product of two factors (scale included) the exact rank is that of the exact product; nothing dense is computed.
    Kronecker products and updates stored dense have bounds of the exact rank, too. All others exist only as a rounded dense
    matrix, one layer in memory: they have singular values, but no exact rank.

    Raises:
        SourceError: a value is not finite, or scipy or python-flint is missing.
    """
    view = matrix_shape(update.shape)
    nnz, bounds, found = None, None, None
    natural = update.columns == view[1]
    if isinstance(update, LowRank) and natural:
        if exact:
            bounds = of_product(
                _bounds(update.name, update.up, primes),
                _bounds(update.name, update.down, primes),
                len(update.down),
            )
        if spectrum:
            _check_finite(update.name, update.up, update.down)
            found = spectrum_of_product(update.up, update.down, _eps(update.dtype))
        return RankReport(update.name, view, dtype_name(update.dtype), nnz, bounds, found)
    if isinstance(update, Kronecker) and natural and exact:
        bounds = of_kronecker(
            _bounds(update.name, update.left, primes), _bounds(update.name, update.right, primes)
        )
    if isinstance(update, Dense) and natural and exact:
        bounds = _bounds(update.name, update.values, primes)
    if spectrum:
        dense = np.empty((view[0] * view[1] // max(1, update.columns), update.columns), update.dtype)
        update.tile(0, len(dense), dense)
        _check_finite(update.name, dense)
        nnz = int(np.count_nonzero(dense))
        found = spectrum_of_dense(dense.reshape(view), _eps(update.dtype))
    return RankReport(update.name, view, dtype_name(update.dtype), nnz, bounds, found)


def ranks_of_lora(lora: Lora, *, exact: bool = True, spectrum: bool = True) -> Iterator[RankReport]:
    """:func:`rank_of_update` for every update of a LoRA opened by :func:`shira_format.lora.open_lora`, one at a time."""
    for update in lora.updates:
        yield rank_of_update(update, exact=exact, spectrum=spectrum)


def _bounds(name: str, factor: Array, primes: int) -> Bounds:
    """Bounds of the exact rank of a dense ``[m, n]`` array of floats."""
    matrix = _matrix(name, factor)
    return bounds_of(matrix, lambda prime: residues(matrix.data, prime), primes=primes)


def _matrix(name: str, dense: Array) -> Any:
    """A dense ``[m, n]`` array of floats as a ``csr_array`` in float64."""
    _check_finite(name, dense)
    flat = dense.reshape(-1)
    indices = np.flatnonzero(flat)
    return entries_matrix(name, dense.shape, indices, flat[indices].astype(np.float64))


def _check_finite(name: str, *arrays: Array) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise SourceError(f"tensor {name!r}: the update has values that are NaN or infinite")


def _eps(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).eps)
