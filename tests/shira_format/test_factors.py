"""The best factors of sparse matrices: against numpy's full SVD, against other factors, and each way against the others."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from shira_format._core.arrays import Array, array_digest
from shira_format._core.threads import single_threaded_blas
from shira_format.errors import SourceError
from shira_format.export.lora import Factors, best_factors
from shira_format.export.lora import svd as svd_module
from shira_format.export.lora.svd import largest, reaching

WAYS = ("lanczos", "gram", "full")


def entries(dense: Array) -> tuple[tuple[int, int], Array, Array]:
    """What ``best_factors`` takes, of a dense matrix."""
    places = np.flatnonzero(dense)
    return dense.shape, places, dense.reshape(-1)[places]


def masked(rows: int, columns: int, density: float, seed: int = 0) -> Array:
    """Normal values at random places."""
    random = np.random.default_rng(seed)
    return random.standard_normal((rows, columns)) * (random.random((rows, columns)) < density)


def of_rank(rows: int, columns: int, rank: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    return random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns))


@st.composite
def matrices(draw: st.DrawFn) -> Array:
    """Small matrices, not zero: of any density, of low rank, or of few different values, which makes equal singular values."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["masked", "low rank", "diagonal", "signs"]))
    if kind == "masked":
        dense = masked(rows, columns, draw(st.floats(0.02, 1)), seed)
    elif kind == "low rank":
        dense = of_rank(rows, columns, draw(st.integers(1, 4)), seed)
    elif kind == "diagonal":
        dense = np.diag(np.repeat([1.0, 2.0], [rows, columns]))
    else:
        dense = np.sign(masked(rows, columns, 0.5, seed))
    if not dense.any():
        dense[0, 0] = 1
    return dense * draw(st.sampled_from([1.0, 1e-3, 1e-20, 3e15]))


def close(expected: float, found: float, scale: float, relative: float = 1e-6) -> bool:
    return bool(abs(expected - found) <= relative * scale)


@given(matrices(), st.integers(1, 30))
def test_errors_are_the_tail_of_the_full_svd(dense: Array, rank: int) -> None:
    found = best_factors(*entries(dense), rank=rank)
    sigma = np.linalg.svd(dense, compute_uv=False)
    norm = float(np.linalg.norm(dense))
    rest = dense - found.up.astype(np.float64) @ found.down.astype(np.float64)
    assert (found.up.dtype, found.down.dtype) == (np.float32, np.float32)
    assert found.rank <= min(rank, found.full_rank)
    assert found.rank >= min(rank, np.linalg.matrix_rank(dense))
    assert close(norm, found.norm, norm, 1e-12)
    # What is measured, of the float32 factors.
    assert close(float(np.linalg.norm(rest)), found.error, norm, 1e-12)
    assert close(float(np.linalg.norm(rest, 2)), found.spectral_error, found.spectral_error, 1e-4)
    # The bounds, and that only rounding lies between.
    tail = float(np.linalg.norm(sigma[rank:]))
    following = float(sigma[rank]) if rank < sigma.size else 0.0
    assert close(tail, found.bound, norm, 1e-7)
    assert close(following, found.spectral_bound, sigma[0], 1e-12)
    assert close(tail, found.error, norm)
    assert close(following, found.spectral_error, norm)
    assert close(1 - (tail / norm) ** 2, found.energy_kept, 1, 1e-12)
    # The printed lemma, whose bound is a square: it does not hold in either norm.
    assert found.spectral_error >= following * (1 - 1e-4)


@given(matrices(), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_no_factors_of_this_rank_are_nearer(dense: Array, rank: int, seed: int) -> None:
    found = best_factors(*entries(dense), rank=rank)
    random = np.random.default_rng(seed)
    up, down = random.standard_normal((dense.shape[0], rank)), random.standard_normal((rank, dense.shape[1]))
    rivals = [(up, down)]
    for _ in range(3):  # least squares for one factor, then the other: far better than chance
        down = np.linalg.lstsq(up, dense, rcond=None)[0]
        up = np.linalg.lstsq(down.T, dense.T, rcond=None)[0].T
        rivals.append((up, down))
    rivals.append((found.up * (1 + 0.01 * random.standard_normal(found.up.shape)), found.down))
    for a, b in rivals:
        rest = dense - a.astype(np.float64) @ b.astype(np.float64)
        assert np.linalg.norm(rest) >= found.error - 1e-6 * found.norm
        assert np.linalg.norm(rest, 2) >= found.spectral_error - 1e-6 * found.norm


@given(matrices())
def test_more_ranks_lose_less_and_all_lose_nothing(dense: Array) -> None:
    factors = [best_factors(*entries(dense), rank=rank) for rank in (1, 2, 3, 5, 8, 48)]
    for fewer, more in zip(factors, factors[1:], strict=False):
        assert more.error <= fewer.error + 1e-6 * fewer.norm
        assert more.spectral_error <= fewer.spectral_error + 1e-6 * fewer.norm
        assert more.energy_kept >= fewer.energy_kept - 1e-12
    assert factors[-1].error <= 1e-6 * factors[-1].norm
    assert factors[-1].rank == np.linalg.matrix_rank(dense)


@given(matrices(), st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.999, 1.0]))
def test_energy_is_reached_by_the_least_rank(dense: Array, energy: float) -> None:
    found = best_factors(*entries(dense), energy=energy)
    squares = np.linalg.svd(dense, compute_uv=False) ** 2
    kept = np.cumsum(squares) / squares.sum()
    assert found.energy_kept >= energy - 1e-9
    assert close(float(kept[found.rank - 1]), found.energy_kept, 1, 1e-9)
    assert found.rank == 1 or kept[found.rank - 2] < energy + 1e-9


@pytest.mark.parametrize("shape", [(300, 220), (220, 300)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["flat", "decaying"])
def test_each_way_is_exact(shape: tuple[int, int], way: Any, kind: str) -> None:
    dense = masked(*shape, 0.05)
    if kind == "decaying":
        dense *= np.geomspace(1, 1e-5, shape[0])[:, None]
    matrix = sparse.csr_matrix(dense)
    sigma = np.linalg.svd(dense, compute_uv=False)
    found = largest(matrix, 12, way)
    assert found.method == way
    left, right = found.left, found.right
    assert np.abs(found.values - sigma[:12]).max() <= 1e-13 * sigma[0]
    assert np.abs(dense @ right - left * found.values).max() <= 1e-13 * sigma[0]
    assert np.abs(dense.T @ left - right * found.values).max() <= 1e-11 * sigma[0]
    for vectors in (left, right):
        assert np.abs(vectors.T @ vectors - np.eye(12)).max() <= 1e-13
    triplets, needed = reaching(matrix, 0.4, way)
    kept = np.cumsum(sigma**2) / (sigma**2).sum()
    assert needed == int(np.searchsorted(kept, 0.4)) + 1
    assert np.abs(triplets.values - sigma[: triplets.values.size]).max() <= 1e-13 * sigma[0]
    assert triplets.values.size > needed


def test_the_way_is_chosen_by_cost() -> None:
    matrix = sparse.csr_matrix(masked(900, 700, 0.01))
    assert [largest(matrix, count).method for count in (4, 300, 600)] == ["lanczos", "gram", "full"]
    assert largest(matrix[:50, :50], 4).method == "full"
    low = sparse.csr_matrix(masked(900, 700, 0.01) * np.geomspace(1, 1e-9, 700))
    assert reaching(low, 0.5)[0].method == "lanczos"
    assert [reaching(matrix, energy)[0].method for energy in (0.5, 0.99, 1.0)] == ["gram", "full", "full"]


def test_products_suffice_or_the_square_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = sparse.csr_matrix(masked(900, 700, 0.01))
    sigma = np.linalg.svd(matrix.toarray(), compute_uv=False)
    monkeypatch.setattr(svd_module, "_products", lambda *_: 40)
    found = largest(matrix, 6)
    assert found.method == "gram"
    assert np.abs(found.values - sigma[:6]).max() <= 1e-12 * sigma[0]
    triplets, needed = reaching(matrix, 0.05)
    assert triplets.method == "gram"
    assert needed == int(np.searchsorted(np.cumsum(sigma**2), 0.05 * (sigma**2).sum())) + 1


def test_dense_and_sparse_squares_are_equal() -> None:
    for density in (0.03, 0.5):
        dense = masked(400, 90, density)
        assert np.abs(svd_module.gram(sparse.csr_matrix(dense)) - dense.T @ dense).max() < 1e-11


def test_singular_values_that_occur_often_are_all_seen() -> None:
    # From one start Lanczos finds each of them once, if rounding does not help.
    dense = np.diag(np.repeat(np.arange(1.0, 11), 100))
    found = best_factors(*entries(dense), rank=30)
    assert found.method == "gram"
    assert (found.spectral_bound, found.error) == (pytest.approx(10), pytest.approx(np.sqrt(38500 - 3000)))
    asked = best_factors(*entries(dense), rank=30, method="lanczos")
    assert asked.error == pytest.approx(found.error)
    assert best_factors(*entries(np.eye(500)), rank=30).error == pytest.approx(np.sqrt(470))


def test_empty_rows_and_columns_cost_nothing() -> None:
    dense = masked(12, 9, 0.7)
    columns = 10**6
    row, column = np.nonzero(dense)
    places = (row * 1000 + 5).astype(np.int64) * columns + column * 100_000 + 7
    here = np.argsort(places)
    shape = (12_006, columns)
    small = best_factors(*entries(dense), rank=3)
    large = best_factors(shape, places[here], dense[row, column][here], rank=3)
    assert large.full_rank == 9
    assert (large.error, large.spectral_bound) == (small.error, small.spectral_bound)
    assert np.array_equal(large.up[np.arange(12) * 1000 + 5], small.up)
    assert np.count_nonzero(large.down) == np.count_nonzero(small.down)


def test_memory_is_that_of_entries_and_factors() -> None:
    random = np.random.default_rng(0)
    shape = (200_000, 100)
    places = np.sort(random.choice(shape[0] * shape[1], 100_000, replace=False))
    values = random.standard_normal(places.size)
    tracemalloc.start()
    found = best_factors(shape, places, values, rank=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.rank == 3
    assert peak < shape[0] * shape[1] * 8 / 3  # a third of the dense matrix


def test_bits_are_the_same_every_time() -> None:
    code = "from tests.shira_format.test_factors import *\nwith single_threaded_blas(): print(*fingerprints())"
    with single_threaded_blas():
        here = fingerprints()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert here == there


def fingerprints() -> list[str]:
    found = []
    for dense in (masked(500, 400, 0.02), np.diag(np.repeat([1.0, 2.0], 300)), of_rank(300, 300, 3)):
        for way in WAYS:
            factors = best_factors(*entries(dense), rank=5, method=way)
            found += [array_digest(factors.up), array_digest(factors.down)]
    return found


@given(matrices(), st.integers(1, 5))
def test_signs_follow_the_left_vectors(dense: Array, rank: int) -> None:
    up = best_factors(*entries(dense), rank=rank).up
    near = np.abs(up) >= np.abs(up).max(axis=0) * (1 - 5e-7)
    assert (up[near.argmax(axis=0), np.arange(up.shape[1])] > 0).all()


def test_powers_of_four_move_through() -> None:
    dense = masked(40, 30, 0.3)
    one, other = (best_factors(*entries(dense * scale), rank=4) for scale in (1.0, 2.0**-40))
    assert np.array_equal(one.up * np.float32(2.0**-20), other.up)
    assert one.error * 2.0**-40 == other.error


def test_what_cannot_be_meant_is_refused() -> None:
    some = entries(masked(5, 4, 1))
    wrong: list[dict[str, Any]] = [
        {},
        {"rank": 1, "energy": 0.5},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.1},
        {"energy": np.nan},
    ]
    for options in wrong:
        with pytest.raises(ValueError):
            best_factors(*some, **options)
    for values in (np.zeros(2), np.array([1, np.nan]), np.array([1, np.inf])):
        with pytest.raises(ValueError, match="all zero, or not finite"):
            best_factors((2, 2), np.array([0, 3]), values, rank=1)
    with pytest.raises(SourceError, match="overflow float32"):
        best_factors((2, 2), np.array([0, 3]), np.array([1e200, 1]), rank=1)


def test_factors_of_one_element() -> None:
    found: Factors = best_factors((1, 1), np.array([0]), np.float32([-4]), rank=7)
    assert (found.up.tolist(), found.down.tolist()) == ([[2]], [[-2]])
    assert (found.error, found.bound, found.spectral_bound, found.energy_kept) == (0, 0, 0, 1)
