"""Tensors of an adapter: what the constructors refuse, deltas, application by the formula of section 4.1."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_format._core.arrays import Array, array_digest, as_array, as_bytes, read_only
from shira_format._core.dtypes import DTYPES, FLOATS, dtype_name, is_float, working_dtype
from shira_format.errors import BaseMismatch, BaseRequired, FormatError, ShiraError
from shira_format.tensors import MAX_NUMEL, DenseTensor, SparseTensor, ValueKind, matrix_shape, numel, same_bits
from tests.strategies import any_bits, as_patch, float_dtypes, masks, sparse_tensors, whole_tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def f64(*values: float) -> Array:
    return np.array(values, np.float64)


ONE = f32(1)
HEX = "0" * 64
TENSORS = sparse_tensors() | sparse_tensors().flatmap(as_patch) | whole_tensors()
ROW = f32(7, 8, 9).reshape(1, 3)


def to_torch(array: Array) -> torch.Tensor:
    """The same bits, by a way that the library does not take."""
    name = dtype_name(array.dtype)
    if array.size == 0:  # which torch.frombuffer refuses
        return torch.empty(array.shape, dtype=TORCH[name])
    return torch.frombuffer(bytearray(array.tobytes()), dtype=TORCH[name]).reshape(array.shape)


def sparse(**changes: Any) -> SparseTensor:
    arguments: dict[str, Any] = {"name": "w", "shape": (2, 3), "indices": [1, 4], "values": f32(1, 2)}
    arguments |= {"base": f32(0, 5)} | changes
    return SparseTensor(**arguments)


# The constructor


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"indices": [4, 1]}, "unsorted"),
        ({"indices": [1, 1]}, "duplicate"),
        ({"indices": [1, 6]}, "out-of-range"),
        ({"indices": [-1, 4]}, "out-of-range"),
        ({"indices": np.array([1, 2**63], np.uint64)}, "out-of-range"),
        ({"indices": np.array([1, 2**64 - 1], np.uint64)}, "out-of-range"),
        ({"indices": [1.0, 4.0]}, "stream-dtype"),
        ({"indices": [True, False]}, "stream-dtype"),
        ({"indices": [[1, 4]]}, "stream-dtype"),
        ({"indices": 1}, "stream-dtype"),
        ({"indices": [1]}, "count-mismatch"),
        ({"indices": [1, 2, 4]}, "count-mismatch"),
        ({"values": f32(1, 2).reshape(1, 2)}, "count-mismatch"),
        ({"values": None}, "count-mismatch"),
        ({"values": None, "value_kind": "delta"}, "count-mismatch"),
        ({"value_kind": "none", "base": None}, "count-mismatch"),
        ({"base": f32(0)}, "count-mismatch"),
        ({"base": f32(0, 1, 2)}, "count-mismatch"),
        ({"base": f32(0, 1).reshape(1, 2)}, "count-mismatch"),
        ({"values": np.array([1, 2], np.int32), "base": None}, "sparse-dtype"),
        ({"dtype": np.int32}, "sparse-dtype"),
        ({"values": np.array([1, 2], ">f4"), "base": None}, "sparse-dtype"),
        ({"values": np.array([1, 2], np.complex64), "base": None}, "sparse-dtype"),
        ({"dtype": np.float16}, "stream-dtype"),
        ({"base": f64(0, 5)}, "stream-dtype"),
        ({"value_kind": "delta", "values": np.array([1, 2], np.int64)}, "sparse-dtype"),
        ({"value_kind": "delta", "values": np.array([1, 2], np.int64), "dtype": np.float32}, "stream-dtype"),
        ({"value_kind": "delta", "dtype": BF16, "base": None}, "stream-dtype"),
        ({"value_kind": "delta", "dtype": BF16}, "stream-dtype"),
        ({"value_kind": "none", "values": None}, "manifest-schema"),
        ({"value_kind": "none", "values": None, "base": None, "base_digest": HEX}, "manifest-schema"),
        ({"value_kind": "add"}, "manifest-schema"),
        ({"shape": (2, -3)}, "manifest-schema"),
        ({"shape": (1,) * 65}, "manifest-schema"),
        ({"shape": (2**27, 2**26)}, "shape-overflow"),
        ({"shape": (2**32, 2**32)}, "shape-overflow"),
        ({"shape": (0, 5)}, "out-of-range"),
        ({"new_rows": ROW}, "stray-stream"),
        ({"rows": 3}, "missing-stream"),
        ({"rows": 2, "new_rows": ROW}, "stray-stream"),
        ({"rows": 2, "new_rows": ROW[:0]}, "stray-stream"),
        ({"rows": 1, "new_rows": ROW}, "stray-stream"),
        ({"rows": 4, "new_rows": ROW}, "count-mismatch"),
        ({"rows": 3, "new_rows": ROW[:, :2]}, "count-mismatch"),
        ({"rows": 3, "new_rows": ROW.reshape(3)}, "stream-dtype"),
        ({"rows": 3, "new_rows": ROW.astype(BF16)}, "stream-dtype"),
        ({"rows": -1}, "manifest-schema"),
        ({"rows": 1}, "out-of-range"),  # which the entry at 4 is
        ({"rows": 0}, "out-of-range"),
        ({"rows": 2**52, "new_rows": ROW}, "shape-overflow"),
        ({"shape": (), "indices": [0], "values": ONE, "base": ONE, "rows": 1}, "manifest-schema"),
        ({"value_kind": "none", "values": None, "base": None, "rows": 2}, "manifest-schema"),
        ({"value_kind": "none", "values": None, "base": None, "result_digest": HEX}, "manifest-schema"),
        ({"value_kind": "delta", "result_digest": HEX}, "manifest-schema"),
    ],
)
def test_the_constructor_refuses(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(FormatError) as caught:
        sparse(**changes)
    assert rule == caught.value.rule
    assert "w" == caught.value.tensor
    assert f"(rule: {rule})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ShiraError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_indices_of_any_integer_dtype(kind: Any) -> None:
    tensor = sparse(indices=np.array([1, 4], kind))
    assert [1, 4] == tensor.indices.tolist()
    assert np.int64 == tensor.indices.dtype
    assert sparse() == tensor


def test_torch_tensors_are_taken_as_they_are() -> None:
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    tensor = SparseTensor("w", torch.Size([2, 3]), torch.tensor([1, 4]), values, base=values * 2)
    assert BF16 == tensor.dtype
    assert "c03f00c0" == tensor.values.tobytes().hex()
    assert (2, 3) == tensor.shape


def test_attributes() -> None:
    tensor = sparse()
    assert ("w", (2, 3), "target") == (tensor.name, tensor.shape, tensor.value_kind)
    assert (2, 6, 1 / 3) == (tensor.nnz, tensor.numel, tensor.density)
    assert np.float32 == tensor.dtype
    assert hashlib.sha256(f32(0, 5).tobytes()).hexdigest() == tensor.base_digest
    assert "SparseTensor('w', shape=[2, 3], dtype=F32, nnz=2, values=target)" == repr(tensor)
    assert 0.0 == SparseTensor("w", (0, 5), np.empty(0, int), f32(), base=f32()).density
    assert "DenseTensor('b', shape=[1], dtype=float32)" == repr(DenseTensor("b", ONE))


def test_the_base_decides_over_a_digest_that_is_handed_in() -> None:
    assert sparse().base_digest == sparse(base_digest=HEX).base_digest
    assert array_digest(ONE) == DenseTensor("b", ONE, base=ONE, base_digest=HEX).base_digest


def test_a_mask_has_no_values() -> None:
    mask = SparseTensor("w", (2, 3), [1, 4], value_kind="none")
    assert np.float32 == mask.dtype
    with pytest.raises(ValueError, match="'w' is a mask"):
        _ = mask.values


@pytest.mark.parametrize("shape", [(MAX_NUMEL,), (2**26 - 1, 2**27), (0, 2**26, 2**26)])
def test_shapes_of_any_size_cost_nothing(shape: tuple[int, ...]) -> None:
    last = [numel(shape) - 1] if numel(shape) else []
    values = np.ones(len(last), np.float32)
    tensor = SparseTensor("w", shape, np.array(last, np.int64), values, base=values)
    assert last == tensor.indices.tolist()


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((), 1, 1), ((7,), 7, 1), ((3, 4), 3, 4), ((3, 2, 2), 3, 4), ((0, 4), 0, 4), ((4, 0, 9), 4, 0)],
)
def test_matrix_view(shape: tuple[int, ...], rows: int, columns: int) -> None:
    assert (rows, columns) == matrix_shape(shape)


# Immutability, equality, pickling


@given(TENSORS)
def test_tensors_are_immutable(tensor: SparseTensor | DenseTensor) -> None:
    for attribute in ("name", "base", "base_digest", "values", "dtype", "indices", "new"):
        with pytest.raises(AttributeError):
            setattr(tensor, attribute, None)
        with pytest.raises(AttributeError):
            delattr(tensor, attribute)
    arrays: list[Array | None] = [tensor.base]
    if isinstance(tensor, SparseTensor):
        arrays += [tensor.indices, tensor._values, tensor.new_rows]
    else:
        arrays += [tensor.values]
    for array in arrays:
        if array is not None:
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    with pytest.raises(TypeError, match="unhashable"):
        hash(tensor)


@given(TENSORS)
def test_copies_and_pickles_are_equal_and_immutable(tensor: SparseTensor | DenseTensor) -> None:
    for twin in (pickle.loads(pickle.dumps(tensor)), copy.copy(tensor), copy.deepcopy(tensor)):
        assert tensor == twin
        assert type(tensor) is type(twin)
        with pytest.raises(AttributeError):
            twin.name = "x"
        base = twin.base
        assert base is None or not base.flags.writeable
        if isinstance(tensor, SparseTensor):
            assert (tensor.base_name, tensor.rows, tensor.result_digest) == (
                twin.base_name,
                twin.rows,
                twin.result_digest,
            )
            assert same_bits(tensor.new_rows, twin.new_rows)


def test_the_caller_keeps_its_arrays_and_may_change_them() -> None:
    values, base = f32(1, 2), f32(3, 4)
    for kept in (values, base):
        tensor = sparse(
            values=read_only(values), base=read_only(base)
        )  # views: the arrays can still be written to
        again = sparse(values=tensor.values, base=tensor.base)
        kept[:] = kept + 1
        assert ([1, 2], [3, 4]) == (tensor.values.tolist(), tensor.base.tolist())
        assert again.values is tensor.values  # nothing can change it, so it is not copied
        assert again.base is tensor.base
        kept[:] = kept - 1
        assert kept.flags.writeable
    held = bytes(values)
    shared = np.frombuffer(held, np.float32)
    assert sparse(values=shared).values is shared


def test_an_array_that_its_owner_makes_writable_again() -> None:
    indices, values = np.array([1, 4]), f32(1, 2)
    for array in (indices, values):
        array.flags.writeable = False
    tensor, whole = sparse(indices=indices, values=values), DenseTensor("b", values, base=values)
    for array in (indices, values):
        array.flags.writeable = True
        array[:] = 99
    assert ([1, 4], [1, 2]) == (tensor.indices.tolist(), tensor.values.tolist())
    assert [1, 2] == whole.values.tolist() == whole.base.tolist()


def test_a_whole_tensor_is_not_the_memory_that_it_was_made_from() -> None:
    weight, base = f32(1, 2), f32(3, 4)
    whole = DenseTensor("b", weight, base=base)
    weight[:] = base[:] = 9
    assert ([1, 2], [3, 4]) == (whole.values.tolist(), whole.base.tolist())
    assert DenseTensor("b", whole.values).values is whole.values


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "v"},
        {"shape": (3, 2)},
        {"indices": [1, 5]},
        {"values": f32(1, 3)},
        {"base": f32(0, 6)},
        {"base": f32(-0.0, 5)},
        {"base": None, "base_digest": sparse().base_digest},
        {"value_kind": "delta"},
        {"values": f64(1, 2), "base": f64(0, 5)},
        {"base_name": "v"},
        {"rows": 3, "new_rows": ROW},
        {"result_digest": HEX},
    ],
)
def test_what_makes_tensors_differ(changes: dict[str, Any]) -> None:
    assert sparse() == sparse()
    assert sparse() != sparse(**changes)
    assert sparse() != "w"


def test_patches() -> None:
    plain = sparse()
    assert ("w", None, None, (2, 3)) == (plain.base_name, plain.rows, plain.new_rows, plain.result_shape)
    assert not plain.is_patch
    assert not sparse(result_digest=HEX).is_patch
    assert sparse(base_name="v").is_patch
    grown, shrunk, same = sparse(rows=3, new_rows=ROW), sparse(indices=[0, 2], rows=1), sparse(rows=2)
    assert [(3, 3), (1, 3), (2, 3)] == [tensor.result_shape for tensor in (grown, shrunk, same)]
    assert grown.is_patch
    assert shrunk.is_patch
    # What the file says, and what it is about: `shape` speaks of the base, and equal rows mean nothing.
    assert ((2, 3), 6, 2) == (grown.shape, grown.numel, grown.nnz)
    assert same.is_patch
    assert plain == same
    assert grown != sparse(rows=3, new_rows=ROW + 1)
    assert sparse(rows=3, new_rows=ROW * 0) != sparse(rows=3, new_rows=-ROW * 0)
    delta = sparse(value_kind="delta", rows=3, new_rows=ROW)
    assert (3, 3) == delta.result_shape


def test_a_patch_is_torchs_too() -> None:
    tensor = sparse(rows=3, new_rows=torch.from_numpy(ROW))
    assert tensor == sparse(rows=3, new_rows=ROW)


def test_equality_compares_bits() -> None:
    nan, other = np.array([0x7FC00000, 1], "<u4").view("<f4"), np.array([0x7FC00001, 1], "<u4").view("<f4")
    assert sparse(values=nan) == sparse(values=nan.copy())
    assert sparse(values=nan) != sparse(values=other)
    assert DenseTensor("b", nan) == DenseTensor("b", nan.copy())
    assert DenseTensor("b", nan) != DenseTensor("b", other)
    assert DenseTensor("b", nan) != DenseTensor("b", nan, base=nan)
    assert DenseTensor("b", nan) != DenseTensor("b", nan.reshape(1, 2))
    assert DenseTensor("b", nan) != "b"
    assert same_bits(None, None)
    assert not same_bits(nan, None)


# Deltas


@pytest.mark.parametrize("form", ["numpy", "torch", "torch transposed"])
@given(data=st.data())
def test_deltas_against_torch(form: str, data: st.DataObject) -> None:
    dtype = data.draw(float_dtypes)
    weight = data.draw(any_bits(dtype, (6, 5)))
    flat = data.draw(masks((6, 5)))
    target = data.draw(any_bits(dtype, flat.shape))
    self_contained = SparseTensor("w", (6, 5), flat, target, base=weight.reshape(-1)[flat])
    tensor = SparseTensor("w", (6, 5), flat, target, base_digest=self_contained.base_digest)
    work = torch.float64 if dtype == np.float64 else torch.float32
    expected = (to_torch(target).to(work) - to_torch(weight).reshape(-1)[torch.from_numpy(flat)].to(work)).numpy()
    given_weight: Any = weight if form == "numpy" else to_torch(weight)
    if form == "torch transposed":
        given_weight = given_weight.T.contiguous().T
    for found in (self_contained.delta(), tensor.delta(given_weight), self_contained.delta(given_weight)):
        assert working_dtype(dtype) == found.dtype
        np.testing.assert_array_equal(expected, found)  # NaN equals NaN: its payload is not defined
        assert np.array_equal(np.signbit(expected) | np.isnan(expected), np.signbit(found) | np.isnan(found))
    with pytest.raises(BaseRequired, match="'w'"):
        tensor.delta()


def test_deltas_that_are_stored_need_no_base() -> None:
    tensor = SparseTensor("w", (3,), [0, 2], np.array([0.5, -1], np.float16), value_kind="delta")
    assert [0.5, -1.0] == tensor.delta().tolist()
    assert np.float32 == tensor.delta().dtype
    wide = SparseTensor("w", (1,), [0], f64(1e300), value_kind="delta", dtype=np.float32, base_digest=HEX)
    assert [math.inf] == wide.delta().tolist()
    assert [-math.inf] == sparse(values=f32(0, -3e38), base=f32(0, 3e38)).delta()[1:].tolist()


@pytest.mark.parametrize(
    "weight",
    [
        f32(0, 0, 0, 0, 6, 0).reshape(2, -1),
        f32(0, -0.0, 0, 0, 5, 0).reshape(2, -1),
        f32(0, 0, 0, 0, 5, 0).reshape(2, -1).reshape(3, 2),
        f32(0, 0, 0, 0, 5, 0),
        f32(0, 0, 0, 0, 0, 5, 0, 0).reshape(2, -1),
        f64(0, 0, 0, 0, 5, 0).reshape(2, -1),
        torch.tensor([[0, 0, 0], [0, 5, 0]], dtype=torch.bfloat16),
        torch.tensor([[0, 0, 0], [0, 5, 0]], dtype=torch.int32),
    ],
)
def test_another_base_is_refused(weight: Any) -> None:
    with pytest.raises(BaseMismatch, match="'w'"):
        sparse().checked_base(weight)
    with pytest.raises(BaseMismatch, match="'w'"):
        sparse().delta(weight)


def test_the_right_base_is_found_wherever_else_it_differs() -> None:
    weight = f32(9, 0, 9, 9, 5, 9).reshape(2, -1)
    assert [0.0, 5.0] == sparse().checked_base(weight).tolist()
    assert [0.0, 5.0] == sparse().checked_base(torch.from_numpy(weight)).tolist()
    assert [0.0, 5.0] == sparse().at_entries(np.asfortranarray(weight)).tolist()
    assert sparse().at_entries(weight).flags.writeable


def test_a_delta_without_digest_fits_any_float_base() -> None:
    tensor = SparseTensor("w", (2,), [1], f32(1), value_kind="delta")
    for dtype in FLOATS.values():
        assert dtype == tensor.checked_base(np.zeros(2, dtype)).dtype
    with pytest.raises(BaseMismatch, match="int64"):
        tensor.checked_base(np.zeros(2, np.int64))
    with pytest.raises(BaseMismatch, match="shape"):
        tensor.checked_base(np.zeros(3, np.float32))


# Applying


def by_the_formula(tensor: SparseTensor, base: Array, alpha: float) -> torch.Tensor:
    """Section 4.1, in torch."""
    work = torch.float64 if base.dtype == np.float64 else torch.float32
    a = torch.tensor(alpha, dtype=torch.float64).to(work)
    b, values = to_torch(base), to_torch(tensor.values)
    if a == 0:
        return b
    if tensor.value_kind == "target" and a == 1:
        return values
    step = values.to(work) if tensor.value_kind == "delta" else values.to(work) - b.to(work)
    result = b.to(work) + a * step
    if base.dtype.itemsize == 1:
        return to_torch(rounded_to_8_bits(result.numpy(), base.dtype))
    return result.to(b.dtype)


def rounded_to_8_bits(numbers: Array, dtype: np.dtype[Any]) -> Array:
    """To nearest, ties to even, by a table of all numbers; torch saturates, the format does not."""
    mantissa, bias, codes = (3, 7, 0x7F) if dtype == FLOATS["F8_E4M3"] else (2, 15, 0x7C)
    exponents, fractions = np.divmod(np.arange(codes + 1), 1 << mantissa)  # the last one stands for overflow
    scale = 2.0 ** (np.maximum(exponents, 1) - bias - mantissa)
    table = (fractions + (exponents > 0) * (1 << mantissa)) * scale
    size = np.minimum(np.abs(numbers.astype(np.float64)), table[-1])
    above = np.maximum(np.searchsorted(table, np.nan_to_num(size)), 1)
    low, high = size - table[above - 1], table[above] - size
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    code = np.where(np.isnan(numbers), 0x7F, code)
    signed = code | (np.signbit(numbers).astype(np.int64) << 7)
    return np.asarray(signed.astype(np.uint8).view(dtype))


def assert_same_numbers(expected: torch.Tensor, found: Array) -> None:
    """The same bits, but any NaN for a NaN."""
    reference = as_array(expected)
    assert reference.dtype == found.dtype
    with np.errstate(invalid="ignore"):  # signalling NaNs
        nan = np.isnan(reference.astype(np.float64))
        assert np.array_equal(nan, np.isnan(found.astype(np.float64)))
    assert reference[~nan].tobytes() == found[~nan].tobytes()


ALPHAS = st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.7, 2.0, 1e-3, 1e300, -1e300, 1 + 1e-12, 1e-60]) | st.floats(-4, 4)


@pytest.mark.parametrize("value_kind", ["target", "delta"])
@pytest.mark.parametrize("name", sorted(FLOATS))
@settings(max_examples=60)
@given(data=st.data())
def test_application_is_the_formula(name: str, value_kind: ValueKind, data: st.DataObject) -> None:
    dtype, count = FLOATS[name], (data.draw(st.sampled_from([3, 200])),)
    base = data.draw(any_bits(dtype, count))
    # Binary64 deltas of narrower weights have a test of their own.
    others = FLOATS.values() if dtype == np.float64 else [other for other in FLOATS.values() if other.itemsize < 8]
    value_dtype = data.draw(st.sampled_from(list(others))) if value_kind == "delta" else dtype
    values = data.draw(any_bits(value_dtype, count))
    tensor = SparseTensor("w", count, np.arange(*count), values, value_kind=value_kind, dtype=dtype, base=base)
    alpha = data.draw(ALPHAS)
    found = tensor.applied(base, alpha)
    assert_same_numbers(by_the_formula(tensor, base, alpha), found)


@pytest.mark.parametrize("name", sorted(FLOATS))
@given(data=st.data())
def test_strength_one_gives_the_very_bits_and_zero_keeps_them(name: str, data: st.DataObject) -> None:
    base, values = data.draw(any_bits(FLOATS[name], (9,))), data.draw(any_bits(FLOATS[name], (9,)))
    tensor = SparseTensor("w", (9,), np.arange(9), values, base=base)
    assert as_bytes(values).tobytes() == as_bytes(tensor.applied(base)).tobytes()
    assert as_bytes(base).tobytes() == as_bytes(tensor.applied(base, 0)).tobytes()
    if name != "F64":  # the strength is rounded before it is compared
        assert as_bytes(values).tobytes() == as_bytes(tensor.applied(base, 1 + 1e-12)).tobytes()
        assert as_bytes(base).tobytes() == as_bytes(tensor.applied(base, -1e-60)).tobytes()
    kept = tensor.applied(base, 0)
    assert not np.shares_memory(kept, base)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -2.0])
def test_wide_deltas_of_narrow_weights(alpha: float) -> None:
    values = f64(1e-9, 0.1, -3.3, 1e300)
    base = np.array([1, 2, 3, 4], BF16)
    tensor = SparseTensor("w", (4,), np.arange(4), values, value_kind="delta", dtype=BF16, base=base)
    step = torch.tensor(alpha) * torch.from_numpy(values).to(torch.float32)
    expected = (to_torch(base).to(torch.float32) + step).to(torch.bfloat16)
    assert_same_numbers(expected, tensor.applied(base, alpha))


def test_a_delta_without_digest_is_applied_in_the_type_of_the_base() -> None:
    tensor = SparseTensor("w", (1,), [0], f32(2.0**-30), value_kind="delta")
    assert [1.0] == tensor.applied(f32(1)).tolist()
    assert [1 + 2.0**-30] == tensor.applied(f64(1)).tolist()


def test_overflow_is_infinity_or_nan() -> None:
    def applied(name: str) -> Array:
        dtype = FLOATS[name]
        base = np.array([200.0], dtype)
        delta = SparseTensor("w", (1,), [0], f32(1e38), value_kind="delta", dtype=dtype, base=base)
        return delta.applied(base, 3.0)

    assert [math.inf] * 2 == [float(applied(name)[0]) for name in ("F16", "F8_E5M2")]
    assert math.isnan(float(applied("F8_E4M3")[0]))


# Whole tensors, arrays, dtypes


def test_whole_tensors_check_their_base() -> None:
    base = np.array([[1, 2]], np.int64)
    for tensor in (
        DenseTensor("b", base + 1, base=base),
        DenseTensor("b", base + 1, base_digest=array_digest(base)),
    ):
        tensor.check_base(torch.from_numpy(base.copy()))
        for other in (base + 1, base.reshape(2), base.view(np.uint64)):
            with pytest.raises(BaseMismatch, match="'b'"):
                tensor.check_base(other)
    DenseTensor("b", base).check_base(np.zeros(7))


@pytest.mark.parametrize(("base", "rule"), [(f64(1), "stream-dtype"), (f32(1, 2), "count-mismatch")])
def test_whole_tensors_refuse_a_base_of_another_form(base: Array, rule: str) -> None:
    with pytest.raises(FormatError) as caught:
        DenseTensor("b", ONE, base=base)
    assert (rule, "b") == (caught.value.rule, caught.value.tensor)


@pytest.mark.parametrize("values", [np.array(["a"]), np.array([1], np.complex64), np.array([1], ">f4")])
def test_whole_tensors_refuse_what_no_checkpoint_has(values: Array) -> None:
    with pytest.raises(TypeError, match="has no safetensors name"):
        DenseTensor("b", values)


@pytest.mark.parametrize("name", sorted(TORCH))
@given(data=st.data())
def test_torch_bits_cross_unchanged(name: str, data: st.DataObject) -> None:
    array = data.draw(any_bits(FLOATS[name], (3, 4)))
    found = as_array(to_torch(array).requires_grad_(name in {"F64", "F32"}))
    assert array.dtype == found.dtype
    assert array.tobytes() == found.tobytes()
    assert same_bits(np.ascontiguousarray(array.T), as_array(to_torch(array).T))


def test_digests_are_of_bytes_in_row_major_order() -> None:
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    assert hashlib.sha256(array.tobytes()).hexdigest() == array_digest(array)
    assert array_digest(array) == array_digest(np.asfortranarray(array))
    assert array_digest(array.T) == array_digest(array.T.copy())
    assert hashlib.sha256(b"").hexdigest() == array_digest(f32())
    assert hashlib.sha256(np.float32(3).tobytes()).hexdigest() == array_digest(np.array(3, np.float32))


def test_dtypes() -> None:
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
    sizes |= {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    assert sizes == {name: dtype.itemsize for name, dtype in DTYPES.items()}
    assert list(sizes) == [dtype_name(dtype) for dtype in DTYPES.values()]
    assert list(sizes)[:6] == [name for name, dtype in DTYPES.items() if is_float(dtype)]
