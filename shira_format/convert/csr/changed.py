"""Tensors of matrices that were changed, or that have no original; see rules 2 to 5 of :mod:`shira_format.convert.csr`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices, array_digest, sum_of_squares
from shira_format._core.dtypes import dtype_name, working_dtype
from shira_format._core.fits import check_values
from shira_format.checkpoints import Checkpoint
from shira_format.convert.csr.folder import Item
from shira_format.convert.effect import Effect
from shira_format.entries.base_check import check_frame
from shira_format.entries.values import difference, wide
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor


@dataclass
class ChangedMatrix:
    """A matrix that was changed, or has no original."""

    item: Item
    indices: Indices
    data: Array
    same_entries: bool
    before: SparseTensor | None
    base: Checkpoint | None
    self_contained: bool

    def tensor(self) -> SparseTensor:
        """The tensor by rules 2 to 5 of the package."""
        item = self.item
        if item.values == "none":
            if not (self.data == 1).all():
                raise SourceError(
                    "a mask whose data are not all 1; for values set 'values' to 'delta' or 'target'"
                )
            return SparseTensor(item.name, item.shape, self.indices, value_kind="none", dtype=item.dtype)
        start = self._start
        known = item.digests.get("base") if self.same_entries else None
        if start is not None:
            known = array_digest(start)
        elif self.self_contained:
            raise SourceError("the base's values at its entries are not available: pass --base")
        if item.values == "delta" and start is None:
            return self._deltas(known)
        if known is None:
            raise SourceError("targets whose base values are not known: pass --base")
        dtype = item.dtype if start is None else start.dtype
        target = self._kept(self._rounded(dtype, start), start)
        keep = start is not None and (
            self.self_contained or (self.before is not None and self.before.base is not None)
        )
        return SparseTensor(
            item.name, item.shape, self.indices, target, base=start if keep else None, base_digest=known, **self._frame(),
        )  # fmt: skip

    def effect(self, tensor: SparseTensor) -> Effect | None:
        """What the matrix asks for, and what the targets of :meth:`tensor` change; None if it stays deltas, or has targets."""
        if self.item.values != "delta" or tensor.value_kind != "target" or self._start is None:
            return None
        start = wide(self._start)
        with np.errstate(over="ignore", invalid="ignore"):  # where both are infinite, nothing moves
            moved = wide(tensor.values) - start
        moved[~np.isfinite(start)] = 0
        return Effect(self.item.name, sum_of_squares(self.data), sum_of_squares(moved))

    def _frame(self) -> dict[str, Any]:
        """What a patch changes of the tensor beyond its entries."""
        if self.before is None:
            return {}
        return {"base_name": self.before.base_name, "rows": self.before.rows, "new_rows": self.before.new_rows}

    def _deltas(self, known: str | None) -> SparseTensor:
        item, before = self.item, self.before
        values = self.data
        if before is not None and before.value_kind == "delta":
            values = exactly(values, before.values.dtype)
        if known is None and before is not None and before.is_patch:
            raise SourceError("part of a patch, whose entries were changed: pass --base")
        dtype = values.dtype if known is None else item.dtype
        return SparseTensor(
            item.name,
            item.shape,
            self.indices,
            values,
            value_kind="delta",
            dtype=dtype,
            base_digest=known,
            **self._frame(),
        )

    @cached_property
    def _start(self) -> Array | None:
        """The base's values at the entries, if they are available."""
        item, before = self.item, self.before
        known = None if before is None else before.base
        here, there = self._common
        if self.base is None:
            return known[there] if known is not None and here.size == self.indices.size else None
        origin = item.name if before is None else before.base_name
        seen = item.digests.get("base")
        any_float = item.values == "delta" and seen is None
        check_frame(f"tensor {item.name!r}", origin, item.shape, item.dtype, self.base, any_float=any_float)
        found = self.base.at(origin, self.indices)
        what, where = f"tensor {item.name!r}", f"the base {self.base.path}"
        if self.same_entries:
            check_values(what, seen, array_digest(found), where)
        if known is not None:
            check_values(what, array_digest(known[there]), array_digest(found[here]), where)
        return found

    @cached_property
    def _common(self) -> tuple[Indices, Indices]:
        """Positions, among the entries and among the original's, of the entries that both have."""
        if self.before is None or self.before.nnz == 0:
            none = np.empty(0, np.int64)
            return none, none
        near = np.searchsorted(self.before.indices, self.indices).clip(max=self.before.nnz - 1)
        both = self.before.indices[near] == self.indices
        return np.flatnonzero(both), near[both]

    def _rounded(self, dtype: np.dtype[Any], start: Array | None) -> Array:
        """The targets, as spec 4.1 has it."""
        work = working_dtype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is checked below
            sums = self.data.astype(work)
            finite = np.isfinite(self.data)
            if self.item.values == "delta":
                assert start is not None
                origin = wide(start)
                sums += origin
                finite &= np.isfinite(origin)
            target = sums.astype(dtype)
            bad = np.flatnonzero(finite & ~np.isfinite(target.astype(work)))
        if bad.size:
            raise SourceError(f"a target overflows {dtype_name(dtype)} at flat index {self.indices[bad[0]]}")
        return np.asarray(target)

    def _kept(self, target: Array, start: Array | None) -> Array:
        """``target``, with the original's bits where the data are unchanged."""
        before = self.before
        if before is None or before.value_kind != "target" or before.dtype != target.dtype:
            return target
        here, there = self._common
        stored = before.values[there]
        if self.item.values == "delta":
            assert start is not None
            written = difference(stored, start[here])
        else:
            written = wide(stored)
        with np.errstate(over="ignore", invalid="ignore"):
            now = self.data[here].astype(written.dtype)
        unsigned = np.dtype(f"u{written.itemsize}")
        same = written.view(unsigned) == now.view(unsigned)
        target[here[same]] = stored[same]
        return target


def exactly(data: Array, dtype: np.dtype[Any]) -> Array:
    """``data`` in ``dtype`` if that is exact, else unchanged."""
    if data.dtype == dtype:
        return data
    with np.errstate(over="ignore", invalid="ignore"):
        cast = data.astype(dtype)
        return cast if np.array_equal(cast.astype(data.dtype), data, equal_nan=True) else data
