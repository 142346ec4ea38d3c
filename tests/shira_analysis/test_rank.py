"""Ranks against rational arithmetic and numpy; and of real LoRAs and the adapters made of them."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_analysis.measures.certificate import Bounds, bounds_of, of_kronecker, of_product
from shira_analysis.measures.modular import PRIMES, residues
from shira_analysis.measures.rank import RankReport, rank_of, rank_of_update, ranks_of_lora
from shira_analysis.measures.spectrum import Spectrum, spectrum_of, spectrum_of_product
from shira_format._core.arrays import Array
from shira_format._core.dtypes import FLOATS
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import BaseRequired, SourceError
from shira_format.format import load
from shira_format.lora import open_lora
from shira_format.lora.products import Dense, Hadamard, Kronecker, LowRank
from shira_format.tensors import SparseTensor
from tests.models import LORAS, minilm
from tests.strategies import masks
from tests.updates import dense

DTYPES = st.sampled_from(list(FLOATS.values()))


def rational_rank(rows: list[list[Fraction]]) -> int:
    """By Gauss's elimination, without rounding."""
    rows, rank = [list(row) for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def exact(array: Array) -> list[list[Fraction]]:
    return [[Fraction(float(value)) for value in row] for row in array]


@st.composite
def small_tensors(draw: st.DrawFn) -> tuple[SparseTensor, list[list[Fraction]]]:
    """A tensor and its exact delta: few values, so that ranks are low by chance, or all of a dtype's sizes."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 9)))
    indices, dtype = draw(masks(shape)), draw(DTYPES)
    few = st.sampled_from([0, 1, -1, 2, 0.5, 3])
    # Numbers far apart: the float64 difference of two of these is rounded.
    scale = {1: 3.0, 2: 4.0}.get(dtype.itemsize, 60.0)
    wide = st.floats(-scale, scale).map(lambda x: math.copysign(2.0**x, -1) if x > 1 else 2.0**x * 1.25)
    numbers = draw(st.sampled_from([few, wide]))

    def drawn() -> Array:
        return np.array(draw(st.lists(numbers, min_size=indices.size, max_size=indices.size)), np.float64).astype(
            dtype
        )

    values = drawn()
    value_kind = draw(st.sampled_from(["target", "delta"]))
    base = drawn() if value_kind == "target" else None
    tensor = SparseTensor("w", shape, indices, values, value_kind=value_kind, dtype=dtype, base=base)
    rows = [[Fraction(0)] * shape[1] for _ in range(shape[0])]
    for k, index in enumerate(indices):
        start = Fraction(0) if base is None else Fraction(float(base[k]))
        rows[index // shape[1]][index % shape[1]] = Fraction(float(values[k])) - start
    return tensor, rows


@given(small_tensors())
def test_bounds_bracket_the_rational_rank(drawn: tuple[SparseTensor, list[list[Fraction]]]) -> None:
    tensor, rows = drawn
    rank = rational_rank(rows)
    bounds = rank_of(tensor, spectrum=False).bounds
    assert bounds is not None
    assert bounds.lower <= rank <= bounds.upper
    assert bounds.exact in (None, rank)
    # No prime here divides a minor of such small matrices, so the lower bound is the rank itself unless folding was unlucky.
    assert rank == bounds.lower
    assert (bounds.lower == bounds.upper) or bounds.primes == PRIMES


@given(small_tensors())
def test_numerical_rank_is_never_above_the_structural_one(drawn: tuple[SparseTensor, Any]) -> None:
    report = rank_of(drawn[0])
    assert report.bounds is not None
    assert report.spectrum is not None
    assert report.spectrum.numerical_rank <= report.bounds.upper <= report.full


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 30), st.integers(0, 2**32))
def test_well_conditioned_matrices_have_the_rank_that_numpy_finds(m: int, n: int, r: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    whole = random.integers(-4, 5, (m, r)) @ random.integers(-4, 5, (r, n)) * 1.0
    tensor = SparseTensor("w", (m, n), np.arange(m * n), whole.reshape(-1), value_kind="delta")
    report = rank_of(tensor)
    assert report.bounds is not None
    assert report.spectrum is not None
    singular = np.linalg.svd(whole, compute_uv=False)
    np.testing.assert_allclose(
        singular[: report.spectrum.values.size], report.spectrum.values, atol=1e-10 * max(1, singular[0])
    )
    assert np.linalg.matrix_rank(whole) == report.spectrum.numerical_rank == report.bounds.lower


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("prime", [*PRIMES, 3])
def test_residues_are_a_homomorphism(dtype: np.dtype[Any], prime: int) -> None:
    bits = np.random.default_rng(1).integers(0, 256, 400 * dtype.itemsize, np.uint8).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = bits[np.isfinite(bits)]
    for value, found in zip(values, residues(values, prime), strict=True):
        number = Fraction(float(value))
        assert number.numerator * pow(number.denominator, -1, prime) % prime == found


def test_primes_are_safe_primes() -> None:
    flint = pytest.importorskip("flint")
    for prime in PRIMES:
        assert flint.fmpz(prime).is_prime()
        assert flint.fmpz((prime - 1) // 2).is_prime()
        assert prime < 2**31
    assert len(set(PRIMES)) == len(PRIMES)


def test_the_exact_difference_is_meant_and_not_a_rounded_one() -> None:
    # 1 + 2^-60 - 2^-60 in float64 would be 1, and the two rows equal.
    base = np.float64([2.0**-60, 0, 0, 0])
    values = np.float64([1, 1, 1, 1])
    report = rank_of(SparseTensor("w", (2, 2), [0, 1, 2, 3], values, base=base))
    assert report.bounds is not None
    assert 2 == report.bounds.exact
    assert report.spectrum is not None
    assert 1 == report.spectrum.numerical_rank


def test_an_interval_where_the_proofs_do_not_meet() -> None:
    ones = SparseTensor("w", (3, 5), np.arange(15), np.ones(15, np.float32), value_kind="delta")
    bounds = rank_of(ones, spectrum=False).bounds
    assert Bounds(1, 3, PRIMES) == bounds
    assert bounds.exact is None
    assert rank_of(ones, spectrum=False, primes=1).bounds == Bounds(1, 3, PRIMES[:1])


@pytest.mark.parametrize("shape", [(40, 3000), (3000, 40)])
def test_long_matrices_are_folded(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    side = min(shape)
    left, right = random.integers(-3, 4, (shape[0], side - 5)), random.integers(-3, 4, (side - 5, shape[1]))
    whole = (left @ right).astype(np.float32)
    tensor = SparseTensor("w", shape, np.arange(whole.size), whole.reshape(-1), value_kind="delta")
    report = rank_of(tensor)
    assert report.bounds is not None
    assert (side - 5, side) == (report.bounds.lower, report.bounds.upper)
    assert report.spectrum is not None
    np.testing.assert_allclose(
        np.linalg.svd(whole.astype(np.float64), compute_uv=False),
        report.spectrum.values,
        atol=1e-9 * report.spectrum.spectral_norm,
    )
    assert side - 5 == report.spectrum.numerical_rank


def test_empty_rows_zeros_and_huge_shapes() -> None:
    empty = rank_of(SparseTensor("w", (4, 5), np.empty(0, np.int64), np.empty(0, np.float32), value_kind="delta"))
    zeros = rank_of(SparseTensor("w", (4, 5), [3, 9], np.float32([1, 2]), base=np.float32([1, 2])))
    for report in (empty, zeros):
        assert Bounds(0, 0) == report.bounds
        assert report.spectrum is not None
        assert (0, 0, 0.0, 0.0) == (
            report.spectrum.numerical_rank, report.spectrum.dtype_rank, report.spectrum.stable_rank,
            report.spectrum.effective_rank,
        )  # fmt: skip
    huge = rank_of(SparseTensor("w", (2, 2**40), [3, 2**40 + 5], np.float32([1, 2]), value_kind="delta"))
    assert huge.bounds is not None
    assert 2 == huge.bounds.exact
    assert huge.spectrum is not None
    assert [2, 1] == huge.spectrum.values.tolist()
    assert 2 == rank_of(SparseTensor("w", (), [0], np.float32([3]), value_kind="delta")).full + 1


def test_measures_of_a_known_spectrum() -> None:
    values = np.array([4.0, 2.0, 2.0, 1e-12, 0.0])
    spectrum = Spectrum((5, 100), values, float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps))
    assert 4.0 == spectrum.spectral_norm
    assert math.isclose((16 + 4 + 4) / 16, spectrum.stable_rank)
    assert math.isclose(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)), spectrum.effective_rank, rel_tol=1e-9)
    assert 4 == spectrum.numerical_rank
    assert 1 == spectrum.dtype_rank  # the tolerance is 100 * 2^-7 * 4 = 3.125
    assert Spectrum((5, 128), values, 2**-7).dtype_rank is None
    assert values.tolist() == spectrum.as_json(values=True)["singular_values"]
    tiny = Spectrum((2, 2), np.array([1e-300, 1e-300]), 2**-23)
    assert (2.0, 2.0) == (tiny.stable_rank, round(tiny.effective_rank, 12))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32), st.booleans())
def test_products_of_factors(m: int, n: int, r: int, seed: int, padded: bool) -> None:
    random = np.random.default_rng(seed)
    up, down = random.integers(-2, 3, (m, r)).astype(np.float32), random.integers(-2, 3, (r, n)).astype(np.float32)
    if padded:
        up[:, r // 2 :] = 0
    report = rank_of_update(LowRank("w", (m, n), up, down))
    rank = rational_rank(exact(up.astype(np.float64) @ down))
    assert report.bounds is not None
    assert report.bounds.lower <= rank <= report.bounds.upper
    singular = np.linalg.svd(up.astype(np.float64) @ down, compute_uv=False)
    assert report.spectrum is not None
    found = np.zeros(min(m, n))
    found[: report.spectrum.values.size] = report.spectrum.values[: min(m, n)]
    np.testing.assert_allclose(singular, found, atol=1e-12 * max(1.0, singular[0]))


def test_other_updates() -> None:
    random = np.random.default_rng(3)

    def factors(m: int, n: int) -> LowRank:
        return LowRank("w", (m, n), *(random.standard_normal(s).astype(np.float32) for s in ((m, 2), (2, n))))

    left, right = factors(3, 4), factors(5, 6)
    kron = Kronecker("w", (15, 24), dense(left), np.float32(random.integers(-3, 4, (5, 6))))
    updates: list[Any] = [
        kron,
        Hadamard(factors(7, 9), factors(7, 9)),
        Dense("w", (4, 3), np.float32(np.diag([1, 2, 3, 0]))[:, :3]),
        LowRank("w", (4, 2, 3), np.float32(np.eye(8, 2)), np.float32(np.eye(2, 3))),  # rows of 3, not of 6
    ]
    reports = [rank_of_update(update) for update in updates]
    for update, report in zip(updates, reports, strict=True):
        whole = dense(update).astype(np.float64).reshape(report.shape)
        assert report.spectrum is not None
        np.testing.assert_allclose(
            np.linalg.svd(whole, compute_uv=False), report.spectrum.values, atol=1e-12 * 100
        )
        assert np.count_nonzero(whole) == report.nnz
    bounds = [report.bounds for report in reports]
    assert bounds[0] is not None
    assert bounds[0].lower <= 15 == bounds[0].upper
    assert bounds[1] is None
    assert bounds[2] is not None
    assert 3 == bounds[2].exact
    assert bounds[3] is None
    assert right.shape == (5, 6)


def test_rules_for_products() -> None:
    assert Bounds(1, 3) == of_product(Bounds(3, 3), Bounds(2, 4), 4)
    assert Bounds(0, 2) == of_product(Bounds(1, 2), Bounds(2, 4), 4)
    assert Bounds(6, 12, (5, 7)) == of_kronecker(Bounds(3, 3, (5,)), Bounds(2, 4, (5, 7)))


def test_bad_input() -> None:
    with pytest.raises(SourceError, match="is a mask"):
        rank_of(SparseTensor("w", (3,), [0], value_kind="none"))
    with pytest.raises(BaseRequired):
        rank_of(SparseTensor("w", (3,), [0], np.float32([1]), base_digest="0" * 64))
    bad = LowRank("w", (2, 2), np.float32([[1], [np.nan]]), np.float32([[1, 2]]))
    for options in ({"exact": False}, {"spectrum": False}):
        with pytest.raises(SourceError, match=r"^tensor 'w': the update has values that are NaN or infinite$"):
            rank_of_update(bad, **options)


def test_too_large_is_said_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shira_analysis.measures.certificate.LARGEST", 2)
    monkeypatch.setattr("shira_analysis.measures.spectrum.LARGEST", 2)
    report = rank_of(SparseTensor("w", (3, 3), [0, 4, 8], np.float32([1, 1, 1]), value_kind="delta"))
    assert (Bounds(0, 3), None) == (report.bounds, report.spectrum)
    assert {
        "full_rank": 3,
        "nonzero": 3,
        "exact_rank": None,
        "rank_at_least": 0,
        "rank_at_most": 3,
        "primes": [],
    } == report.as_json()


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flint", None)
    with pytest.raises(SourceError, match=r"python-flint: pip install 'shira-format\[analysis\]'"):
        rank_of(SparseTensor("w", (3,), [0], np.float32([1]), value_kind="delta"), spectrum=False)


@pytest.mark.parametrize("task", ["spam", "genre"])
def test_real_loras_have_rank_8_and_the_adapters_made_of_them_far_more(task: str, tmp_path: Path) -> None:
    lora_to_shira(LORAS / task, minilm(), tmp_path / "a.st", density=0.01, self_contained=True)
    adapter = load(tmp_path / "a.st")
    reports: dict[str, RankReport] = {
        report.name: report for report in ranks_of_lora(open_lora(LORAS / task, open_checkpoint(minilm())))
    }
    assert adapter.keys() == reports.keys()
    assert 36 == len(reports)
    for name, lora in reports.items():
        assert lora.bounds is not None
        assert lora.spectrum is not None
        assert (8, 8) == (lora.bounds.exact, lora.spectrum.numerical_rank)
        shira = rank_of(adapter[name])
        assert shira.bounds is not None
        assert shira.spectrum is not None
        assert shira.bounds.exact is not None
        assert 4 * 8 < shira.bounds.exact == shira.spectrum.numerical_rank < 384
        assert shira.spectrum.effective_rank > lora.spectrum.effective_rank


def test_spectra_of_factors_and_matrices_agree() -> None:
    from scipy.sparse import csr_array

    random = np.random.default_rng(4)
    up, down = random.standard_normal((30, 4)), random.standard_normal((4, 50))
    whole = spectrum_of(csr_array(up @ down), 1e-7)
    assert whole is not None
    np.testing.assert_allclose(whole.values[:4], spectrum_of_product(up, down, 1e-7).values, rtol=1e-12)
    bounds = bounds_of(csr_array(np.eye(5)), lambda prime: np.ones(5, np.int64))
    assert (5, PRIMES[:1]) == (bounds.exact, bounds.primes)
