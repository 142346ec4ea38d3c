"""Laws of the effect of an adapter on outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shira_analysis import accuracy
from shira_analysis.measures.effect import effect

OUTPUTS = arrays(np.float32, (4, 3), elements=st.floats(-100, 100, width=32))


@given(OUTPUTS, OUTPUTS)
def test_the_ends_of_the_scale(base: np.ndarray, source: np.ndarray) -> None:
    assert 1 == effect(base, source, source).kept
    if not np.array_equal(base, source):
        assert pytest.approx(0) == effect(base, source, base).kept
        assert pytest.approx(1) == effect(base, source, source).cosine


def test_small_differences_far_from_the_base_count() -> None:
    base, source, adapter = (np.full((1, 1), value, np.float32) for value in (1e8, 3, 2))
    assert effect(base, source, adapter).kept < 1
    assert (1, 0) == (effect(base, base, base).kept, effect(base, base, adapter).kept)


@given(OUTPUTS, OUTPUTS, OUTPUTS)
def test_bounds(base: np.ndarray, source: np.ndarray, adapter: np.ndarray) -> None:
    found = effect(base, source, adapter)
    assert found.kept <= 1
    assert abs(found.cosine) <= 1 + 1e-9


@given(OUTPUTS, OUTPUTS, st.floats(0.1, 1))
def test_a_part_of_the_way(base: np.ndarray, source: np.ndarray, share: float) -> None:
    base, source = base.astype(np.float64), source.astype(np.float64)
    if np.linalg.norm(source - base) > 1:
        assert pytest.approx(1 - (1 - share) ** 2) == effect(base, source, base + share * (source - base)).kept


def test_accuracy() -> None:
    assert 0.75 == accuracy(np.eye(4, dtype=np.float32), np.array([0, 1, 2, 0]))
