"""The rank of an adapter's tensor: exact with a certificate, numerical at a stated tolerance, and by other measures.

*Exact rank* means that of the exact difference: of target - base as rational numbers, not of what rounding would make of it.
:mod:`shira_analysis.measures.certificate` brackets it between two bounds that are proofs.

*Numerical rank* counts singular values above ``max(m, n) * eps`` times the largest: a matrix of full exact rank may be one whose
smallest singular values a computation in float64 cannot tell from 0. LoRAs are measured in the same way, for comparison.
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
    """What is known of one tensor's rank.

    Attributes:
        name: of the tensor.
        shape: of its matrix view.
        dtype: of the weight, or in which the update was computed; by its safetensors name.
        nnz: entries whose delta is not 0; of a dense update, all that are not 0; None if it was not computed as a matrix.
        bounds: of the exact rank; None if it was not asked for, or if the update exists only rounded.
        spectrum: the singular values; None if they were not asked for, or are too many.
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
        """Plain values; ``values`` for the singular values too."""
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
        base: the whole weight, ``[*shape]``; by default the base's values that ``tensor`` holds.
        exact: bracket the exact rank.
        spectrum: compute the singular values.
        primes: how many primes are tried, at most, where the bounds do not meet at once.

    Raises:
        SourceError: a mask, a delta that is not finite, far more rows than entries; scipy or python-flint is missing.
        BaseRequired: targets, and no base values.
        BaseMismatch: ``base`` is not the base of this tensor.
    """
    deltas = delta_values(tensor, base)
    start = None
    if tensor.value_kind == "target":
        start = tensor.base if base is None else tensor.at_entries(base)
        assert start is not None  # delta_values would have told
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

    For a product of two factors the exact rank is that of the exact product of the factors, whose scale is in them; nothing
    dense is computed. Kronecker products have a certificate too, and updates that a file holds as they are. Others exist
    only rounded, as a dense matrix: they have no exact rank, and singular values of that matrix, one layer in memory.

    Raises:
        SourceError: a value is not finite; scipy or python-flint is missing.
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
    """:func:`rank_of_update` of all updates of a LoRA that :func:`shira_format.lora.open_lora` opened, one by one."""
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
