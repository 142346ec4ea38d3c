"""What a mask of a matrix looks like (whole rows, whole columns, the rest), and the gradient of a product at its entries.

For ``y = x W^T`` with ``W[m, n]``, the gradient at entry ``(i, j)`` is ``sum_t dy[t, i] x[t, j]``. Whole rows and whole columns
are dense products of the slices that they need. The rest is computed entry by entry (``torch.sparse.sampled_addmm``) where it
is sparse, and is gathered from the dense product, which is dropped at once, where it is not.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from shira_format._core.arrays import Array, Indices
from shira_format.training.sampling import is_compiled, multiplied, sampled_product

Method = Literal["auto", "sampled", "dense"]
METHODS: tuple[Method, ...] = ("auto", "sampled", "dense")

# Measured on one core with AVX-512, matrices of 384 x 384 to 2816 x 1024: below these densities of the rest, entry by entry is
# faster than the dense product. That is a rule and not a race at each start, so that a run can be repeated to the bit.
_SAMPLED_BELOW = {torch.float32: 0.2, torch.float64: 0.2}
# Of bf16 and fp16, whose dense product is faster, and which are sampled in float32: by our compiled loops, and without them.
_SAMPLED_BELOW_HALF = (0.12, 0.06)

# Columns of the inputs are copied and kept, rather than all of them, if they are at most this share.
_NARROW = 0.25

_numbers = itertools.count()
_known: WeakValueDictionary[int, MatrixPattern] = WeakValueDictionary()


class MatrixPattern:
    """The entries of one matrix, taken apart; it never changes.

    Attributes:
        shape: rows and columns.
        indices: ``[K]``, flat, strictly increasing.
        method: how the rest is computed; ``"auto"`` chooses by its density and the dtype.
        number: identifies it within the process.
        rows: ``[R]``: rows that are whole.
        columns: ``[C]``: columns of which all entries outside of whole rows are there.
        inputs: columns that have entries, if they are few; None if all inputs are kept.
    """

    def __init__(self, shape: tuple[int, int], indices: Indices, method: Method = "auto") -> None:
        """Raises ValueError for an unknown method."""
        if method not in METHODS:
            raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
        self.shape, self.indices, self.method = shape, indices, method
        self.number = next(_numbers)
        _known[self.number] = self
        m, n = shape
        row, column = self.row, self.column
        self.rows: Array = np.flatnonzero(np.bincount(row, minlength=m) == n) if n else _NONE
        outside = ~_among(row, self.rows, m)
        counts = np.bincount(column[outside], minlength=n)
        self.columns: Array = np.flatnonzero(counts == m - len(self.rows)) if len(self.rows) < m else _NONE
        self.rest_size = int(np.count_nonzero(outside & ~_among(column, self.columns, n)))
        used = np.flatnonzero(np.bincount(column, minlength=n))
        self.inputs: Array | None = used if len(used) <= _NARROW * n else None
        self._placed: dict[torch.device, _Placed] = {}
        self._indices_on: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: Any) -> MatrixPattern:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return MatrixPattern, (self.shape, self.indices, self.method)

    @property
    def row(self) -> Array:
        """``[K]``: the row of each entry."""
        return self.indices // self.shape[1]

    @property
    def column(self) -> Array:
        """``[K]``: the column of each entry."""
        return self.indices % self.shape[1]

    def is_sampled(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the rest is computed entry by entry, for factors of ``dtype``."""
        if self.method != "auto":
            return self.method == "sampled"
        limit = _SAMPLED_BELOW.get(dtype)
        if limit is None:
            limit = _SAMPLED_BELOW_HALF[0 if is_compiled(device, dtype) else 1]
        return self.rest_size <= limit * self.shape[0] * self.shape[1]

    def describe(self) -> str:
        """In a few words, for people."""
        parts = [f"{len(self.rows)} rows"] * bool(len(self.rows)) + [f"{len(self.columns)} columns"] * bool(
            len(self.columns)
        )
        parts += [f"{self.rest_size} entries"] * bool(self.rest_size)
        return ", ".join(parts) or "no entries"

    def kept_inputs(self, x: Tensor) -> Tensor:
        """What of ``x[T, n]`` the gradient needs: itself, or a copy of the few columns that have entries."""
        if self.inputs is None:
            return x
        return x.index_select(1, self.on(x.device).inputs)

    def index_on(self, device: torch.device) -> Tensor:
        """``indices`` on a device; made once."""
        if device not in self._indices_on:
            self._indices_on[device] = _tensor(self.indices, device)
        return self._indices_on[device]

    def on(self, device: torch.device) -> _Placed:
        """Its index tensors on a device; made once."""
        if device not in self._placed:
            self._placed[device] = _Placed(self, device)
        return self._placed[device]


_NONE: Array = np.empty(0, np.int64)


def _among(values: Array, chosen: Array, size: int) -> Array:
    """Which of ``values``, all below ``size``, are among ``chosen``."""
    flags = np.zeros(size, bool)
    flags[chosen] = True
    return np.asarray(flags[values])


def _tensor(array: Array, device: torch.device) -> Tensor:
    """``array`` on a device; on the CPU in the same memory, which no one writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class _Placed:
    """The index tensors of a pattern on one device, in terms of :meth:`MatrixPattern.kept_inputs`."""

    def __init__(self, pattern: MatrixPattern, device: torch.device) -> None:
        m, n = pattern.shape
        self._device = device
        self.size = len(pattern.indices)
        self.inputs, self.width = self._put(_NONE), n
        renumbered: Array | None = None
        if pattern.inputs is not None:
            renumbered = np.zeros(n, np.int64)
            renumbered[pattern.inputs] = np.arange(len(pattern.inputs))
            self.inputs, self.width = self._put(pattern.inputs), len(pattern.inputs)

        def kept(columns: Array) -> Array:
            return columns if renumbered is None else np.asarray(renumbered[columns])

        row, column = pattern.row, pattern.column
        in_rows = _among(row, pattern.rows, m)
        in_columns = ~in_rows & _among(column, pattern.columns, n)
        rest = np.flatnonzero(~in_rows & ~in_columns)
        order = np.zeros(n, np.int64)
        order[pattern.columns] = np.arange(len(pattern.columns))
        self.only_rows = bool(in_rows.all()) and self.size > 0
        self.only_rest = len(rest) == self.size
        self.rows, self.columns = self._put(pattern.rows), self._put(kept(pattern.columns))
        self.rows_at = self._put(_NONE if self.only_rows else np.flatnonzero(in_rows))
        self.columns_at = self._put(np.flatnonzero(in_columns))
        self.columns_from = self._put(row[in_columns] * len(pattern.columns) + order[column[in_columns]])
        self.rest_at = self._put(_NONE if self.only_rest else rest)
        # The rest as a matrix in compressed rows; 32 bits suffice, or else 64 for both.
        kind = np.int32 if max(len(rest), self.width) < 1 << 31 else np.int64
        starts = np.zeros(m + 1, np.int64)
        starts[1:] = np.cumsum(np.bincount(row[rest], minlength=m))
        self.starts, self.places = self._put(starts.astype(kind)), self._put(kept(column[rest]).astype(kind))

    def flat(self) -> Tensor:
        """``[S]``: the rest within the product of the gradient and what is kept of the inputs."""
        counts = self.starts.diff().to(torch.int64)
        row = torch.arange(len(counts), device=self._device).repeat_interleave(counts)
        return row * self.width + self.places

    def _put(self, array: Array) -> Tensor:
        return _tensor(array, self._device)


def gradient(outer: Tensor, inner: Tensor, pattern: MatrixPattern) -> Tensor:
    """``outer^T inner`` at the entries of ``pattern``: ``[K]``, in the dtype of the factors, float32 where it is sampled.

    Args:
        outer: ``[T, m]``, the gradient of the output.
        inner: what :meth:`MatrixPattern.kept_inputs` gave: ``[T, n]`` or fewer columns, of the same dtype.
        pattern: the entries.
    """
    at = pattern.on(outer.device)
    if at.only_rows:
        return multiplied(outer.index_select(1, at.rows).t(), inner).reshape(-1)
    sampled = len(at.places) > 0 and pattern.is_sampled(outer.dtype, outer.device)
    if at.only_rest:
        return _rest(outer, inner, at, sampled=sampled)
    found = torch.empty(at.size, dtype=outer.dtype if not sampled else _sampling(outer.dtype), device=outer.device)
    if len(at.rows):
        found[at.rows_at] = multiplied(outer.index_select(1, at.rows).t(), inner).reshape(-1).to(found.dtype)
    if len(at.columns):
        product = multiplied(outer.t(), inner.index_select(1, at.columns))
        found[at.columns_at] = product.reshape(-1)[at.columns_from].to(found.dtype)
    if len(at.rest_at):
        found[at.rest_at] = _rest(outer, inner, at, sampled=sampled).to(found.dtype)
    return found


def _rest(outer: Tensor, inner: Tensor, at: _Placed, *, sampled: bool) -> Tensor:
    if not sampled:
        return multiplied(outer.t(), inner).reshape(-1).index_select(0, at.flat())
    return sampled_product(outer, inner, at.starts, at.places)


def _sampling(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _SAMPLED_BELOW else torch.float32


@torch.library.custom_op("shira_format::gradient_at_entries", mutates_args=())
def _opaque(outer: Tensor, inner: Tensor, number: int, size: int) -> Tensor:  # noqa: ARG001 - of the shape alone
    found = gradient(outer, inner, _known[number])
    return found.to(_gradient_dtype(outer.dtype)).contiguous()


@_opaque.register_fake
def _(outer: Tensor, inner: Tensor, number: int, size: int) -> Tensor:  # noqa: ARG001 - the operator's arguments
    return outer.new_empty(size, dtype=_gradient_dtype(outer.dtype))


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def gradient_at(outer: Tensor, inner: Tensor, pattern: MatrixPattern) -> Tensor:
    """As :func:`gradient`, as one operator that ``torch.compile`` does not look into; ``[K]`` in float32 (or float64)."""
    found: Tensor = _opaque(outer, inner, pattern.number, len(pattern.indices))
    return found
