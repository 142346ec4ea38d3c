"""Random adapters against the dimension: what is drawn is what the formulas and dense products give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from shira_analysis.figures import dimensions, pictures, style
from shira_analysis.measures.orthogonality import orthogonality
from shira_format.errors import SourceError


@pytest.fixture
def axes() -> Any:
    return style.figure(4, 3).subplots()


@pytest.mark.parametrize("series", [s for s in dimensions.SERIES if "SHiRA" in s])
def test_random_adapters_are_of_their_density(series: str) -> None:
    random = np.random.default_rng(0)
    first, second = dimensions._masks(series, 512, 0.01, random)
    for indices in (first, second):
        assert (np.diff(indices) > 0).all()
        assert 0.01 * 512**2 - 1 <= indices.size <= 0.01 * 512**2 + 1 + 2 * 512 * ("Struct" in series)
    common = np.intersect1d(first, second)
    if "non-overlapping" in series:
        assert not common.size
    elif "overlapping" in series:
        assert (first == second).all()
    elif "Struct" in series:
        assert (common == np.arange(512) * 513).all()  # the diagonal, and no cell of two rows


def test_random_adapters_against_what_is_known() -> None:
    m, p, pairs = 256, 0.01, 10
    records = dimensions.dimension_records(dimensions=[m], seeds=pairs)
    found = {record["adapter"]: record for record in records}
    assert list(dimensions.SERIES) == list(found)
    assert m**1.5 == pytest.approx(found["dense"]["awom"], rel=0.01)
    assert 0 == found["dense"]["awor"]
    assert (1 - p * p) ** m == pytest.approx(found["dense"]["awor_if_uniform"])
    for series in ("SHiRA-Rand", "SHiRA-WM, non-overlapping", "SHiRA-WM, overlapping"):
        near = (
            5 * found[series]["awor_deviation"] / math.sqrt(pairs) + 1 / m
        )  # the diagonal, where two masks are one
        assert found[series]["awor_if_uniform"] == pytest.approx(found[series]["awor"], abs=near)
    assert p * m**1.5 == pytest.approx(found["SHiRA-Rand"]["awom"], rel=0.05)
    wide = [dimensions.measure_random_pair("sparse LoRA", 1024, seed) for seed in range(3)]
    assert 1024**1.5 * 64 * (p * 1024 / 128) ** 2 == pytest.approx(np.mean(wide, axis=0)[0], rel=0.1)
    rows = found["SHiRA-Struct, rows"]
    assert 1 - rows["awor"] <= 2 * rows["trained"]  # lemma 4.5, with the diagonal counted once less
    assert (
        found["SHiRA-Rand"] == dimensions.dimension_records(dimensions=[m], seeds=pairs, series=["SHiRA-Rand"])[0]
    )


def test_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    left, right = random.integers(-1, 2, (30, 5)).astype(float), random.integers(-1, 2, (5, 20)).astype(float)
    dense = left @ right
    monkeypatch.setattr(dimensions, "_TILE", 50)
    size, zeros = dimensions._product(left, right)
    assert np.linalg.norm(dense) == pytest.approx(size)
    assert np.count_nonzero(dense == 0) / 600 == pytest.approx(zeros)


def test_struct_pairs_are_measured_as_dense_ones_are() -> None:
    random = np.random.default_rng(0)
    made = [
        dimensions._matrix(mask, 64, random)
        for mask in dimensions._masks("SHiRA-Struct, columns", 64, 0.05, random)
    ]
    product = made[0].toarray().T @ made[1].toarray()
    found = orthogonality(*made)
    assert (np.linalg.norm(product), np.count_nonzero(product)) == (pytest.approx(found.awom), found.nonzero)


def test_dimensions_that_cannot_be() -> None:
    for dimension, density in ((1, 0.01), (128, 0.0), (128, 0.6)):
        with pytest.raises(SourceError, match="cannot be made"):
            dimensions.measure_random_pair("dense", dimension, 0, density)


def test_the_dimension_picture_draws_its_records(axes: Any) -> None:
    records = dimensions.dimension_records(dimensions=[128, 256], seeds=1)
    assert axes is dimensions.draw_dimension(axes, records, "awor")
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    for series in dimensions.SERIES:
        label = "sparse LoRA, rank 64" if series == "sparse LoRA" else series
        assert [r["awor"] for r in records if r["adapter"] == series] == list(drawn[label])
    assert b"\x89PNG" == pictures.dimension_picture(records).image[:4]
