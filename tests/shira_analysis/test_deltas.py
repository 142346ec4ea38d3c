"""Deltas in float64 and their matrices, from files with and without their base."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_analysis.measures.deltas import delta_matrix, delta_values, open_deltas, side_by_side
from shira_format._core.arrays import Array, array_digest
from shira_format._core.dtypes import FLOATS
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import BaseMismatch, BaseRequired, FormatError, SourceError
from shira_format.format import save
from shira_format.tensors import SparseTensor, matrix_shape
from tests.models import save_arrays
from tests.strategies import small_shapes, sparse_tensors

BASE = np.arange(12, dtype=np.float32).reshape(3, 4)


def targets(
    name: str = "w", *, base: Any = (1, 11), at: Any = (1, 11), shape: tuple[int, ...] = (3, 4)
) -> SparseTensor:
    return SparseTensor(name, shape, at, np.float32([2, 5]), base=None if base is None else np.float32(base))


def without_base(name: str = "w", at: Any = (1, 11)) -> SparseTensor:
    return SparseTensor(name, (3, 4), at, np.float32([2, 5]), base_digest=array_digest(BASE.reshape(-1)[list(at)]))


def stored(path: Path, *tensors: SparseTensor) -> Path:
    save(Adapter(tensors), path)
    return path


@given(sparse_tensors(shapes=small_shapes(), value_kind=st.sampled_from(["target", "delta"])), st.booleans())
def test_a_matrix_is_the_dense_difference(tensor: SparseTensor, zeros: bool) -> None:
    start = tensor.base
    if tensor.value_kind == "target" and start is None:
        with pytest.raises(BaseRequired, match="'w' holds target values"):
            delta_matrix(tensor)
        return
    with np.errstate(all="ignore"):
        expected = tensor.values.astype(np.float64)
        if tensor.value_kind == "target":
            assert start is not None
            expected -= start.astype(np.float64)
    if not np.isfinite(expected).all():
        with pytest.raises(SourceError, match=r"^tensor 'w': the delta at flat index \d+ is NaN or infinite$"):
            delta_matrix(tensor)
        return
    dense = np.zeros(tensor.numel)
    dense[tensor.indices] = expected
    matrix = delta_matrix(tensor, zeros=zeros)
    assert matrix_shape(tensor.shape) == matrix.shape
    assert np.float64 == matrix.dtype
    assert matrix.has_canonical_format
    assert (tensor.nnz if zeros else np.count_nonzero(expected)) == matrix.nnz
    np.testing.assert_array_equal(dense.reshape(matrix.shape), matrix.toarray())


@given(st.sampled_from([np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16), np.dtype("<f4")]), st.integers(0, 2**32))
def test_differences_of_weights_of_like_size_are_exact(dtype: np.dtype[Any], seed: int) -> None:
    random = np.random.default_rng(seed)
    base = random.standard_normal(50).astype(dtype)
    values = (base.astype(np.float32) * random.uniform(0.5, 1.5, 50)).astype(dtype)
    tensor = SparseTensor("w", (50,), np.arange(50), values, base=base)
    exact = [Fraction(float(a)) - Fraction(float(b)) for a, b in zip(values, base, strict=True)]
    assert exact == [Fraction(x) for x in delta_values(tensor)]


def test_the_whole_weight_as_base() -> None:
    assert [1, -6] == delta_values(without_base(), BASE).tolist()
    with pytest.raises(BaseMismatch, match="digest differs"):
        delta_matrix(without_base(), BASE + 1)


def test_a_mask_has_no_deltas() -> None:
    with pytest.raises(SourceError, match="'w' is a mask"):
        delta_values(SparseTensor("w", (3,), [0], value_kind="none"))


def test_huge_weights_without_rows_to_match() -> None:
    wide = SparseTensor("w", (2, 2**40), [3, 2**40 + 5], np.float32([1, 2]), value_kind="delta")
    matrix = delta_matrix(wide)
    assert (2, 2**40) == matrix.shape
    assert [3, 5] == matrix.indices.tolist()
    tall = SparseTensor("w", (2**40, 2), [3], np.float32([1]), value_kind="delta")
    with pytest.raises(SourceError, match=r"^tensor 'w': 1099511627776 rows for 1 entries"):
        delta_matrix(tall)


def test_a_file_alone(tmp_path: Path) -> None:
    file = open_deltas(stored(tmp_path / "a.st", targets("v"), targets("w")))
    assert ("v", "w") == file.names
    assert [1, -6] == file.matrix("w").data.tolist()
    assert ["v", "w"] == [tensor.name for tensor in file.tensors()]
    needy = open_deltas(stored(tmp_path / "b.st", without_base()))
    with pytest.raises(BaseRequired, match=r"b\.st: tensor 'w' holds target values.*--base.*--self-contained"):
        needy.tensor("w")
    with pytest.raises(SourceError, match=r"a\.st: no tensor is left"):
        open_deltas(tmp_path / "a.st", include=["x"])
    with pytest.raises(FormatError, match="no-manifest"):
        open_deltas(save_arrays(tmp_path / "c.st", {"w": BASE}))


@pytest.mark.parametrize("tensor", [targets(), without_base()], ids=["self-contained", "digest"])
def test_a_file_and_its_base(tensor: SparseTensor, tmp_path: Path) -> None:
    path = stored(tmp_path / "a.st", tensor)

    def opened(arrays: dict[str, Array]) -> Any:
        return open_deltas(path, open_checkpoint(save_arrays(tmp_path / "base.safetensors", arrays)))

    right = opened({"w": BASE})
    assert [1, -6] == right.matrix("w").data.tolist()
    assert [1, 11] == right.tensor("w").base.tolist()
    for wrong, why in (
        ({"v": BASE}, "has no 'w'"),
        ({"w": BASE.reshape(4, 3)}, r"for shape \[3, 4\], the base .* has \[4, 3\]"),
        ({"w": BASE.astype(np.float16)}, "for float32, the base .* has float16"),
        ({"w": BASE + 1}, "digest differs"),
    ):
        with pytest.raises(BaseMismatch, match=rf"a\.st: tensor 'w'.*{why}"):
            opened(wrong).tensor("w")


def test_deltas_fit_any_float_base(tmp_path: Path) -> None:
    tensor = SparseTensor("w", (3, 4), [1, 11], np.float32([2, 0]), value_kind="delta")
    path = stored(tmp_path / "a.st", tensor)
    for dtype in FLOATS.values():
        base = open_checkpoint(save_arrays(tmp_path / "base.safetensors", {"w": BASE.astype(dtype)}))
        assert [2, 0] == open_deltas(path, base).matrix("w", zeros=True).data.tolist()
        assert [2] == open_deltas(path, base).matrix("w").data.tolist()
    whole = open_checkpoint(save_arrays(tmp_path / "base.safetensors", {"w": BASE.astype(np.int32)}))
    with pytest.raises(BaseMismatch, match="has int32: integer and quantised weights"):
        open_deltas(path, whole).tensor("w")


def test_what_is_not_finite_is_told_with_its_file(tmp_path: Path) -> None:
    bad = SparseTensor("w", (3, 4), [1, 7], np.float32([2, np.inf]), base=np.float32([0, 0]))
    with pytest.raises(SourceError, match=r"a\.st: tensor 'w': the delta at flat index 7"):
        open_deltas(stored(tmp_path / "a.st", bad)).matrix("w")


def test_side_by_side(tmp_path: Path) -> None:
    first = open_deltas(stored(tmp_path / "a.st", targets("v"), targets("w")))
    second = open_deltas(stored(tmp_path / "b.st", targets("w", at=(0, 2)), targets("x")))
    rows = {
        name: [None if t is None else t.indices.tolist() for t in row]
        for name, row in side_by_side([first, second])
    }
    assert {"v": [[1, 11], None], "w": [[1, 11], [0, 2]], "x": [None, [1, 11]]} == rows
    other = open_deltas(stored(tmp_path / "c.st", targets("w", shape=(4, 3))))
    with pytest.raises(SourceError, match=r"c\.st: tensor 'w' has the shape \[4, 3\], but \[3, 4\] in .*a\.st"):
        list(side_by_side([first, other]))
