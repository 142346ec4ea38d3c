"""Sizes against dense oracles, and figures of uniform masks against all masks there are."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_analysis.measures.size import combine_masks, combine_norms, mask_of, norms_of, norms_of_values
from shira_analysis.measures.uniform import dispersion_of_gaps, lines_with_entries, mean_of
from shira_format.tensors import SparseTensor, matrix_shape
from tests.strategies import HUGE_SHAPES, masks, small_shapes

numbers = st.floats(-1e6, 1e6) | st.floats(allow_nan=False, allow_infinity=False) | st.just(0.0)


def mask(shape: tuple[int, ...], indices: object) -> SparseTensor:
    return SparseTensor("w", shape, indices, value_kind="none")


@given(st.data(), small_shapes())
def test_masks_equal_a_dense_oracle(data: st.DataObject, shape: tuple[int, ...]) -> None:
    indices = data.draw(masks(shape))
    found = mask_of(mask(shape, indices))
    dense = np.zeros(math.prod(shape), bool)
    dense[indices] = True
    rows, columns = matrix_shape(shape)
    view = dense.reshape(rows, columns)
    assert (indices.size, dense.size) == (found.nnz, found.numel)
    assert (view.any(1).sum(), rows, view.any(0).sum(), columns) == (
        found.rows, found.all_rows, found.columns, found.all_columns,
    )  # fmt: skip
    if not indices.size:
        assert {} == found.spread
        return
    assert (dense[1:] & dense[:-1]).sum() == found.spread["neighbours"].found
    for axis, count, name in ((1, rows, "row_dispersion"), (0, columns, "column_dispersion")):
        if count < 2:
            assert name not in found.spread
            continue
        counts = view.sum(axis)
        assert math.isclose(np.var(counts, ddof=1) / counts.mean(), found.spread[name].found, abs_tol=1e-12)
    if dense.all():
        assert "gap_dispersion" not in found.spread
        return
    gaps = np.diff(np.flatnonzero(np.concatenate([[True], dense, [True]]))) - 1
    assert math.isclose(np.var(gaps, ddof=1) / gaps.mean(), found.spread["gap_dispersion"].found, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [
        (3, 4, 5),
        (2, 3, 1),
        (4, 2, 4),
        (4, 3, 10),
        (1, 6, 3),
        (5, 1, 2),
        (3, 3, 9),
        (2, 5, 6),
        (2, 2, 3),
        (1, 1, 1),
    ],
)
def test_expectations_are_those_of_all_masks(rows: int, columns: int, count: int) -> None:
    all_masks = [
        mask_of(mask((rows, columns), np.array(chosen, np.int64))).spread
        for chosen in itertools.combinations(range(rows * columns), count)
    ]
    for name, figure in all_masks[0].items():
        found = [spread[name].found for spread in all_masks]
        assert math.isclose(statistics.fmean(found), figure.expected, abs_tol=1e-12), name
        assert math.isclose(statistics.pstdev(found), figure.deviation, abs_tol=1e-7), name
    assert {"rows", "columns", "neighbours"} <= set(all_masks[0])


def test_uniform_masks_look_uniform_and_clustered_ones_do_not() -> None:
    random = np.random.default_rng(1)
    shape = (600, 900)
    uniform = mask_of(mask(shape, np.sort(random.choice(540_000, 5400, replace=False)))).spread
    z = {name: figure.z for name, figure in uniform.items()}
    assert 6 == len(z)
    assert all(value is not None and abs(value) < 4.5 for value in z.values()), z
    block = (np.arange(70)[:, None] * 900 + np.arange(77)).reshape(-1)
    clustered = {name: figure.z or 0.0 for name, figure in mask_of(mask(shape, block)).spread.items()}
    assert clustered["rows"] < -50
    assert clustered["columns"] < -50
    assert min(value for name, value in clustered.items() if name not in ("rows", "columns")) > 50


def test_a_large_mask_has_an_even_spread_of_rows() -> None:
    # The chance of an empty row is that of no entry in 4096 draws of 1 %.
    figure = lines_with_entries(4096, 4096, 4096, 167_772)
    assert math.isclose(4096 * (1 - 0.99**4096), figure.expected, rel_tol=1e-12)
    assert 0 < figure.deviation < 1e-6
    none = lines_with_entries(10, 10, 4, 38)  # two elements left out cannot make an empty row
    assert (10, 0, None) == (none.expected, none.deviation, none.z)


@pytest.mark.parametrize("shape", HUGE_SHAPES)
def test_huge_shapes_take_memory_for_their_entries_alone(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    found = mask_of(mask(shape, [0, 1, size - 1]))
    assert (3, size) == (found.nnz, found.numel)
    assert all(math.isfinite(f.found) and math.isfinite(f.expected) for f in found.spread.values())
    gaps = dispersion_of_gaps(np.array([0, 1, size - 1]), size)
    assert gaps is not None
    assert math.isclose(4.0 * (size - 3) / 4, gaps.found, rel_tol=1e-9)  # one gap of four holds all


@given(st.lists(numbers, max_size=40))
def test_norms_equal_a_dense_oracle(values: list[float]) -> None:
    found = norms_of_values(np.array(values, np.float64))
    assert sum(value == 0 for value in values) == found.zeros
    assert max(map(abs, values), default=0.0) == found.largest
    # Within the rounding of the smallest numbers there are.
    assert math.isclose(math.hypot(*values), found.frobenius, rel_tol=1e-12, abs_tol=1e-323)
    try:
        total = math.fsum(map(abs, values))
    except OverflowError:
        total = math.inf
    assert total == found.l1 or math.isclose(total, found.l1, rel_tol=1e-12, abs_tol=1e-322)
    counts: dict[int, int] = {}
    for value in values:
        if value:
            exponent = math.frexp(value)[1] - 1
            assert 2.0**exponent <= abs(value) < math.ldexp(2.0, min(exponent, 1022)) or exponent == 1023
            counts[exponent] = counts.get(exponent, 0) + 1
    assert sorted(counts.items()) == list(found.histogram.items())


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=12), max_size=4))
def test_norms_add_up(parts: list[list[float]]) -> None:
    joined = combine_norms(norms_of_values(np.array(part, np.float64)) for part in parts)
    whole = norms_of_values(np.array([value for part in parts for value in part], np.float64))
    assert (whole.zeros, whole.largest, whole.histogram) == (joined.zeros, joined.largest, joined.histogram)
    assert math.isclose(whole.frobenius, joined.frobenius, rel_tol=1e-12, abs_tol=1e-300)
    assert math.isclose(whole.l1, joined.l1, rel_tol=1e-12, abs_tol=1e-300)


def test_norms_of_a_tensor() -> None:
    tensor = SparseTensor("w", (2, 3), [0, 2, 5], np.float16([4, 1, 3]), base=np.float16([1, 1, 7]))
    found = norms_of(tensor)
    assert (1, 5.0, 7.0, 4.0, 25.0) == (found.zeros, found.frobenius, found.l1, found.largest, found.energy)
    assert {1: 1, 2: 1} == found.histogram
    assert 7 / 3 == found.mean(3)
    assert [{"from": 2.0, "count": 1}, {"from": 4.0, "count": 1}] == found.as_json()["histogram"]


def test_masks_add_up() -> None:
    masks_ = [
        mask_of(mask((2, 3), [0, 1])),
        mask_of(mask((4, 2), [7])),
        mask_of(mask((0, 2), np.empty(0, np.int64))),
    ]
    found = combine_masks(masks_)
    assert (3, 14, 2, 6, 3, 7) == (
        found.nnz, found.numel, found.rows, found.all_rows, found.columns, found.all_columns,
    )  # fmt: skip
    rows = [part.spread["rows"] for part in masks_[:2]]
    mean = found.spread["rows"]
    assert (rows[0].found + rows[1].found) / 2 == mean.found
    assert math.hypot(rows[0].deviation, rows[1].deviation) / 2 == mean.deviation
    assert mean_of([]) is None
    assert 0 == combine_masks([]).density
