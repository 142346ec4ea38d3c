"""The two kinds of tensor in an adapter, sparse and dense: immutable, and checked when they are made."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shira_format._core import fits
from shira_format._core.arrays import Array, array_digest, as_array, as_bytes, frozen, owned
from shira_format._core.compiled import is_strictly_increasing, mixed
from shira_format._core.dtypes import dtype_name, is_float, with_one_nan, working_dtype
from shira_format.errors import FormatError

ValueKind = Literal["target", "delta", "none"]

MAX_NUMEL = 2**53 - 1  # every index stays exact in a JSON number and in a float64
MAX_RANK = 64
TOO_LARGE = "the product of its dimensions, zeros left out, is above 2^53 - 1"  # of a shape, in messages


def numel(shape: tuple[int, ...]) -> int:
    """The number of elements of ``shape``: the product of its dimensions, exact at any size."""
    return math.prod(shape)


def is_too_large(shape: tuple[int, ...]) -> bool:
    """Whether the product of the dimensions, zeros left out, is above 2^53 - 1 (rule ``shape-overflow``)."""
    size = math.prod(shape)
    return size > MAX_NUMEL or (size == 0 and math.prod(filter(None, shape)) > MAX_NUMEL)


def density(nnz: int, elements: int) -> float:
    """``nnz / elements``; 0 for a weight without elements."""
    return nnz / elements if elements else 0.0


class Totals:
    """Sums over the ``tensors`` of a report, each of which has ``nnz`` and ``numel``."""

    tensors: Any

    @property
    def nnz(self) -> int:
        """Entries of all tensors."""
        return sum(tensor.nnz for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def density(self) -> float:
        """Entries of all tensors over their elements; 0 without elements."""
        return density(self.nnz, self.numel)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrix view of ``shape`` (spec, section 1): axis 0 against all others."""
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


class _Immutable:
    """Its attributes are set once, by ``object.__setattr__``."""

    __slots__ = ()

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; cannot set {key}")

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; cannot delete {key}")


class SparseTensor(_Immutable):
    """The entries of one weight that an adapter sets.

    Attributes:
        name: the weight's name in the base's checkpoint.
        shape: its shape, any rank.
        dtype: its dtype in the base, a float numpy dtype (``ml_dtypes`` for bfloat16 and float8).
        indices: int64 ``[nnz]``: flat row-major, strictly increasing, read-only.
        value_kind: what the values are: ``"target"`` (what the entries become), ``"delta"`` (what is added to them) or
            ``"none"`` (a mask).
        base: ``[nnz]`` values of the base at the entries, in ``dtype``; None if the adapter does not hold them.
        base_digest: SHA-256 of those values; None if it is not known.
        base_name: the base's tensor from which this one is made: ``name``, unless a patch renames or copies tensors (spec,
            section 3.5). ``shape``, ``dtype`` and ``base`` are about that tensor.
        rows: size of dimension 0 of the result; None: that of ``shape``.
        new_rows: ``[rows - shape[0], *shape[1:]]``, the rows that a longer result has in addition; else None.
        result_digest: SHA-256 of the whole result at strength 1, or None.
    """

    __slots__ = (
        "_values", "base", "base_digest", "base_name", "dtype", "indices", "name", "new_rows",
        "result_digest", "rows", "shape", "value_kind",
    )  # fmt: skip

    name: str
    base_name: str
    rows: int | None
    new_rows: Array | None
    result_digest: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    indices: npt.NDArray[np.int64]
    value_kind: ValueKind
    base: Array | None
    base_digest: str | None
    _values: Array | None

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        indices: Any,
        values: Any = None,
        *,
        value_kind: ValueKind = "target",
        dtype: Any = None,
        base: Any = None,
        base_digest: str | None = None,
        base_name: str | None = None,
        rows: int | None = None,
        new_rows: Any = None,
        result_digest: str | None = None,
    ) -> None:
        """Check and store one tensor's entries; arrays are copied, unless nothing can change them any more.

        Args:
            name: the weight's name in the base's checkpoint.
            shape: the weight's shape.
            indices: ``[nnz]`` integers, flat row-major, strictly increasing.
            values: ``[nnz]`` floats, numpy or torch; None for a mask (``value_kind="none"``).
            value_kind: see the class.
            dtype: the weight's dtype; by default that of ``values``, which targets must have.
            base: ``[nnz]`` values of the base at the entries.
            base_digest: their SHA-256; computed if ``base`` is given.
            base_name: see the class; by default ``name``.
            rows: see the class.
            new_rows: see the class.
            result_digest: see the class.

        Raises:
            FormatError: a rule of the format is broken; ``rule`` says which.
        """
        if value_kind not in ("target", "delta", "none"):
            raise FormatError("manifest-schema", f"value_kind {value_kind!r}", tensor=name)
        set_ = object.__setattr__
        set_(self, "name", name)
        set_(self, "shape", tuple(int(n) for n in shape))
        set_(self, "value_kind", value_kind)
        set_(self, "indices", _checked_indices(name, self.shape, indices))
        if (values is None) != (value_kind == "none"):
            raise FormatError("count-mismatch", f"a {value_kind} tensor with values={values}", tensor=name)
        set_(self, "_values", None if values is None else owned(as_array(values)))
        set_(self, "dtype", np.dtype(dtype if dtype is not None else self._guess_dtype()))
        set_(self, "base", None if base is None else owned(as_array(base)))
        if self.base is not None:
            base_digest = array_digest(self.base)
        set_(self, "base_digest", base_digest)
        set_(self, "base_name", name if base_name is None else base_name)
        set_(self, "rows", None if rows is None else int(rows))
        set_(self, "new_rows", None if new_rows is None else owned(as_array(new_rows)))
        set_(self, "result_digest", result_digest)
        self._check_values()
        self._check_rows()

    def _guess_dtype(self) -> Any:
        return np.dtype(np.float32) if self._values is None else self._values.dtype

    def _check_values(self) -> None:
        if not is_float(self.dtype):
            raise FormatError("sparse-dtype", f"dtype {self.dtype} is not a float dtype", tensor=self.name)
        for what, array in (("values", self._values), ("base", self.base)):
            if array is None:
                continue
            if array.shape != (self.nnz,):
                raise FormatError(
                    "count-mismatch",
                    f"{what} of shape {list(array.shape)} for {self.nnz} indices",
                    tensor=self.name,
                )
            same = array.dtype == self.dtype
            if not (same or (what == "values" and self.value_kind == "delta" and is_float(array.dtype))):
                raise FormatError(
                    "stream-dtype",
                    f"{what} of dtype {array.dtype} in a tensor of {self.dtype}",
                    tensor=self.name,
                )
        if self.value_kind == "none" and self.base_digest is not None:
            raise FormatError("manifest-schema", "a mask has no base values", tensor=self.name)
        if self.value_kind == "delta" and self.base_digest is None and self._guess_dtype() != self.dtype:
            raise FormatError(
                "stream-dtype",
                f"deltas in {self._guess_dtype()} for a base of {self.dtype} that has no digest",
                tensor=self.name,
            )

    def _check_rows(self) -> None:
        if self.result_digest is not None and self.value_kind != "target":
            raise FormatError("manifest-schema", "a result digest without target values", tensor=self.name)
        if self.rows is None:
            if self.new_rows is not None:
                raise FormatError("stray-stream", "new rows without a number of rows", tensor=self.name)
            return
        if not self.shape or self.rows < 0 or self.value_kind == "none":
            raise FormatError("manifest-schema", f"rows {self.rows} of a {self.value_kind} tensor of shape {list(self.shape)}", tensor=self.name)  # fmt: skip
        if is_too_large(self.result_shape):
            raise FormatError("shape-overflow", f"a result of {self.rows} rows: {TOO_LARGE}", tensor=self.name)
        more = self.rows - self.shape[0]
        if (more > 0) != (self.new_rows is not None):
            rule = "missing-stream" if more > 0 else "stray-stream"
            raise FormatError(rule, f"{self.rows} rows for a base of {self.shape[0]}", tensor=self.name)
        if self.new_rows is not None:
            if self.new_rows.dtype != self.dtype or self.new_rows.ndim != len(self.shape):
                raise FormatError("stream-dtype", "new rows of another dtype or rank", tensor=self.name)
            if self.new_rows.shape != (more, *self.shape[1:]):
                raise FormatError(
                    "count-mismatch", f"new rows of shape {list(self.new_rows.shape)}", tensor=self.name
                )
        if more < 0 and self.nnz and self.indices[-1] >= numel(self.result_shape):
            raise FormatError("out-of-range", f"index {self.indices[-1]} is in the rows that are removed", tensor=self.name)  # fmt: skip

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The shape of the result: ``shape``, with ``rows`` rows if a patch resizes the tensor."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    @property
    def is_patch(self) -> bool:
        """Whether the tensor is made from one of another name or size (feature ``patch``)."""
        return self.base_name != self.name or self.rows is not None

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle's default needs setattr; adapters are sent between processes.
        return _rebuild, (
            self.name, self.shape, self.indices, self._values, self.value_kind, self.dtype, self.base, self.base_digest,
            self.base_name, self.rows, self.new_rows, self.result_digest,
        )  # fmt: skip

    @property
    def nnz(self) -> int:
        """The number of entries."""
        return int(self.indices.size)

    @property
    def numel(self) -> int:
        """The number of elements of the weight."""
        return numel(self.shape)

    @property
    def density(self) -> float:
        """``nnz / numel``; 0 for a weight without elements."""
        return density(self.nnz, self.numel)

    @property
    def values(self) -> Array:
        """``[nnz]`` targets in ``dtype``, or deltas in a float dtype, read-only.

        Raises:
            ValueError: the tensor is a mask.
        """
        if self._values is None:
            raise ValueError(f"tensor {self.name!r} is a mask and has no values")
        return self._values

    def at_entries(self, weight: Any) -> Array:
        """The elements of ``weight`` (``[*shape]``, numpy or torch) at the entries, as a new ``[nnz]`` array.

        Raises:
            BaseMismatch: ``weight`` has another shape.
        """
        array = as_array(weight)
        fits.check_shape(f"tensor {self.name!r}", self.shape, array.shape, "the weight")
        return array.reshape(-1)[self.indices]

    def checked_base(self, weight: Any) -> Array:
        """``at_entries(weight)``, after a check that ``weight`` is the base that this tensor was made for.

        Raises:
            BaseMismatch: another shape, dtype or values at the entries.
        """
        found = self.at_entries(weight)
        what = f"tensor {self.name!r}"
        fits.check_dtype(what, self.dtype, found.dtype, any_float=self.base_digest is None, base="the weight")
        if self.base_digest is not None:
            fits.check_values(what, self.base_digest, array_digest(found))
        return found

    def delta(self, base: Any = None) -> Array:
        """What the adapter adds to each entry, ``[nnz]`` in float32 (float64 for a float64 weight).

        For targets this is target - base, with ``base`` (the weight ``[*shape]``, checked by digest) or, if it is None,
        with the base values in the file.

        Raises:
            BaseRequired: the values are targets, and there are no base values.
            BaseMismatch: ``base`` is not the base of this adapter.
        """
        work = working_dtype(self.dtype)
        if self.value_kind == "delta":
            with np.errstate(over="ignore", invalid="ignore"):  # a float64 delta of a narrower weight
                return self.values.astype(work)
        found = self.base if base is None else self.checked_base(base)
        if found is None:
            raise fits.base_required(f"tensor {self.name!r}")
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
            return np.asarray(self.values.astype(work) - found.astype(work))

    def applied(self, base: Array, alpha: float | Array = 1.0, start: int = 0) -> Array:
        """The entries' new values at strength ``alpha``, ``[n]`` in ``base.dtype`` (spec, section 4.1).

        Args:
            base: the base's values at the entries from the ``start``-th on, ``[n]``; see :meth:`checked_base`.
            alpha: one strength, or one for each of these entries, ``[n]``.
            start: the first entry.
        """
        values = self.values[start : start + base.size]
        work = working_dtype(base.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # overflow has a defined result
            strength = np.atleast_1d(np.asarray(alpha, work))
            if strength.size == 1 and strength[0] == 0:
                return base.copy()
            if self.value_kind == "target":
                return mixed(values, base, strength)
            return with_one_nan((base.astype(work) + strength * values.astype(work)).astype(base.dtype))

    def __eq__(self, other: object) -> bool:
        """Equal content: names, shapes, dtypes, indices and the bits of all values."""
        if not isinstance(other, SparseTensor):
            return NotImplemented
        return (
            (self.name, self.shape, self.dtype, self.value_kind, self.base_digest)
            == (other.name, other.shape, other.dtype, other.value_kind, other.base_digest)
            and np.array_equal(self.indices, other.indices)
            and same_bits(self._values, other._values)
            and same_bits(self.base, other.base)
            and (self.base_name, self.result_shape, self.result_digest)
            == (other.base_name, other.result_shape, other.result_digest)
            and same_bits(self.new_rows, other.new_rows)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"SparseTensor({self.name!r}, shape={list(self.shape)}, dtype={dtype_name(self.dtype)}, "
            f"nnz={self.nnz}, values={self.value_kind})"
        )


def _rebuild(
    name: str, shape: tuple[int, ...], indices: Any, values: Any, value_kind: ValueKind, dtype: Any, base: Any, base_digest: Any,
    base_name: str, rows: int | None, new_rows: Any, result: Any,
) -> SparseTensor:  # fmt: skip
    return SparseTensor(
        name, shape, indices, values, value_kind=value_kind, dtype=dtype, base=base, base_digest=base_digest,
        base_name=base_name, rows=rows, new_rows=new_rows, result_digest=result,
    )  # fmt: skip


class DenseTensor(_Immutable):
    """A tensor that the adapter replaces whole, such as a bias, a norm or a head; any dtype and shape.

    Arrays are copied, unless nothing can change them any more.

    Attributes:
        name: its name in the base's checkpoint, or a new one.
        values: ``[*shape]``, read-only.
        base: the base's tensor in the same dtype and shape, or None.
        base_digest: its SHA-256; None if the base has no such tensor, or it is not known.
    """

    __slots__ = ("base", "base_digest", "name", "values")

    name: str
    values: Array
    base: Array | None
    base_digest: str | None

    def __init__(self, name: str, values: Any, *, base: Any = None, base_digest: str | None = None) -> None:
        set_ = object.__setattr__
        set_(self, "name", name)
        set_(self, "values", owned(as_array(values)))
        dtype_name(self.values.dtype)
        set_(self, "base", None if base is None else owned(as_array(base)))
        if self.base is not None:
            if self.base.dtype != self.values.dtype:
                raise FormatError("stream-dtype", "the base has another dtype", tensor=name)
            if self.base.shape != self.values.shape:
                raise FormatError("count-mismatch", "the base has another shape", tensor=name)
            base_digest = array_digest(self.base)
        set_(self, "base_digest", base_digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_dense, (self.name, self.values, self.base, self.base_digest)

    def check_base(self, weight: Any, base: str = "the base") -> None:
        """Raise BaseMismatch if the base's tensor is known and ``weight`` is another one; messages call it ``base``."""
        if self.base_digest is None:
            return
        found = as_array(weight)
        alike = (found.shape, found.dtype) == (self.values.shape, self.values.dtype)
        fits.check_dense(f"tensor {self.name!r}", self.base_digest, array_digest(found) if alike else None, base)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DenseTensor):
            return NotImplemented
        return (
            (self.name, self.base_digest) == (other.name, other.base_digest)
            and same_bits(self.values, other.values)
            and same_bits(self.base, other.base)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DenseTensor({self.name!r}, shape={list(self.values.shape)}, dtype={self.values.dtype})"


def _rebuild_dense(name: str, values: Any, base: Any, base_digest: Any) -> DenseTensor:
    return DenseTensor(name, values, base=base, base_digest=base_digest)


def same_bits(a: Array | None, b: Array | None) -> bool:
    """Whether two arrays have the same dtype, shape and bits (NaN equals itself, -0.0 is not 0.0)."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))


def _checked_indices(name: str, shape: tuple[int, ...], indices: Any) -> npt.NDArray[np.int64]:
    if len(shape) > MAX_RANK or any(n < 0 for n in shape):
        raise FormatError("manifest-schema", f"shape {list(shape)} is not a shape", tensor=name)
    if is_too_large(shape):
        raise FormatError("shape-overflow", f"shape {list(shape)}: {TOO_LARGE}", tensor=name)
    found = as_array(indices)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise FormatError("stream-dtype", f"indices are {found.dtype}{list(found.shape)}, not [nnz] integers", tensor=name)  # fmt: skip
    if found.dtype == np.uint64 and found.size and int(found.max()) > MAX_NUMEL:
        raise FormatError("out-of-range", "an index above 2^53", tensor=name)
    # Copied before the check: indices that change after it would be written anywhere.
    found = owned(found) if found.dtype == np.int64 else frozen(found.astype(np.int64))
    check_increasing(found, numel(shape), name)
    return found


def check_increasing(indices: npt.NDArray[np.int64], size: int, name: str | None = None) -> None:
    """Raise FormatError unless ``indices`` are strictly increasing within ``range(size)``."""
    if indices.size == 0:
        return
    if not is_strictly_increasing(indices):
        at = int(np.flatnonzero(indices[1:] <= indices[:-1])[0])
        rule = "duplicate" if indices[at] == indices[at + 1] else "unsorted"
        raise FormatError(rule, f"entry {at + 1} has index {indices[at + 1]} after {indices[at]}", tensor=name)
    if indices[0] < 0 or indices[-1] >= size:
        bad = indices[0] if indices[0] < 0 else indices[-1]
        raise FormatError("out-of-range", f"index {bad} in a tensor of {size} elements", tensor=name)
