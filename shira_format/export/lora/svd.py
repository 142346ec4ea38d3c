"""The largest singular triplets of a sparse matrix, by the cheapest of three ways that are all exact to rounding.

* **lanczos**: ARPACK's restarted Lanczos on ``S^T S``, which is never formed. Cheap for few triplets.
* **gram**: ``S^T S`` of the shorter side, dense, and LAPACK's eigenvectors of its largest eigenvalues. That squares the
  condition, so singular values below about 1e-8 of the largest drown; what is written is float32, whose own rounding is
  larger. The triplets are those of ``S V``, not of the square, so that large ones are exact to rounding.
* **full**: the dense matrix and all of its triplets (LAPACK's ``gesdd``), where nearly all are needed, or the smallest count.

The rule between them comes from times on one core of a Xeon with AVX-512 (scipy 1.17, OpenBLAS 0.3.30), seconds for 1 % of the
entries at random places, normal values (a flat spectrum, the hardest), in brackets for the largest 1 % of a LoRA's update:

    side   triplets   lanczos        gram    full
    2048   8          0.02 (0.00)    0.6     3.4
           32         0.05 (0.02)    0.6
           128        0.47 (0.20)    0.7
           512        4.3  (2.7)     1.1
    4096   8          0.10 (0.01)    4.6     32
           32         0.19 (0.08)    4.6
           128        1.4  (0.6)     4.7
           512        13   (5.4)     6.0

``lobpcg`` took longer and stopped short of rounding at 4096 (residual 3e-7); ``propack`` was twice as fast at 128, but failed on
flat spectra with few triplets, and its vectors are orthogonal to 1e-10 only.

How often Lanczos has to multiply depends on the spectrum, so it is not guessed: it gets as many products as cost what ``gram``
would, and if these do not suffice ``gram`` takes over. So no layer takes more than about twice the better of the two.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shira_format._core.arrays import Array

Method = Literal["lanczos", "gram", "full"]

_SMALL = 1 << 16  # elements below which nothing beats LAPACK on the whole matrix
_TILE = 1 << 20  # elements of a dense piece
_FILLED = 0.1  # density from which dense products beat sparse ones
_RESIDUAL = 1e-11  # of the largest singular value; Lanczos gives about 1e-15
_NEARLY_ALL = 1e-9  # energy beyond which small singular values count, and so squares do not do
# The relative accuracy of sums of squares in float64.
_ROUNDING: dict[Method, float] = {"lanczos": 1e-12, "gram": 1e-12, "full": 1e-14}


@dataclass(frozen=True)
class Triplets:
    """``matrix @ right = left * values``: ``left`` is ``[rows, k]``, ``values`` ``[k]`` falling, ``right`` ``[columns, k]``."""

    left: Array
    values: Array
    right: Array
    method: Method


def largest(matrix: Any, count: int, method: Method | None = None) -> Triplets:
    """The ``count`` largest triplets of a float64 CSR matrix, or all if it has fewer.

    Args:
        matrix: ``[rows, columns]``, finite, of about unit scale.
        count: how many, at least 1.
        method: one of the three; by default the cheapest one.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found = largest(matrix.T.tocsr(), count, method)
        return Triplets(found.right, found.values, found.left, found.method)
    count = min(count, matrix.shape[1])
    if method in (None, "lanczos"):
        spent = _products(matrix, count) if method is None else np.inf
        if (triplets := _lanczos(matrix, count, spent)) is not None:
            return triplets
    if method == "gram" or (method is None and not _is_full(matrix, count)):
        return _of_gram(matrix, gram(matrix), count)
    return _full(matrix, count)


def reaching(matrix: Any, energy: float, method: Method | None = None) -> tuple[Triplets, int]:
    """The fewest triplets that hold a share of the sum of squares, and how many these are.

    Sums are good to 1e-12 of the whole (1e-14 by ``full``). There is one triplet more than needed, unless there is none.

    Args:
        matrix: see :func:`largest`.
        energy: the share, in (0, 1].
        method: see :func:`largest`.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found, needed = reaching(matrix.T.tocsr(), energy, method)
        return Triplets(found.right, found.values, found.left, found.method), needed
    side = matrix.shape[1]
    total = float(matrix.data @ matrix.data)
    count = 8
    while method in (None, "lanczos") and count < side and 1 - energy > _NEARLY_ALL:
        triplets = _lanczos(matrix, count, _products(matrix, count) if method is None else np.inf)
        if triplets is None:
            break
        kept = np.cumsum(triplets.values**2)
        enough = energy * total - _ROUNDING["lanczos"] * total
        if kept[-2] >= enough:
            return triplets, int(np.searchsorted(kept, enough)) + 1
        last = float(triplets.values[-1]) ** 2
        # None of those that are still to come is larger than the last one.
        count = max(2 * count, count + int(min(side, (enough - kept[-1]) / last if last else side)))
    if method == "full" or 1 - energy <= _NEARLY_ALL or matrix.shape[0] * side <= _SMALL:
        triplets = _full(matrix, side)
        needed = _fewest(triplets.values, energy, _ROUNDING["full"])
        return _cut(triplets, needed + 1), needed
    from scipy import linalg

    product = gram(matrix)
    squares = linalg.eigh(product, eigvals_only=True, check_finite=False)[::-1]
    needed = _fewest(np.sqrt(np.maximum(squares, 0)), energy, _ROUNDING["gram"])
    if _is_full(matrix, needed + 1):
        return _cut(_full(matrix, side), needed + 1), needed
    return _of_gram(matrix, product, min(needed + 1, side)), needed


def gram(matrix: Any) -> Array:
    """``matrix.T @ matrix`` as a dense array; no more of the matrix itself than a tile is."""
    rows, columns = matrix.shape
    if matrix.nnz < _FILLED * rows * columns:
        return np.asarray((matrix.T @ matrix).toarray())
    total = np.zeros((columns, columns))
    step = max(1, _TILE // columns)
    for start in range(0, rows, step):
        tile = matrix[start : start + step].toarray()
        total += tile.T @ tile
    return total


def norm(multiply: Any, back: Any, side: int) -> float | None:
    """The largest singular value of an operator, to 1e-4 and from below, by Lanczos; None if it does not converge.

    Args:
        multiply: from ``[side]`` to a vector of any length.
        back: the transposed.
        side: elements of its argument; None is returned for fewer than 20.
    """
    found = _eigenvectors(lambda x: back(multiply(x)), side, 1, np.inf, 1e-4)
    return None if found is None else float(np.linalg.norm(multiply(found[:, 0])))


def _products(matrix: Any, count: int) -> float:
    """How many products with the matrix and its transpose, Lanczos' own work included, take as long as ``gram``.

    The unit is 1.6e-9 s, the time for one entry in one such product, and for one element of the vectors it is made orthogonal to.
    """
    (rows, columns), nnz = matrix.shape, matrix.nnz
    form = 1.25 * nnz**2 / rows if nnz < _FILLED * rows * columns else columns**2 * rows / 36
    eigen = columns**3 / 24 + count * columns**2 / 10
    return float((form + eigen) / (nnz + 2 * count * columns))


def _is_full(matrix: Any, count: int) -> bool:
    rows, columns = matrix.shape
    return bool(rows * columns <= _SMALL or count > columns // 2)


def _lanczos(matrix: Any, count: int, products: float) -> Triplets | None:
    """The triplets, or None if they cost more products, or are not what they should be."""
    rows, columns = matrix.shape
    if rows * columns <= _SMALL and np.isfinite(products):
        return None
    transposed = matrix.T
    right = _eigenvectors(lambda x: transposed @ (matrix @ x), columns, count, products, 0)
    if right is None:
        return None
    triplets = _projected(matrix, right, "lanczos")
    if not np.isfinite(triplets.values).all():
        return None
    rest = transposed @ triplets.left - triplets.right * triplets.values
    return triplets if np.linalg.norm(rest, axis=0).max() <= _RESIDUAL * triplets.values[0] else None


def _eigenvectors(multiply: Any, side: int, count: int, products: float, tolerance: float) -> Array | None:
    """Eigenvectors ``[side, count]`` of the largest eigenvalues of a symmetric operator, orthonormal; None if not found."""
    from scipy.sparse import linalg as sparse

    vectors = max(2 * count + 1, 20)  # ARPACK's own default
    restarts = (products - vectors) / (vectors - count)
    if vectors > side or restarts < 1:
        return None
    operator = sparse.LinearOperator((side, side), matvec=multiply, dtype=np.float64)
    options: dict[str, Any] = {"maxiter": int(restarts)} if np.isfinite(restarts) else {}
    if "rng" in inspect.signature(sparse.eigsh).parameters:  # from scipy 1.17 on; else the seed is a constant
        options["rng"] = np.random.default_rng(1)
    start = np.random.default_rng(0).standard_normal(side)
    try:
        _, found = sparse.eigsh(operator, count, which="LA", v0=start, ncv=vectors, tol=tolerance, **options)
    except (sparse.ArpackNoConvergence, sparse.ArpackError):
        return None
    return np.asarray(np.linalg.qr(found)[0])


def _of_gram(matrix: Any, product: Array, count: int) -> Triplets:
    from scipy import linalg

    side = len(product)
    _, right = linalg.eigh(product, subset_by_index=[side - count, side - 1], overwrite_a=True, check_finite=False)
    return _projected(matrix, right, "gram")


def _projected(matrix: Any, right: Array, method: Method) -> Triplets:
    """The triplets in the space of orthonormal vectors ``[columns, k]``."""
    left, values, turn = np.linalg.svd(matrix @ right, full_matrices=False)
    return Triplets(left, values, right @ turn.T, method)


def _full(matrix: Any, count: int) -> Triplets:
    from scipy import linalg

    dense = matrix.toarray()
    try:
        left, values, right = linalg.svd(dense, full_matrices=False, check_finite=False)
    except np.linalg.LinAlgError:  # the faster driver does not converge on rare inputs
        left, values, right = linalg.svd(dense, full_matrices=False, check_finite=False, lapack_driver="gesvd")
    return _cut(Triplets(left, values, right.T, "full"), count)


def _cut(triplets: Triplets, count: int) -> Triplets:
    return Triplets(triplets.left[:, :count], triplets.values[:count], triplets.right[:, :count], triplets.method)


def _fewest(values: Array, energy: float, rounding: float) -> int:
    """How many of falling ``values`` hold the share of the sum of all squares."""
    squares = values[::-1] ** 2
    left_out = np.cumsum(squares)  # of the smallest 1, 2, ...: from below, so that nothing cancels
    allowed = (1 - energy + rounding) * left_out[-1]
    return max(1, values.size - int(np.searchsorted(left_out, allowed, side="right")))
