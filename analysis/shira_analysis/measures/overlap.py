"""Where two adapters change the same entries, whether in the same direction, and how far apart they lie."""

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

    What is said of values is None if the positions alone were compared, as of masks.

    Attributes:
        elements: of the weights.
        first: entries of the first adapter.
        second: entries of the second.
        shared: entries that both have.
        expected: shared entries to expect of two masks of these sizes that know nothing of each other.
        variance: the variance of that number. Both are of the hypergeometric distribution, in each weight for itself.
        same_sign: shared entries that both raise or both lower.
        opposite_sign: shared entries that one raises and the other lowers; a delta of 0 has no sign.
        inner: the inner product of the two deltas.
        first_energy: ``||D1||^2``, the squared distance of the first from the base.
        second_energy: ``||D2||^2``.
        between: ``||D1 - D2||^2``, the squared distance of the two from each other.
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
        """Entries that at least one has."""
        return self.first + self.second - self.shared

    @property
    def jaccard(self) -> float | None:
        """``shared / union``; None without entries."""
        return self.shared / self.union if self.union else None

    @property
    def deviation(self) -> float:
        """The standard deviation of the number of shared entries, if the masks know nothing of each other."""
        return math.sqrt(self.variance)

    @property
    def surprise(self) -> float | None:
        """By how many standard deviations more entries are shared than expected; None if their number is certain."""
        return (self.shared - self.expected) / self.deviation if self.variance > 0 else None

    @property
    def sign_agreement(self) -> float | None:
        """Share of the shared entries with two signs in which these are the same; None if there are none."""
        if self.same_sign is None or self.opposite_sign is None or not self.same_sign + self.opposite_sign:
            return None
        return self.same_sign / (self.same_sign + self.opposite_sign)

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two deltas; None if one is zero."""
        if self.inner is None or self.first_energy is None or self.second_energy is None:
            return None
        return cosine(self.inner, self.first_energy, self.second_energy)

    @property
    def distances(self) -> tuple[float, float, float] | None:
        """L2: of the two adapted models, of the first and the base, of the second and the base (the paper's table 13)."""
        if self.between is None or self.first_energy is None or self.second_energy is None:
            return None
        return math.sqrt(self.between), math.sqrt(self.first_energy), math.sqrt(self.second_energy)

    def as_json(self) -> dict[str, Any]:
        """Counts and what follows from them; what is undefined is null."""
        names = ("between", "first_to_base", "second_to_base")
        return attributes(
            self, "elements", "first", "second", "shared", "jaccard", "expected_shared=expected", "deviation",
            "surprise", "same_sign", "opposite_sign", "sign_agreement", "cosine",
        ) | {"distances": None if self.distances is None else dict(zip(names, self.distances, strict=True))}  # fmt: skip


def overlap(a: SparseTensor | None, b: SparseTensor | None, *, values: bool = True) -> Overlap:
    """Compare the entries of one weight.

    Args:
        a: of the first adapter; None if it leaves this weight alone.
        b: of the second; not None as well.
        values: whether to compare deltas; a mask has none, so that positions alone are compared if one is a mask.

    Raises:
        SourceError: the shapes differ, both are None, or a delta is not finite.
        BaseRequired: target values without those of the base.
        BaseMismatch: the two hold other base values of one entry, so that they are not adapters of one base.
    """
    known = a if a is not None else b
    if known is None:
        raise SourceError("an overlap of nothing with nothing")
    if a is not None and b is not None and a.shape != b.shape:
        raise SourceError(
            f"tensor {a.name!r} has the shape {list(a.shape)}, and {list(b.shape)} in the other adapter"
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
    # The distance by its own sum: from the energies and the inner product, that of two like adapters would be rounding.
    apart = _energy(first[in_a] - second[in_b])
    for own, met in ((first, in_a), (second, in_b)):
        alone = own.copy()
        alone[met] = 0
        apart += _energy(alone)
    return Overlap(
        *sizes, int(np.count_nonzero(signs > 0)), int(np.count_nonzero(signs < 0)),
        float(first[in_a] @ second[in_b]), of_first, of_second, apart,
    )  # fmt: skip


def _check_base(a: SparseTensor, b: SparseTensor, in_a: Array, in_b: Array) -> None:
    """Refuse two tensors that say different things of the base, where both say something."""
    if a.base is None or b.base is None or a.base.dtype != b.base.dtype:
        return
    other = np.flatnonzero(bits_differ(a.base[in_a], b.base[in_b]))
    if other.size:
        raise BaseMismatch(
            f"tensor {a.name!r}: other base values, first at flat index {int(a.indices[in_a[other[0]]])}: these are not adapters "
            "of one base"
        )


def shared_positions(a: Array, b: Array) -> tuple[Array, Array]:
    """Where two strictly increasing lists of integers meet: the positions in each, int64 ``[shared]``."""
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
    # Two roots: the product of two small energies may vanish where they do not.
    both = math.sqrt(first) * math.sqrt(second)
    return inner / both if both else None


def finite(value: float, what: str) -> float:
    """``value``, if float64 could hold it.

    Raises:
        SourceError: it is infinite or NaN.
    """
    if not math.isfinite(value):
        raise SourceError(f"{what} is too large for float64")
    return value


def _hypergeometric(elements: int, first: int, second: int) -> tuple[float, float]:
    """Mean and variance of the number of elements that a random choice of each size has in common."""
    if not elements:
        return 0.0, 0.0
    mean = first * second / elements
    if elements == 1:
        return mean, 0.0
    return mean, mean * ((elements - first) / elements) * ((elements - second) / (elements - 1))


def _energy(values: Array) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # told by whoever asks
        return float(values @ values)
