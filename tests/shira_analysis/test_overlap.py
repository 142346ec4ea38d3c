"""The overlap of two adapters, element by element and by chance."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shira_analysis.measures.overlap import Overlap, overlap, shared_positions
from shira_format.errors import BaseRequired, SourceError
from shira_format.tensors import SparseTensor

SHAPE = (5, 2, 3)
DENSE = arrays(np.float32, SHAPE, elements=st.sampled_from([0, 0, 0, 1, -1, 2, -0.5]))
MASKS = arrays(bool, SHAPE)


def tensor(mask: np.ndarray, deltas: np.ndarray) -> SparseTensor:
    indices = np.flatnonzero(mask)
    return SparseTensor("w", SHAPE, indices, deltas.ravel()[indices], value_kind="delta")


@given(MASKS, DENSE, MASKS, DENSE)
def test_against_loops(in_a: np.ndarray, a: np.ndarray, in_b: np.ndarray, b: np.ndarray) -> None:
    found = overlap(tensor(in_a, a), tensor(in_b, b))
    a, b, both = (a * in_a).astype(float), (b * in_b).astype(float), in_a & in_b
    assert (found.elements, found.first, found.second) == (30, in_a.sum(), in_b.sum())
    assert (found.shared, found.union) == (both.sum(), (in_a | in_b).sum())
    assert (found.same_sign, found.opposite_sign) == ((a * b > 0).sum(), (a * b < 0).sum())
    assert found.inner == pytest.approx((a * b).sum())
    assert found.distances == pytest.approx([np.linalg.norm(x) for x in (a - b, a, b)])
    if found.union:
        assert found.jaccard == both.sum() / (in_a | in_b).sum()
    if a.any() and b.any():
        assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    else:
        assert found.cosine is None


@given(MASKS, DENSE, MASKS, DENSE)
def test_symmetric_but_for_names(in_a: np.ndarray, a: np.ndarray, in_b: np.ndarray, b: np.ndarray) -> None:
    one, other = overlap(tensor(in_a, a), tensor(in_b, b)), overlap(tensor(in_b, b), tensor(in_a, a))
    assert (one.shared, one.jaccard, one.sign_agreement) == (other.shared, other.jaccard, other.sign_agreement)
    assert (one.expected, one.variance) == pytest.approx((other.expected, other.variance))
    assert (one.inner, one.first_energy) == pytest.approx((other.inner, other.second_energy))


@given(MASKS, DENSE)
def test_with_itself_and_with_nothing(mask: np.ndarray, deltas: np.ndarray) -> None:
    mine = tensor(mask, deltas)
    same, alone = overlap(mine, mine), overlap(None, mine)
    assert (same.shared, same.between, same.opposite_sign) == (mine.nnz, 0, 0)
    assert (alone.shared, alone.expected, alone.first_energy) == (0, 0, 0)
    assert alone.between == pytest.approx(alone.second_energy)
    if (deltas * mask).any():
        assert same.cosine == pytest.approx(1)
        assert same.sign_agreement == 1


def test_a_small_distance_is_not_rounding() -> None:
    a = SparseTensor("w", (2,), [0, 1], np.float64([1e8, 1]), value_kind="delta")
    b = SparseTensor("w", (2,), [0, 1], np.float64([1e8, 1 + 1e-6]), value_kind="delta")
    found = overlap(a, b).distances
    assert found is not None
    assert found[0] == pytest.approx(1e-6, rel=1e-6)


@given(st.integers(2, 60), st.data())
def test_chance_is_the_hypergeometric_distribution(elements: int, data: st.DataObject) -> None:
    first, second = (data.draw(st.integers(0, elements)) for _ in range(2))
    a, b = (SparseTensor("w", (elements,), np.arange(k), value_kind="none") for k in (first, second))
    found = overlap(a, b)
    ways = [comb(first, k) * comb(elements - first, second - k) for k in range(second + 1)]
    mean = sum(k * n for k, n in enumerate(ways)) / sum(ways)
    variance = sum((k - mean) ** 2 * n for k, n in enumerate(ways)) / sum(ways)
    assert (found.expected, found.variance) == pytest.approx((mean, variance), abs=1e-12)


def test_random_masks_share_what_chance_gives() -> None:
    found = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        a, b = (np.sort(random.choice(4000, size, replace=False)) for size in (400, 300))
        found.append(overlap(*(SparseTensor("w", (40, 100), i, value_kind="none") for i in (a, b))))
    surprises = np.array([one.surprise for one in found])
    # Of 200 standardised values: the mean is good to 0.07, the deviation to 0.05.
    assert abs(surprises.mean()) < 0.35
    assert 0.75 < surprises.std() < 1.25
    whole = sum(found, Overlap())
    assert abs(whole.shared - whole.expected) < 5 * whole.deviation


def test_masks_have_positions_and_no_values() -> None:
    mask = SparseTensor("w", (4,), [0, 2], value_kind="none")
    deltas = SparseTensor("w", (4,), [2, 3], np.float32([1, 1]), value_kind="delta")
    found = overlap(mask, deltas)
    assert (found.shared, found.inner, found.cosine, found.sign_agreement, found.distances) == (
        1,
        None,
        None,
        None,
        None,
    )
    assert (found + overlap(deltas, deltas)).inner is None


def test_targets_need_the_base_unless_positions_are_enough() -> None:
    targets = SparseTensor("w", (4,), [0, 2], np.float32([1, 1]))
    with pytest.raises(BaseRequired):
        overlap(targets, targets)
    assert overlap(targets, targets, values=False).shared == 2


def test_refusals() -> None:
    a = SparseTensor("w", (4,), [0], np.float64([1]), value_kind="delta")
    with pytest.raises(SourceError, match="at least one tensor"):
        overlap(None, None)
    with pytest.raises(SourceError, match=r"\[4\].*\[2, 2\]"):
        overlap(a, SparseTensor("w", (2, 2), [0], np.float64([1]), value_kind="delta"))
    with pytest.raises(SourceError, match=r"'w'.*too large"):
        overlap(a, SparseTensor("w", (4,), [0], np.float64([1e200]), value_kind="delta"))


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_shared_positions(a: set[int], b: set[int]) -> None:
    assume(a or b)
    first, second = (np.array(sorted(s), np.int64) for s in (a, b))
    in_a, in_b = shared_positions(first, second)
    assert sorted(a & b) == first[in_a].tolist() == second[in_b].tolist()
