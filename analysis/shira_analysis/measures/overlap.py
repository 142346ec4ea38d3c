"""How many entries two adapters share, whether their signs agree, and the distance between the adapted models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_analysis.measures.additive import Additive, attributes
from shira_analysis.measures.deltas import delta_values
from shira_format._core.arrays import Array, bits_differ
from shira_format.errors import BaseMismatch, SourceError
from shira_format.tensors import SparseTensor


@dataclass(frozen=True)
class Overlap(Additive):
    """Two adapters' entries of one weight, or of several: ``+`` adds all fields.

    Fields about values are None if only positions were compared, as for masks.

    Attributes:
        elements: elements of the weights.
        first: entries of the first adapter.
        second: entries of the second.
        shared: entries of both.
        expected: expected shared entries of two independent uniform masks with these nnz.
        variance: the variance of that number. Both follow the hypergeometric distribution, per weight.
        same_sign: shared entries whose deltas have the same sign.
        opposite_sign: shared entries whose deltas have opposite signs; a delta of 0 counts as neither.
        inner: the inner product of the two deltas.
        first_energy: ``||D1||^2``, the energy (the sum of squares) of the first delta.
        second_energy: ``||D2||^2``.
        between: ``||D1 - D2||^2``, the squared distance between the two adapted models.
    """

    elements: int = 0
    first: int = 0
    second: int = 0
    shared: int = 0
    expected: float = 0.0
    variance: float = 0.0
    same_sign: int | None = 0
    opposite_sign: int | None = 0
    inner: float | None = 0.0
    first_energy: float | None = 0.0
    second_energy: float | None = 0.0
    between: float | None = 0.0

    @property
    def union(self) -> int:
        """Entries of at least one adapter."""
        return self.first + self.second - self.shared

    @property
    def jaccard(self) -> float | None:
        """``shared / union``; None without entries."""
        return self.shared / self.union if self.union else None

    @property
    def deviation(self) -> float:
        """The standard deviation of the number of shared entries for independent masks."""
        return math.sqrt(self.variance)

    @property
    def surprise(self) -> float | None:
        """The z-score of ``shared``: standard deviations above ``expected``; None if the variance is 0."""
        return (self.shared - self.expected) / self.deviation if self.variance > 0 else None

    @property
    def sign_agreement(self) -> float | None:
        """Share of same signs among shared entries with nonzero deltas; None if there are none."""
        if self.same_sign is None or self.opposite_sign is None or not self.same_sign + self.opposite_sign:
            return None
        return self.same_sign / (self.same_sign + self.opposite_sign)

    @property
    def cosine(self) -> float | None:
        """The cosine between the two deltas; None if one is zero."""
        if self.inner is None or self.first_energy is None or self.second_energy is None:
            return None
        return cosine(self.inner, self.first_energy, self.second_energy)

    @property
    def distances(self) -> tuple[float, float, float] | None:
        """L2 distances: first to second, first to base, second to base (the paper's table 13)."""
        if self.between is None or self.first_energy is None or self.second_energy is None:
            return None
        return math.sqrt(self.between), math.sqrt(self.first_energy), math.sqrt(self.second_energy)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; undefined ones are null."""
        names = ("between", "first_to_base", "second_to_base")
        return attributes(
            self, "elements", "first", "second", "shared", "jaccard", "expected_shared=expected", "deviation",
            "surprise", "same_sign", "opposite_sign", "sign_agreement", "cosine",
        ) | {"distances": None if self.distances is None else dict(zip(names, self.distances, strict=True))}  # fmt: skip


def overlap(a: SparseTensor | None, b: SparseTensor | None, *, values: bool = True) -> Overlap:
    """Compare the entries of one weight.

    Args:
        a: the first adapter's tensor; None if it does not adapt this weight.
        b: the second's; at least one must be given.
        values: compare deltas as well; ignored if either tensor is a mask.

    Raises:
        SourceError: the shapes differ, both are None, or a delta is not finite.
        BaseRequired: target values without base values.
        BaseMismatch: the two hold different base values for an entry, so they are not adapters of one base.
    """
    known = a if a is not None else b
    if known is None:
        raise SourceError("an overlap needs at least one tensor")
    if a is not None and b is not None and a.shape != b.shape:
        raise SourceError(
            f"tensor {a.name!r} has the shape {list(a.shape)}, but {list(b.shape)} in the other adapter"
        )
    none = np.empty(0, np.int64)
    of_a, of_b = (none if tensor is None else tensor.indices for tensor in (a, b))
    in_a, in_b = shared_positions(of_a, of_b)
    elements, shared = known.numel, int(in_a.size)
    expected, variance = _hypergeometric(elements, of_a.size, of_b.size)
    sizes = (elements, int(of_a.size), int(of_b.size), shared, expected, variance)
    if not values or any(tensor is not None and tensor.value_kind == "none" for tensor in (a, b)):
        return Overlap(*sizes, None, None, None, None, None, None)
    if a is not None and b is not None:
        _check_base(a, b, in_a, in_b)
    first, second = (np.empty(0) if tensor is None else delta_values(tensor) for tensor in (a, b))
    of_first = finite(_energy(first), f"tensor {known.name!r}: the energy of the first adapter's delta")
    of_second = finite(_energy(second), f"tensor {known.name!r}: the energy of the second adapter's delta")
    signs = np.sign(first[in_a]) * np.sign(second[in_b])
    # Summed directly: computed from energies and inner product, the distance of similar adapters would be rounding error.
    distance = _energy(first[in_a] - second[in_b])
    for own, met in ((first, in_a), (second, in_b)):
        alone = own.copy()
        alone[met] = 0
        distance += _energy(alone)
    return Overlap(
        *sizes, int(np.count_nonzero(signs > 0)), int(np.count_nonzero(signs < 0)),
        float(first[in_a] @ second[in_b]), of_first, of_second, distance,
    )  # fmt: skip


def _check_base(a: SparseTensor, b: SparseTensor, in_a: Array, in_b: Array) -> None:
    """Refuse two tensors whose base values differ at shared entries, if both hold base values."""
    if a.base is None or b.base is None or a.base.dtype != b.base.dtype:
        return
    other = np.flatnonzero(bits_differ(a.base[in_a], b.base[in_b]))
    if other.size:
        raise BaseMismatch(
            f"tensor {a.name!r}: the base values differ, first at flat index {int(a.indices[in_a[other[0]]])}: these are not adapters "
            "of one base"
        )


def shared_positions(a: Array, b: Array) -> tuple[Array, Array]:
    """The positions of common values in two strictly increasing integer arrays: int64 ``[shared]`` for each."""
    if not a.size or not b.size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if a.size > b.size:
        in_b, in_a = shared_positions(b, a)
        return in_a, in_b
    at = np.searchsorted(b, a)
    at[at == b.size] = 0
    meet = np.flatnonzero(b[at] == a)
    return meet, at[meet]


def cosine(inner: float, first: float, second: float) -> float | None:
    """``inner / sqrt(first * second)`` for two energies; None if one is 0."""
    # Two roots, since the product of two small energies may underflow.
    both = math.sqrt(first) * math.sqrt(second)
    return inner / both if both else None


def finite(value: float, what: str) -> float:
    """``value``, if it is finite.

    Raises:
        SourceError: it is infinite or NaN.
    """
    if not math.isfinite(value):
        raise SourceError(f"{what} is too large for float64")
    return value


def _hypergeometric(elements: int, first: int, second: int) -> tuple[float, float]:
    """Mean and variance of the number of elements that two random subsets of these sizes share."""
    if not elements:
        return 0.0, 0.0
    mean = first * second / elements
    if elements == 1:
        return mean, 0.0
    return mean, mean * ((elements - first) / elements) * ((elements - second) / (elements - 1))


def _energy(values: Array) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks
        return float(values @ values)
