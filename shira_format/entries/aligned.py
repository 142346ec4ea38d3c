"""One weight as several adapters see it: the entries that any of them has, and what each would add there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array, Indices
from shira_format._core.compiled import union
from shira_format._core.dtypes import working_dtype
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.tensors import SparseTensor

Floats = npt.NDArray[np.float64]

# What a method gives an input's deltas: one factor for all of them, or one for each, float64 [nnz].
Factor = float | Floats


@dataclass(frozen=True)
class Contribution:
    """One adapter's part of a weight.

    Attributes:
        tensor: its entries, without any where the adapter leaves the weight alone; targets have their base values, if
            anything does.
        weight: its strength in the merge, its own alpha included.
        label: what messages call the adapter.
    """

    tensor: SparseTensor
    weight: float = 1.0
    label: str = "an adapter"

    @property
    def free(self) -> bool:
        """Whether these are deltas for a base of any dtype (spec, section 4)."""
        return self.tensor.value_kind == "delta" and self.tensor.base_digest is None

    def needs_base(self) -> BaseRequired:
        """The error that nothing tells the base's values."""
        return BaseRequired(
            f"{self.label}: tensor {self.tensor.name!r}: the base's values at its entries are not known: pass the base "
            "(--base), or convert with --self-contained"
        )

    @cached_property
    def delta(self) -> Floats:
        """What the adapter adds at its entries at strength 1: float64 ``[nnz]``.

        Raises:
            SourceError: a delta that is NaN or infinite.
            BaseRequired: targets without their base's values.
        """
        if self.tensor.value_kind == "target" and self.tensor.base is None:
            raise self.needs_base()
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            values: Floats = self.tensor.values.astype(np.float64)
            if self.tensor.value_kind == "target":
                assert self.tensor.base is not None
                values -= self.tensor.base.astype(np.float64)
        if not np.isfinite(values).all():
            index = int(self.tensor.indices[np.flatnonzero(~np.isfinite(values))[0]])
            raise SourceError(
                f"{self.label}: tensor {self.tensor.name!r}: the delta at flat index {index} is NaN or infinite"
            )
        return values


@dataclass(frozen=True)
class AlignedEntries:
    """The parts of one weight; every adapter of the merge has one, so that the methods can count them.

    Attributes:
        parts: in the order of the adapters.
        dtype: of the weight; of deltas that fit any base, one that holds them all.
        indices: int64 ``[n]``: the entries that any part has, rising.
        places: for each part, where among these its entries are, int64 ``[nnz]``.
    """

    parts: Sequence[Contribution]
    dtype: np.dtype[Any]
    indices: Indices
    places: Sequence[Indices]

    @classmethod
    def of(cls, parts: Sequence[Contribution]) -> AlignedEntries:
        """Join parts of one weight.

        Raises:
            BaseMismatch: shapes or dtypes differ, or base values where entries meet: these are not of one base.
        """
        bound = [part for part in parts if part.tensor.nnz and not part.free] or list(parts)
        first = bound[0]
        for part in parts:
            if part.tensor.shape != first.tensor.shape:
                told = f"has the shape {list(part.tensor.shape)}, and {list(first.tensor.shape)} in {first.label}"
            elif not part.free and part.tensor.nnz and part.tensor.dtype != first.tensor.dtype:
                told = f"is of {part.tensor.dtype}, and of {first.tensor.dtype} in {first.label}"
            else:
                continue
            raise BaseMismatch(
                f"{part.label}: tensor {part.tensor.name!r} {told}: these are not adapters of one base"
            )
        dtypes = {part.tensor.dtype for part in bound if part.tensor.nnz} or {first.tensor.dtype}
        dtype = dtypes.pop() if len(dtypes) == 1 else max(map(working_dtype, dtypes), key=lambda one: one.itemsize)
        indices, places = union([part.tensor.indices for part in parts])
        return cls(parts, dtype, indices, places)

    @property
    def name(self) -> str:
        """Of the weight."""
        return self.parts[0].tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.parts[0].tensor.shape

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.parts[0].tensor.numel

    @property
    def size(self) -> int:
        """How many entries any part has."""
        return int(self.indices.size)

    @property
    def weights(self) -> Floats:
        """Of all parts: float64 ``[parts]``."""
        return np.array([part.weight for part in self.parts])

    @property
    def deltas(self) -> list[Floats]:
        """Of each part, at its own entries, without its weight."""
        return [part.delta for part in self.parts]

    def sum(self, values: Sequence[Array | float]) -> Floats:
        """For each entry the sum of what the parts that have it give: float64 ``[n]`` from ``[nnz]`` (or one number) each."""
        total = np.zeros(self.size)
        for at, here in zip(self.places, values, strict=True):
            total[at] += here  # no entry occurs twice in a part
        return total

    @cached_property
    def touches(self) -> npt.NDArray[np.int64]:
        """How many parts have each entry: int64 ``[n]``."""
        count = np.zeros(self.size, np.int64)
        for at in self.places:
            count[at] += 1
        return count
