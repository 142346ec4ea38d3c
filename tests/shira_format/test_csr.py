"""Adapters as folders of scipy matrices and back: exact without changes, by the rules with them, closed to strangers' tricks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy import sparse

from shira_format._core.arrays import Array, array_digest
from shira_format._core.dtypes import FLOATS, working_dtype
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.convert.csr import csr_to_shira
from shira_format.convert.csr.folder import file_names
from shira_format.convert.csr.matrix import MAX_ROWS
from shira_format.errors import BaseMismatch, ShiraError, SourceError
from shira_format.export.csr import shira_to_csr
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor, matrix_shape, same_bits
from tests import models
from tests.strategies import adapters, float_dtypes, small_shapes, sparse_tensors

BF16 = FLOATS["BF16"]
VALUES = st.sampled_from(["delta", "target"])


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def everything(path: Path) -> Adapter:
    adapter = load(path)
    return Adapter(dict(adapter), dense=dict(adapter.dense), manifest=adapter.manifest)


def export(folder: Path, *tensors: SparseTensor, dense: Any = (), manifest: Any = None, **options: Any) -> Path:
    """The folder of the matrices of an adapter of these."""
    save(Adapter(tensors, dense=dense, manifest=manifest), folder / "a.st")
    shira_to_csr(folder / "a.st", folder / "csr", **options)
    return folder / "csr"


def back(folder: Path, **options: Any) -> Adapter:
    csr_to_shira(folder, folder.parent / "b.st", **options)
    return everything(folder.parent / "b.st")


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    edit(index)
    (folder / "index.json").write_text(json.dumps(index))


def edit_matrix(folder: Path, edit: Callable[[Any], Any], name: str = "w") -> None:
    """Pass a matrix through ``edit`` as a user of scipy does."""
    path = folder / f"{name}.npz"
    matrix = sparse.load_npz(path)
    changed = edit(matrix)
    sparse.save_npz(path, matrix if changed is None else changed)


def times_two(matrix: Any) -> None:
    """Double the first entry."""
    matrix.data[0] *= 2


def without_first(matrix: Any) -> Any:
    """The matrix without its first entry."""
    rows, columns = matrix.tocoo().coords
    entries = (matrix.data[1:], (rows[1:], columns[1:]))
    return sparse.coo_matrix(entries, shape=matrix.shape).tocsr()


def with_entry(row: int, column: int, value: float) -> Callable[[Any], Any]:
    def add(matrix: Any) -> Any:
        changed = matrix.tolil()
        changed[row, column] = value
        return changed.tocsr()

    return add


BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
INDICES = [1, 6, 11]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint with ``w``, 0 to 11 in shape ``[3, 4]``."""
    path = tmp_path / "base.safetensors"
    save_file({"w": BASE}, path)
    return path


def targets(*, self_contained: bool = False, values: Array | None = None) -> SparseTensor:
    """Three targets in ``w``; the second one is not what base + delta gives."""
    values = f32(1.5, 1e-9, -11) if values is None else values
    start = BASE.reshape(-1)[INDICES]
    if self_contained:
        return SparseTensor("w", (3, 4), INDICES, values, base=start)
    return SparseTensor("w", (3, 4), INDICES, values, base_digest=array_digest(start))


# --- Unchanged folders ---


def exportable(tensor: SparseTensor, values: str) -> bool:
    few_rows = matrix_shape(tensor.shape)[0] <= max(MAX_ROWS, 8 * tensor.nnz)
    return few_rows and (tensor.value_kind in (values, "none") or tensor.base is not None)


@given(adapters(), VALUES)
def test_round_trip(adapter: Adapter, values: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(adapter, folder / "a.st")
        if not all(exportable(adapter[tensor], values) for tensor in adapter):
            with pytest.raises(SourceError, match=r"--base|rows for"):
                shira_to_csr(folder / "a.st", folder / "csr", values=values)
            assert ["a.st"] == listing(folder)
            return
        report = shira_to_csr(folder / "a.st", folder / "csr", values=values)
        files = [tensor.file for tensor in report.tensors]
        assert {*files, "index.json", "original.st"} == set(listing(folder / "csr"))
        again = csr_to_shira(folder / "csr", folder / "b.st")
        found = everything(folder / "b.st")
        assert adapter == found
        assert list(adapter) == list(found)
        assert (folder / "a.st").read_bytes() == (folder / "b.st").read_bytes()
        assert not any(tensor.changed for tensor in again.tensors)


@given(sparse_tensors(shapes=small_shapes()), VALUES)
def test_the_matrix_is_the_dense_change(tensor: SparseTensor, values: Any) -> None:
    if not exportable(tensor, values):
        return
    with tempfile.TemporaryDirectory() as name:
        matrix = sparse.load_npz(export(Path(name), tensor, values=values) / "w.npz")
    assert "csr" == matrix.format
    assert matrix.has_canonical_format
    assert tensor.nnz == matrix.nnz
    dense = np.zeros(tensor.shape, np.float64)
    with np.errstate(all="ignore"):
        if tensor.value_kind == "none":
            entries = np.ones(tensor.nnz)
        elif values == "target":
            entries = tensor.values if tensor.value_kind == "target" else tensor.applied(tensor.base)
        else:
            entries = tensor.values if tensor.value_kind == "delta" else tensor.delta()
        dense.reshape(-1)[tensor.indices] = entries.astype(matrix.dtype)
    assert (working_dtype(tensor.dtype) == matrix.dtype) or tensor.value_kind == "delta"
    np.testing.assert_array_equal(matrix.toarray(), dense.reshape(matrix_shape(tensor.shape)))


@given(sparse_tensors(shapes=small_shapes(), value_kind=st.just("target"), dtypes=float_dtypes))
def test_targets_need_no_original(tensor: SparseTensor) -> None:
    """The matrix and the digests in ``index.json`` say it all, but for what is in a NaN."""
    with tempfile.TemporaryDirectory() as name:
        folder = export(Path(name), tensor, values="target")
        (folder / "original.st").unlink()
        edit_index(folder, lambda index: index.pop("original"))
        found = back(folder)["w"]
    with np.errstate(invalid="ignore"):
        numbers = ~np.isnan(tensor.values.astype(np.float64))
        assert np.isnan(found.values[~numbers].astype(np.float64)).all()
    assert same_bits(tensor.values[numbers], found.values[numbers])
    assert (tensor.shape, tensor.dtype, tensor.base_digest) == (found.shape, found.dtype, found.base_digest)
    assert np.array_equal(tensor.indices, found.indices)


def patch(*, self_contained: bool) -> list[SparseTensor]:
    start = BASE.reshape(-1)[INDICES]
    options = {"base": start} if self_contained else {"base_digest": array_digest(start)}
    more = {"rows": 4, "new_rows": np.full((1, 4), 7, np.float32), "result_digest": "0" * 64}
    return [
        SparseTensor("longer", (3, 4), INDICES, f32(1, 2, 3), base_name="w", **more, **options),
        SparseTensor("shorter", (3, 4), INDICES[:2], f32(1, 2), base=start[:2], base_name="w", rows=2),
    ]


def test_patches_come_back(tmp_path: Path, base: Path) -> None:
    whole = [DenseTensor("new", np.arange(5, dtype=np.int64))]
    folder = export(
        tmp_path, *patch(self_contained=False), dense=whole, manifest={"removed": ["w", "x"]}, base=base
    )
    found = back(folder)
    assert everything(tmp_path / "a.st") == found
    assert ("w", "x") == found.removed
    assert [("w", 4), ("w", 2)] == [
        (item["from"], item["rows"]) for item in json.loads((folder / "index.json").read_text())["tensors"]
    ]


def test_a_changed_patch_stays_one(tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, *patch(self_contained=True))
    edit_matrix(folder, lambda matrix: matrix.data.__setitem__(1, -5), "longer")
    found = back(folder)["longer"]
    assert ("w", 4, None) == (found.base_name, found.rows, found.result_digest)
    assert same_bits(np.full((1, 4), 7, np.float32), found.new_rows)
    assert same_bits(f32(1, 1, 3), found.values)
    edit_matrix(folder, with_entry(0, 0, 5), "longer")
    with pytest.raises(SourceError, match=r"longer\.npz: tensor 'longer': part of a patch, .* pass --base"):
        back(folder)
    assert same_bits(f32(5, 1, 1, 3), back(folder, base=base)["longer"].values)
    edit_matrix(folder, with_entry(2, 0, 5), "shorter")
    with pytest.raises(ShiraError, match=r"shorter\.npz.*out-of-range"):
        back(folder, base=base)


def test_a_real_lora(tmp_path: Path) -> None:
    path = tmp_path / "a.st"
    lora_to_shira(models.LORAS / "spam", models.minilm(), path, density=0.01)
    report = shira_to_csr(path, tmp_path / "csr", base=models.minilm())
    adapter, checkpoint = everything(path), open_checkpoint(models.minilm())
    for tensor in report.tensors:
        matrix = sparse.load_npz(tmp_path / "csr" / tensor.file)
        before = checkpoint[tensor.name]
        after = before.copy()
        after.reshape(-1)[adapter[tensor.name].indices] = adapter[tensor.name].values
        np.testing.assert_array_equal(after - before, matrix.toarray())
    assert 36 == len(report.tensors)
    assert sorted(adapter.dense) == sorted(report.whole)
    csr_to_shira(tmp_path / "csr", tmp_path / "b.st", base=models.minilm())
    assert path.read_bytes() == (tmp_path / "b.st").read_bytes()
    csr_to_shira(tmp_path / "csr", tmp_path / "c.st", base=models.minilm(), self_contained=True)
    full = everything(tmp_path / "c.st")
    assert all(full[name].base is not None for name in full)
    assert all(same_bits(checkpoint[name], full.dense[name].base) for name in full.dense if name in checkpoint)
    # And the other way: from the folder of a self-contained adapter nothing else is needed.
    shira_to_csr(tmp_path / "c.st", tmp_path / "csr-2")
    assert full == back(tmp_path / "csr-2")


# --- Changed folders ---


@pytest.mark.parametrize("with_base", [True, False])
def test_changed_deltas_with_the_base_become_targets(with_base: bool, tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, targets(self_contained=True))
    edit_matrix(folder, times_two)
    found = back(folder, base=base if with_base else None)["w"]
    # 1 + 2 * 0.5, and the bits of entries whose deltas did not change: 6 + float32(1e-9 - 6) is 0
    assert ("target", FLOATS["F32"]) == (found.value_kind, found.dtype)
    assert same_bits(f32(2, 1e-9, -11), found.values)
    assert same_bits(f32(1, 6, 11), found.base)


def test_changed_deltas_without_the_base_stay_deltas(tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, targets(), base=base)
    edit_matrix(folder, times_two)
    report = csr_to_shira(folder, tmp_path / "b.st")
    found = load(tmp_path / "b.st")["w"]
    assert ("delta", array_digest(f32(1, 6, 11))) == (found.value_kind, found.base_digest)
    assert same_bits(f32(1, -6, -22), found.values)
    assert [True] == [tensor.changed for tensor in report.tensors]
    assert ["1 changed tensors, 'w' for example, hold deltas: the base's values at their entries are not available (--base)"] == report.notices  # fmt: skip
    with pytest.raises(SourceError, match="pass --base"):
        csr_to_shira(folder, tmp_path / "b.st", self_contained=True)


def test_fewer_entries(tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, targets(), base=base)
    edit_matrix(folder, without_first)
    found = back(folder)["w"]
    assert ("delta", None, [6, 11]) == (found.value_kind, found.base_digest, found.indices.tolist())
    found = back(folder, base=base)["w"]
    assert ("target", array_digest(f32(6, 11)), None) == (found.value_kind, found.base_digest, found.base)
    assert same_bits(f32(1e-9, -11), found.values)
    # The base's values of a self-contained file are enough for fewer entries.
    (tmp_path / "self").mkdir()
    folder = export(tmp_path / "self", targets(self_contained=True))
    edit_matrix(folder, without_first)
    found = back(folder)["w"]
    assert same_bits(f32(6, 11), found.base)
    assert same_bits(f32(1e-9, -11), found.values)


def test_more_entries(tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, targets(self_contained=True))
    edit_matrix(folder, with_entry(0, 0, 0.25))
    assert ("delta", None) == (back(folder)["w"].value_kind, back(folder)["w"].base_digest)
    found = back(folder, base=base)["w"]
    assert [0, 1, 6, 11] == found.indices.tolist()
    assert same_bits(f32(0.25, 1.5, 1e-9, -11), found.values)
    assert same_bits(f32(0, 1, 6, 11), found.base)


def test_changed_targets(tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, targets(), values="target")
    edit_matrix(folder, times_two)
    assert (
        SparseTensor("w", (3, 4), INDICES, f32(3, 1e-9, -11), base_digest=array_digest(f32(1, 6, 11)))
        == back(folder)["w"]
    )
    edit_matrix(folder, without_first)
    with pytest.raises(
        SourceError, match=r"w\.npz: tensor 'w': targets whose base values are not known: pass --base"
    ):
        back(folder)
    assert SparseTensor("w", (3, 4), [6, 11], f32(1e-9, -11), base_digest=array_digest(f32(6, 11))) == back(folder, base=base)["w"]  # fmt: skip


def test_changed_values_are_rounded_to_the_dtype(tmp_path: Path) -> None:
    start, values = np.array([1, 1], BF16), np.array([2, 3], BF16)
    folder = export(tmp_path, SparseTensor("w", (1, 2), [0, 1], values, base=start))

    def change(to: float) -> None:
        def edit(matrix: Any) -> Any:
            matrix.data[0] = to
            return matrix.astype(np.float64)

        edit_matrix(folder, edit)

    change(0.0077)
    found = back(folder)["w"]
    assert BF16 == found.dtype
    assert same_bits(np.array([1.0078125, 3], BF16), found.values)
    change(3.4e38)
    with pytest.raises(SourceError, match="a target overflows BF16 at flat index 0"):
        back(folder)


def test_changed_deltas_of_deltas(tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, SparseTensor("w", (3, 4), INDICES, np.array([1, 2, 3], BF16), value_kind="delta"))
    edit_matrix(folder, times_two)
    assert SparseTensor("w", (3, 4), INDICES, np.array([2, 2, 3], BF16), value_kind="delta") == back(folder)["w"]
    assert same_bits(f32(3, 8, 14), back(folder, base=base)["w"].values)
    edit_matrix(folder, lambda matrix: matrix * np.float32(1 / 3))  # beyond bfloat16
    assert FLOATS["F32"] == back(folder)["w"].dtype


def test_changed_masks(tmp_path: Path) -> None:
    folder = export(tmp_path, SparseTensor("w", (3, 4), INDICES, value_kind="none", dtype=BF16))
    assert [1, 1, 1] == sparse.load_npz(folder / "w.npz").data.tolist()
    edit_matrix(folder, without_first)
    assert SparseTensor("w", (3, 4), INDICES[1:], value_kind="none", dtype=BF16) == back(folder)["w"]
    edit_matrix(folder, times_two)
    with pytest.raises(SourceError, match="a mask whose data are not all 1"):
        back(folder)


def test_what_the_data_are_can_be_changed(tmp_path: Path, base: Path) -> None:
    """Equal numbers with another meaning are a change."""
    folder = export(tmp_path, targets(self_contained=True))
    edit_index(folder, lambda index: index["tensors"][0].update(values="target"))
    assert same_bits(f32(0.5, -6, -22), back(folder)["w"].values)


def test_matrices_from_elsewhere(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    sparse.save_npz(folder / "x.npz", sparse.csr_array(([0.5, 1.5], ([2, 0], [3, 1])), shape=(3, 4)))
    item = {"name": "w", "file": "x.npz", "shape": [3, 2, 2], "dtype": "F32", "values": "delta"}
    index = {"format": "shira-csr", "version": 1, "manifest": {"alpha": 2}, "tensors": [item], "whole": []}
    (folder / "index.json").write_text(json.dumps(index))
    found = back(folder)
    assert SparseTensor("w", (3, 2, 2), [1, 11], f32(1.5, 0.5), value_kind="delta") == found["w"]
    assert 2 == found.alpha
    with pytest.raises(BaseMismatch, match=r"'w': the adapter is for shape \[3, 2, 2\], the base .* has \[3, 4\]"):
        back(folder, base=base)
    edit_index(folder, lambda index: index["tensors"][0].update(shape=[3, 4]))
    assert SparseTensor("w", (3, 4), [1, 11], f32(2.5, 11.5), base_digest=array_digest(f32(1, 11))) == back(folder, base=base)["w"]  # fmt: skip


def test_tensors_are_left_out(tmp_path: Path) -> None:
    tensors = [SparseTensor(name, (2, 2), [0], f32(1), base=f32(0)) for name in ("a.x", "b.x", "c.y")]
    manifest = {
        "selection": {"rule": "top-k", "energy_kept": 0.5, "relative_error": 0.5},
        "removed": ["d.x", "d.y"],
    }
    whole = [DenseTensor("e.x", f32(1)), DenseTensor("e.y", f32(1))]
    folder = export(tmp_path, *tensors, dense=whole, manifest=manifest, include=["x"], exclude=["^b"])
    found = back(folder)
    assert (["a.x"], ["e.x"], ("d.x",)) == (list(found), list(found.dense), found.removed)
    (tmp_path / "all").mkdir()
    folder = export(tmp_path / "all", *tensors, dense=whole, manifest=manifest)
    assert 0.5 == back(folder).manifest["selection"]["energy_kept"]
    found = back(folder, exclude=["y"])
    assert (["a.x", "b.x"], ["e.x"], ("d.x",)) == (list(found), list(found.dense), found.removed)
    assert {"rule": "top-k"} == found.manifest["selection"]
    edit_index(folder, lambda index: index["tensors"].pop(0))
    edit_index(folder, lambda index: index["whole"].clear())
    assert (["b.x", "c.y"], []) == (list(back(folder)), list(back(folder).dense))
    for call in (
        lambda: shira_to_csr(tmp_path / "a.st", None, include=["z"]),
        lambda: csr_to_shira(folder, None, include=["z"]),
    ):
        with pytest.raises(SourceError, match="no tensor is left by the choice of names"):
            call()


# --- The base ---


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    save(Adapter([targets()]), tmp_path / "a.st")
    wrong = tmp_path / "wrong.safetensors"

    def holds(tensors: dict[str, Array]) -> None:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, wrong)

    holds({"v": BASE})
    with pytest.raises(BaseMismatch, match="tensor 'w': the base .* has no 'w'"):
        shira_to_csr(tmp_path / "a.st", tmp_path / "csr", base=wrong)
    holds({"w": BASE + 1})
    with pytest.raises(BaseMismatch, match="digest differs"):
        shira_to_csr(tmp_path / "a.st", tmp_path / "csr", base=wrong)
    assert not (tmp_path / "csr").exists()
    folder = export(tmp_path, targets(), base=base)
    with pytest.raises(BaseMismatch, match="digest differs"):
        back(folder, base=wrong)
    edit_matrix(folder, times_two)  # the entries are as they were
    with pytest.raises(BaseMismatch, match="other values at the adapter's entries"):
        back(folder, base=wrong)
    holds({"w": BASE.T})
    with pytest.raises(BaseMismatch, match="shape"):
        back(folder, base=wrong)
    holds({"w": BASE.astype(np.float16)})
    with pytest.raises(BaseMismatch, match="the adapter is for float32, the base .* has float16"):
        back(folder, base=wrong)
    # Entries that are there no more cannot tell, base values that the folder holds can.
    holds({"w": BASE + 1})
    edit_matrix(folder, without_first)
    assert "target" == back(folder, base=wrong)["w"].value_kind
    (tmp_path / "self").mkdir()
    folder = export(tmp_path / "self", targets(self_contained=True))
    edit_matrix(folder, without_first)
    with pytest.raises(BaseMismatch, match="other values at the adapter's entries"):
        back(folder, base=wrong)


def test_whole_tensors_and_the_base(tmp_path: Path, base: Path) -> None:
    known = DenseTensor("w", BASE + 1, base_digest=array_digest(BASE))
    folder = export(tmp_path, dense=[known, DenseTensor("new", f32(1))])
    with pytest.raises(SourceError, match="'w': the base's values are not available: pass --base"):
        back(folder, self_contained=True)
    assert known == back(folder, base=base).dense["w"]
    found = back(folder, base=base, self_contained=True).dense
    assert same_bits(BASE, found["w"].base)
    assert found["new"].base is None
    save_file({"w": BASE + 2}, base)
    with pytest.raises(BaseMismatch, match="'w': the base .* holds another tensor"):
        back(folder, base=base)


def test_values_that_need_the_base(tmp_path: Path, base: Path) -> None:
    deltas = SparseTensor("w", (3, 4), INDICES, f32(1, 2, 3), value_kind="delta")
    save(Adapter([deltas]), tmp_path / "a.st")
    with pytest.raises(SourceError, match=r"a\.st: tensor 'w': holds deltas: pass --base for targets, or"):
        shira_to_csr(tmp_path / "a.st", tmp_path / "csr", values="target")
    shira_to_csr(tmp_path / "a.st", tmp_path / "csr", values="target", base=base)
    assert [2, 8, 14] == sparse.load_npz(tmp_path / "csr" / "w.npz").data.tolist()
    assert deltas == back(tmp_path / "csr")["w"]
    with pytest.raises(ValueError, match="values 'x'"):
        shira_to_csr(tmp_path / "a.st", None, values="x")  # type: ignore[arg-type]


# --- Large shapes ---


@pytest.mark.parametrize(
    "shape", [(3, 2**40), (65537, 65539), (2, 2**31 - 1), (2**20, 2**10, 2**20), (0, 5), (5, 0), ()]
)
def test_shapes_beyond_31_bits(shape: tuple[int, ...], tmp_path: Path) -> None:
    rows, columns = matrix_shape(shape)
    last = rows * columns - 1
    indices = sorted({0, columns - 1, last}) if last > 0 else [0] * (last + 1)
    values = np.arange(1, len(indices) + 1, dtype=np.float32)
    tensor = SparseTensor("w", shape, np.array(indices, np.int64), values, base=values * 0)
    folder = export(tmp_path, tensor)
    matrix = sparse.load_npz(folder / "w.npz")
    assert (np.int64 if columns > 2**31 - 1 else np.int32) == matrix.indices.dtype
    assert (rows, columns) == matrix.shape
    edit_matrix(folder, lambda matrix: None)
    edit_index(folder, lambda index: index.pop("original"))
    assert same_bits(values, back(folder)["w"].values)
    assert indices == back(folder)["w"].indices.tolist()


@pytest.mark.parametrize("shape", [(2**53 - 1,), (2**32, 3), (2**26 - 1, 2**27)])
def test_too_many_rows_are_refused_before_anything_is_allocated(shape: tuple[int, ...], tmp_path: Path) -> None:
    save(Adapter([SparseTensor("w", shape, [5], f32(1), base=f32(0))]), tmp_path / "a.st")
    folder = tmp_path / "mine"
    folder.mkdir()
    item = {"name": "w", "file": "w.npz", "shape": shape, "dtype": "F32", "values": "delta"}
    index = {"format": "shira-csr", "version": 1, "manifest": {}, "tensors": [item], "whole": []}
    (folder / "index.json").write_text(json.dumps(index))
    members: dict[str, Any] = dict(matrix_members(), shape=np.array(matrix_shape(shape)))
    np.savez(folder / "w.npz", **members)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="tensor 'w': .* rows for 1 entries"):
            shira_to_csr(tmp_path / "a.st", tmp_path / "csr")
        with pytest.raises(SourceError, match="do not fit"):
            csr_to_shira(folder, None)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    count = 200_000
    values = np.ones(count, np.float32)
    tensors = [
        SparseTensor(f"w{n}", (1000, 1000), np.arange(count) * 5, values + n, base=values) for n in range(8)
    ]
    save(Adapter(tensors), tmp_path / "a.st")
    del tensors
    for call in (
        lambda: shira_to_csr(tmp_path / "a.st", tmp_path / "csr"),
        lambda: csr_to_shira(tmp_path / "csr", tmp_path / "b.st"),
    ):
        tracemalloc.start()
        try:
            call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100 * count  # 16 bytes an entry in the file, 128 for eight tensors


# --- Names and folders ---


def test_file_names() -> None:
    names = ["layer.0.weight", "Layer.0.weight", "a/b", "..", "../x", ".x", "é", "con.weight", "NUL", "a~b", "x" * 900, "x" * 901, "a b", "%41", "A", "\u202e", "a\\b", "w.", "c:d"]  # fmt: skip
    found = file_names(names)
    assert "layer.0.weight.npz" == found["layer.0.weight"]
    assert "a%2Fb.npz" == found["a/b"]
    assert "%2E..npz" == found[".."]
    assert "%63on.weight.npz" == found["con.weight"]
    assert "%C3%A9.npz" == found["é"]
    assert len(names) == len({file.lower() for file in found.values()})
    for file in found.values():
        assert len(file) <= 124
        assert set(file) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.%~")
        assert not file.startswith(".")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=200), unique=True))
def test_file_names_are_distinct_and_are_read_again(names: list[str]) -> None:
    from shira_format.convert.csr.folder import _FILE

    found = file_names(names)
    assert len(names) == len({file.lower() for file in found.values()})
    assert all(_FILE.fullmatch(file) for file in found.values())


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    folder = export(tmp_path, targets(self_contained=True))
    path = tmp_path / "a.st"
    with pytest.raises(SourceError, match=r"csr: exists; --force replaces it$"):
        shira_to_csr(path, folder)
    edit_matrix(folder, times_two)
    (folder / ".DS_Store").touch()
    shira_to_csr(path, folder, force=True)
    assert everything(path) == back(folder)
    with pytest.raises(SourceError, match=r"holds .*original\.st, and is not replaced"):
        shira_to_csr(folder / "original.st", folder, force=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SourceError, match=r"holds 'notes\.txt', which shira_to_csr did not write"):
        shira_to_csr(path, folder, force=True)
    assert "mine" == (folder / "notes.txt").read_text()
    other = tmp_path / "other"
    other.mkdir()
    for content in (None, "{}", '{"format": "shira-csr"}', "["):
        if content is not None:
            (other / "index.json").write_text(content)
        with pytest.raises(SourceError, match="not a folder that shira_to_csr wrote"):
            shira_to_csr(path, other, force=True)
    with pytest.raises(SourceError, match="not a folder that shira_to_csr wrote"):
        shira_to_csr(path, path, force=True)
    with pytest.raises(SourceError, match="is one of the inputs"):
        csr_to_shira(folder, folder / "original.st")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_leaves_everything_as_it_was(
    there: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (SparseTensor(name, (2, 2), [0], f32(1), base=f32(0)) for name in "ab")
    save(Adapter([first, second]), tmp_path / "a.st")
    if there:
        shira_to_csr(tmp_path / "a.st", tmp_path / "csr")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def progress(_: int) -> None:
        raise error

    with pytest.raises(error):
        shira_to_csr(tmp_path / "a.st", tmp_path / "csr", force=there, progress=progress)
    if there:
        with pytest.raises(error):
            csr_to_shira(tmp_path / "csr", tmp_path / "b.st", progress=progress)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (["a.st", "csr"] if there else ["a.st"]) == listing(tmp_path)


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    save(Adapter([targets(self_contained=True)]), tmp_path / "a.st")
    dry = shira_to_csr(tmp_path / "a.st", None)
    assert ["a.st"] == listing(tmp_path)
    wet = shira_to_csr(tmp_path / "a.st", tmp_path / "csr")
    assert (dry.tensors, None) == (wet.tensors, dry.folder_bytes)
    assert wet.folder_bytes == sum(path.stat().st_size for path in (tmp_path / "csr").iterdir())
    dried = csr_to_shira(tmp_path / "csr", None)
    assert ["a.st", "csr"] == listing(tmp_path)
    done = csr_to_shira(tmp_path / "csr", tmp_path / "b.st")
    assert (dried.tensors, None) == (done.tensors, dried.file_bytes)
    assert (tmp_path / "b.st").stat().st_size == done.file_bytes


def test_scipy_is_imported_when_it_is_used() -> None:
    code = "import sys, shira_format.convert.csr; sys.exit('scipy' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Files of strangers ---


def matrix_members(**changes: Any) -> dict[str, Any]:
    """What scipy saves of a 3 x 4 matrix with one entry, 2 at (1, 2)."""
    members: dict[str, Any] = {
        "indices": np.array([2], np.int32), "indptr": np.array([0, 0, 1, 1], np.int32),
        "format": np.array(b"csr"), "shape": np.array([3, 4]), "data": f32(2),
    }  # fmt: skip
    return {name: array for name, array in (members | changes).items() if array is not None}


def zipped(members: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            array = io.BytesIO()
            if isinstance(content, bytes):
                array.write(content)
            else:
                np.lib.format.write_array(array, np.asarray(content), allow_pickle=True)
            archive.writestr(f"{name}.npy", array.getvalue())
    return file.getvalue()


def header(shape: Any, dtype: str = "<f4") -> bytes:
    """The start of an .npy member with this header, and no data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


class Evil:
    """Says so if it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def i32(*values: int) -> Array:
    return np.array(values, np.int32)


HOSTILE: dict[str, tuple[Any, str]] = {
    "pickle": ({"data": np.array([Evil()], object)}, "holds Python objects"),
    "pickle of shape": ({"shape": np.array([Evil(), 1], object)}, "holds Python objects"),
    "pickle of flag": ({"_is_array": np.array(Evil(), object)}, "holds Python objects"),
    "other shape": ({"shape": np.array([4, 3])}, r"a matrix of shape \[4, 3\], expected \[3, 4\]"),
    "three dimensions": ({"shape": np.array([3, 4, 1])}, "not two dimensions"),
    "column beyond": ({"indices": i32(4)}, "column 4 is out of range: there are 4"),
    "column negative": ({"indices": i32(-1)}, "column -1 is out of range"),
    "twice": ({"indices": i32(2, 2), "data": f32(1, 2), "indptr": i32(0, 0, 2, 2)}, "row 1, column 2 occurs twice"),
    "twice, apart": (
        {"indices": i32(2, 0, 2), "data": f32(1, 2, 3), "indptr": i32(0, 0, 3, 3)},
        "row 1, column 2 occurs twice",
    ),
    "pointers back": ({"indptr": i32(0, 2, 1, 1)}, "'indptr' does not go"),
    "pointers beyond": ({"indptr": i32(0, 0, 1, 900)}, "w.npz: "),
    "pointers short of": ({"indices": i32(2, 3), "data": f32(1, 2)}, "'indptr' does not go from 0 to 2"),
    "pointers of another length": ({"indptr": i32(0, 0, 1)}, "do not fit"),
    "pointers from 1": ({"indptr": i32(1, 1, 1, 1)}, "w.npz: "),
    "too many": (
        {"indices": np.zeros(13, np.int32), "data": np.zeros(13, np.float32), "indptr": i32(0, 13, 13, 13)},
        "13 entries, more than the matrix has elements",
    ),
    "fewer data": ({"data": f32()}, "do not fit"),
    "data in two dimensions": ({"data": f32(1).reshape(1, 1)}, "do not fit"),
    "integers": ({"data": np.array([2])}, "'data' is of dtype int64; it must be float16, float32 or float64"),
    "complex": ({"data": np.array([2j])}, "'data' is of dtype complex128"),
    "float indices": ({"indices": f32(2)}, "'indices' is of dtype float32, not integers"),
    "coo": ({"format": np.array(b"coo")}, r"a matrix in the format 'coo': save its \.tocsr\(\)"),
    "many formats": ({"format": np.array([b"csr", b"csr"])}, "'format' is not one word"),
    "no indptr": ({"indptr": None}, "it has no 'indptr'"),
    "not an array": ({"data": b"\1\2\3"}, "w.npz: "),
    "larger than it is": ({"data": header((2**50,))}, "which is not its size"),
    "negative": ({"data": header((-1,))}, "w.npz: "),
    "no header": ({"data": b"\x93NUMPY\1\0\x04\0oops"}, "w.npz: "),
    "future version": ({"data": b"\x93NUMPY\7\0\x04\0oops"}, "w.npz: "),
}  # fmt: skip


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an index of one 3 x 4 tensor ``w`` in ``w.npz``, which is still to be written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    item = {"name": "w", "file": "w.npz", "shape": [3, 4], "dtype": "F32", "values": "delta"}
    index = {"format": "shira-csr", "version": 1, "manifest": {}, "tensors": [item], "whole": []}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(SourceError, match=reason) as caught:
        csr_to_shira(folder, folder.parent / "b.st")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [folder.name] == listing(folder.parent)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_matrices(case: str, mine: Path) -> None:
    changes, reason = HOSTILE[case]
    (mine / "w.npz").write_bytes(zipped(matrix_members(**changes)))
    refused(mine, reason)


def test_the_frame_of_the_hostile_ones_is_good(mine: Path) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        (mine / "w.npz").write_bytes(zipped(matrix_members(**{"x-mine": np.ones(3)}), compression))
        assert SparseTensor("w", (3, 4), [6], f32(2), value_kind="delta") == back(mine)["w"]
    swapped = {"indices": i32(3, 1), "data": np.array([3, 1], ">f4"), "indptr": i32(0, 0, 2, 2)}
    (mine / "w.npz").write_bytes(zipped(matrix_members(**swapped)))
    assert SparseTensor("w", (3, 4), [5, 7], f32(1, 3), value_kind="delta") == back(mine)["w"]


@given(st.data())
def test_damaged_archives(data: st.DataObject) -> None:
    good = zipped(matrix_members(), zipfile.ZIP_DEFLATED)
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        at, value = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
        bad = good[:at] + bytes([value]) + good[at + 1 :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        item = {"name": "w", "file": "w.npz", "shape": [3, 4], "dtype": "F32", "values": "delta"}
        index = {"format": "shira-csr", "version": 1, "manifest": {}, "tensors": [item], "whole": []}
        (folder / "index.json").write_text(json.dumps(index))
        (folder / "w.npz").write_bytes(bad)
        try:
            csr_to_shira(folder, folder / "b.st")
        except SourceError as error:
            assert "w.npz" in str(error)
        else:  # a byte that says nothing of the content, such as a date
            assert SparseTensor("w", (3, 4), [6], f32(2), value_kind="delta") == load(folder / "b.st")["w"]


def test_archives_that_lie(mine: Path, tmp_path: Path) -> None:
    path = mine / "w.npz"
    path.write_bytes(b"")
    refused(mine, r"w\.npz: ")
    path.write_bytes(zipped(matrix_members(), zipfile.ZIP_LZMA))
    refused(mine, "compressed in a way that numpy does not use")
    file = io.BytesIO(zipped(matrix_members()))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("data.npy", b"")
    path.write_bytes(file.getvalue())
    refused(mine, "'data' occurs twice")
    file = io.BytesIO(zipped(matrix_members()))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("data", b"")
    path.write_bytes(file.getvalue())
    refused(mine, "'data' occurs twice")
    # A member whose announced size is that of its header, and far beyond what its bytes could hold.
    start = header((2**40,))
    raw = zipped(matrix_members(data=start), zipfile.ZIP_DEFLATED)
    path.write_bytes(raw.replace(len(start).to_bytes(4, "little"), (0xFFFFFF00).to_bytes(4, "little")))
    refused(mine, "declares more bytes than it can hold")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "../w.npz"}, "'file' is not the name"),
        ({"file": "/etc/w.npz"}, "'file' is not the name"),
        ({"file": "a\\w.npz"}, "'file' is not the name"),
        ({"file": "c:w.npz"}, "'file' is not the name"),
        ({"file": ".w.npz"}, "'file' is not the name"),
        ({"file": "w.npz\n"}, "'file' is not the name"),
        ({"file": "w.st"}, "'file' is not the name"),
        ({"file": "v.npz"}, r"v\.npz: no such file"),
        ({"file": 1}, "'file' is not of type str"),
        ({"name": ""}, "cannot name a tensor"),
        ({"name": 3}, "'name' is not of type str"),
        ({"shape": [3, -4]}, "'shape' is not"),
        ({"shape": [2**40, 2**40]}, "'shape' is not"),
        ({"shape": [True, 12]}, "'shape' is not"),
        ({"shape": [1] * 65}, "'shape' is not"),
        ({"shape": [4, 3]}, r"a matrix of shape \[3, 4\], expected \[4, 3\]"),
        ({"dtype": "I32"}, "dtype 'I32' is not a float dtype"),
        ({"data_dtype": "BF16"}, "'data_dtype' is neither"),
        ({"values": "sum"}, "'values' is 'sum'"),
        ({"values": "target"}, "targets whose base values are not known: pass --base"),
        ({"digests": {"base": "0"}}, "the digest 'base' is not 64 hex digits"),
        ({"digests": []}, "'digests' is not of type dict"),
        ({"rows": 5}, "part of a patch, which needs original.st"),
    ],
)  # fmt: skip
def test_hostile_items(change: dict[str, Any], reason: str, mine: Path) -> None:
    (mine / "w.npz").write_bytes(zipped(matrix_members()))
    edit_index(mine, lambda index: index["tensors"][0].update(change))
    refused(mine, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "x"}, "'format' and 'version'"),
        ({"version": 2}, "'format' and 'version'"),
        ({"tensors": {}}, "'tensors' is not of type list"),
        ({"tensors": [1]}, "an item of 'tensors' is not an object"),
        ({"whole": [1]}, "a name is not a string"),
        ({"whole": ["w"]}, "tensor 'w' occurs twice"),
        ({"whole": ["x"]}, r"the whole tensor 'x' is not in original\.st"),
        ({"manifest": []}, "'manifest' is not of type dict"),
        ({"original": "../a.st"}, r"'original' is not 'original\.st'"),
        ({"original": "original.st"}, r"original\.st: no such file"),
    ],
)
def test_hostile_indexes(change: dict[str, Any], reason: str, mine: Path) -> None:
    (mine / "w.npz").write_bytes(zipped(matrix_members()))
    edit_index(mine, lambda index: index.update(change))
    refused(mine, reason)


def test_indexes_that_cannot_be_read(mine: Path) -> None:
    for text in (b"", b"[]", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}'):
        (mine / "index.json").write_bytes(text)
        refused(mine, r"index\.json: ")
    (mine / "index.json").unlink()
    refused(mine, r"it has no index\.json")
    with pytest.raises(SourceError, match="no such folder"):
        csr_to_shira(mine / "x", None)


def test_a_provenance_that_no_adapter_may_have(mine: Path) -> None:
    (mine / "w.npz").write_bytes(zipped(matrix_members()))
    edit_index(mine, lambda index: index.update(manifest={"removed": [1], "alpha": "x"}))
    with pytest.raises(ShiraError, match="manifest-schema"):
        csr_to_shira(mine, mine.parent / "b.st")
    assert ["mine"] == listing(mine.parent)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_that_lead_out(mine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "w.npz"
    elsewhere.write_bytes(zipped(matrix_members()))
    (mine / "w.npz").symlink_to(elsewhere)
    refused(mine, r"w\.npz: leads out of the folder")


def test_an_original_that_does_not_fit(tmp_path: Path) -> None:
    folder = export(tmp_path, targets(self_contained=True))
    edit_index(folder, lambda index: index["tensors"][0].update(dtype="BF16"))
    with pytest.raises(SourceError, match=r"tensor 'w' has another shape or dtype in original\.st"):
        back(folder)
    (folder / "original.st").write_bytes(b"\0" * 9)
    with pytest.raises(ShiraError, match=r"original\.st"):
        back(folder)


def test_matrices_that_are_not_listed_and_tensors_that_are_left_out(tmp_path: Path, base: Path) -> None:
    folder = export(tmp_path, targets(), base=base)
    sparse.save_npz(folder / "other.npz", sparse.load_npz(folder / "w.npz"))
    with pytest.raises(SourceError, match=r"other\.npz.*--allow-unused"):
        csr_to_shira(folder, tmp_path / "b.st")
    assert not (tmp_path / "b.st").exists()
    assert ["csr: not read: other.npz"] == csr_to_shira(folder, None, allow_unused=True).notices
    (tmp_path / "two").mkdir()
    folder = export(tmp_path / "two", targets(), dense=[DenseTensor("d", f32(1))], base=base)
    assert ["left out, by --include and --exclude: d"] == csr_to_shira(folder, None, exclude=["d"]).notices
    edit_index(folder, lambda index: index.update(whole=[]))
    assert ["left out, in original.st, and not in index.json: d"] == csr_to_shira(folder, None).notices


def test_a_change_that_rounding_takes_away_is_refused(tmp_path: Path) -> None:
    start = np.full(3, 1, BF16)
    tensor = SparseTensor("w", (3, 4), np.array([1, 6, 11]), np.full(3, 2, BF16), base=start)
    folder = export(tmp_path, tensor)
    edit_matrix(folder, lambda matrix: matrix * np.float32(1e-4))
    with pytest.raises(SourceError, match="less than a thousandth of what the update asks for: 'w'"):
        csr_to_shira(folder, tmp_path / "b.st")
    assert not (tmp_path / "b.st").exists()
    report = csr_to_shira(folder, tmp_path / "b.st", force=True)
    assert any("'w'" in notice for notice in report.notices)
    assert same_bits(start, load(tmp_path / "b.st")["w"].values)
