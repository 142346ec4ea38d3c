"""The entries of several adapters on one weight, aligned: the union of their indices, and where each adapter's are in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core import fits
from shira_format._core.arrays import Array, Indices
from shira_format._core.compiled import union
from shira_format._core.dtypes import working_dtype
from shira_format.errors import BaseMismatch, SourceError
from shira_format.tensors import SparseTensor

Floats = npt.NDArray[np.float64]

# What an adapter's deltas are multiplied by: one factor for all of them, or one for each, float64 [nnz].
Factor = float | Floats


@dataclass(frozen=True)
class Contribution:
    """One adapter's part of a weight.

    Attributes:
        tensor: its entries; none if the adapter does not change the weight. Targets hold their base's values if these
            are known.
        weight: its strength, the adapter's own alpha included.
        label: the adapter's name in messages; empty: it has none.
    """

    tensor: SparseTensor
    weight: float = 1.0
    label: str = "an adapter"

    @property
    def what(self) -> str:
        """How messages about it start: adapter and tensor."""
        return self.about(self.tensor.name)

    def about(self, name: str) -> str:
        """How messages start if they call the tensor ``name``."""
        return f"{self.label}: tensor {name!r}" if self.label else f"tensor {name!r}"

    @property
    def fits_any_float(self) -> bool:
        """Whether these are deltas for a base of any float dtype and values (spec, section 4)."""
        return self.tensor.value_kind == "delta" and self.tensor.base_digest is None

    @cached_property
    def delta(self) -> Floats:
        """The deltas of its entries at strength 1: float64 ``[nnz]``.

        Raises:
            SourceError: a delta is NaN or infinite.
            BaseRequired: targets without their base's values.
        """
        if self.tensor.value_kind == "target" and self.tensor.base is None:
            raise fits.base_required(self.what)
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            values: Floats = self.tensor.values.astype(np.float64)
            if self.tensor.value_kind == "target":
                assert self.tensor.base is not None
                values -= self.tensor.base.astype(np.float64)
        if not np.isfinite(values).all():
            index = int(self.tensor.indices[np.flatnonzero(~np.isfinite(values))[0]])
            raise SourceError(f"{self.what}: the delta at flat index {index} is NaN or infinite")
        return values


@dataclass(frozen=True)
class AlignedEntries:
    """The contributions of several adapters to one weight.

    Attributes:
        parts: one for each adapter, one or more; in a merge also for adapters that do not change the weight, since some
            methods count them.
        dtype: the weight's; if all parts fit any base, a float dtype that holds all their values.
        indices: int64 ``[n]``, strictly increasing: the entries of all parts.
    """

    parts: Sequence[Contribution]
    dtype: np.dtype[Any]
    indices: Indices
    _places: Sequence[Indices] | None = None

    @classmethod
    def of(cls, parts: Sequence[Contribution]) -> AlignedEntries:
        """Align contributions to one weight.

        Raises:
            BaseMismatch: shapes or dtypes differ: these are not adapters of one base.
        """
        if len(parts) == 1:
            return cls(parts, parts[0].tensor.dtype, parts[0].tensor.indices)
        of_base = [part for part in parts if part.tensor.nnz and not part.fits_any_float] or list(parts)
        first = of_base[0]
        for part in parts:
            if part.tensor.shape != first.tensor.shape:
                differs = f"has shape {list(part.tensor.shape)}, and {list(first.tensor.shape)} in {first.label}"
            elif not part.fits_any_float and part.tensor.nnz and part.tensor.dtype != first.tensor.dtype:
                differs = f"is {part.tensor.dtype}, and {first.tensor.dtype} in {first.label}"
            else:
                continue
            raise BaseMismatch(f"{part.what} {differs}: these are not adapters of one base")
        dtypes = {part.tensor.dtype for part in of_base if part.tensor.nnz} or {first.tensor.dtype}
        return cls(parts, common_dtype(dtypes), *union([part.tensor.indices for part in parts]))

    @cached_property
    def places(self) -> Sequence[Indices]:
        """For each part the positions of its entries in :attr:`indices`: int64 ``[nnz]``."""
        return [np.arange(self.size, dtype=np.int64)] if self._places is None else self._places

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.parts[0].tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.parts[0].tensor.shape

    @property
    def numel(self) -> int:
        """The number of the weight's elements."""
        return self.parts[0].tensor.numel

    @property
    def size(self) -> int:
        """The number of entries in :attr:`indices`."""
        return int(self.indices.size)

    @property
    def weights(self) -> Floats:
        """The weights of all parts: float64 ``[parts]``."""
        return np.array([part.weight for part in self.parts])

    @property
    def deltas(self) -> list[Floats]:
        """Each part's deltas, at its own entries and without its weight."""
        return [part.delta for part in self.parts]

    def of_part(self, number: int, values: Array) -> Array:
        """Of ``values``, ``[n]``, those at the entries of one part: ``[nnz]``; not a copy if there is one part."""
        return values if self._places is None else np.asarray(values[self._places[number]])

    def sum(self, values: Sequence[Array | float]) -> Floats:
        """For each entry the sum over the parts: float64 ``[n]``, from ``[nnz]`` (or one number) for each part."""
        total = np.zeros(self.size)
        for at, own in zip(self.places, values, strict=True):
            total[at] += own  # a part has no entry twice
        return total

    @cached_property
    def counts(self) -> npt.NDArray[np.int32]:
        """The number of parts that have each entry: int32 ``[n]``."""
        counts = np.zeros(self.size, np.int32)
        for at in self.places:
            counts[at] += 1
        return counts


def common_dtype(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """The dtype of all; of several float32, or float64 if one is float64."""
    return (
        next(iter(dtypes)) if len(dtypes) == 1 else max(map(working_dtype, dtypes), key=lambda one: one.itemsize)
    )
