"""AWOM and AWOR against dense products, their laws, and chance."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from shira_analysis.measures import orthogonality as module
from shira_analysis.measures.orthogonality import Orthogonality, awom, awor, orthogonality
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor

# Integers, so that sums are exact in any order and terms do cancel.
CELLS = st.sampled_from([0, 0, 0, 0, 1, -1, 2, -3])


@st.composite
def matrix_pairs(draw: st.DrawFn, most: int = 7) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(0, most), st.integers(0, most)))
    return draw(arrays(np.float64, shape, elements=CELLS)), draw(arrays(np.float64, shape, elements=CELLS))


PAIRS = matrix_pairs()


def csr(dense: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array(dense)


@pytest.fixture(params=["numba", "scipy"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each law holds in both ways to compute a product."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "scipy":
            patch.setitem(sys.modules, "shira_analysis.measures.product_kernels", None)
            patch.setattr(module, "_TERMS", 3)  # so that small matrices are several pieces
        yield request.param


@given(pair=PAIRS, transposed=st.booleans())
def test_against_the_dense_product(pair: tuple, transposed: bool) -> None:
    a, b = (side.T if transposed else side for side in pair)
    product, reached = a.T @ b, np.abs(a).T @ np.abs(b) > 0
    found = orthogonality(*map(csr, pair), transposed=transposed, spectral=True)
    assert (found.cells, found.nonzero, found.reached) == (product.size, np.count_nonzero(product), reached.sum())
    assert found.energy == np.sum(product**2)
    assert found.awom == pytest.approx(awom(*map(csr, pair), transposed=transposed))
    zeros = 1 - np.count_nonzero(product) / product.size if product.size else 1
    assert awor(*map(csr, pair), transposed=transposed) == zeros
    structural = 1 - reached.sum() / product.size if product.size else 1
    assert awor(*map(csr, pair), transposed=transposed, structural=True) == structural
    largest = np.linalg.norm(product, 2) if product.size else 0
    assert found.spectral == pytest.approx(largest, rel=1e-6)
    assert awom(*map(csr, pair), "spectral", transposed=transposed) == pytest.approx(largest, rel=1e-6)


@given(pair=PAIRS)
def test_symmetric(pair: tuple) -> None:
    a, b = map(csr, pair)
    one, other = orthogonality(a, b), orthogonality(b, a)
    assert (one.energy, one.nonzero, one.reached) == (other.energy, other.nonzero, other.reached)
    assert one.reached_if_independent == pytest.approx(other.reached_if_independent)


@given(pair=PAIRS, scale=st.sampled_from([-4.0, 0.5, 2.0**-40]))
def test_bounds_and_scale(pair: tuple, scale: float) -> None:
    a, b = map(csr, pair)
    found = orthogonality(a, b, spectral=True)
    assert 0 <= found.nonzero <= found.reached <= found.cells
    assert found.spectral is not None
    assert found.spectral <= found.awom * (1 + 1e-6)
    if a.nnz and b.nnz:
        most = np.linalg.norm(pair[0], 2) * np.linalg.norm(pair[1])
        assert found.awom <= most * (1 + 1e-9)
    scaled = orthogonality(scale * a, b, spectral=True)
    assert scaled.nonzero == found.nonzero
    assert (scaled.awom, scaled.spectral) == pytest.approx(
        (abs(scale) * found.awom, abs(scale) * found.spectral), rel=1e-6
    )


@given(pair=PAIRS, rows=st.data())
def test_disjoint_rows_are_orthogonal(pair: tuple, rows: st.DataObject) -> None:
    mine = rows.draw(arrays(bool, pair[0].shape[:1]))
    a, b = csr(pair[0] * mine[:, None]), csr(pair[1] * ~mine[:, None])
    assert (awom(a, b), awom(a, b, "spectral"), awor(a, b), awor(a, b, structural=True)) == (0, 0, 1, 1)
    assert (awom(a.T, b.T, transposed=True), awor(a.T, b.T, transposed=True)) == (0, 1)


def test_cancelled_cells_are_numerical_zeros_only() -> None:
    a, b = csr(np.array([[1.0], [1.0]])), csr(np.array([[1.0], [-1.0]]))
    assert (awom(a, b), awor(a, b), awor(a, b, structural=True)) == (0, 1, 0)


def test_explicit_zeros_are_entries_of_a_matrix() -> None:
    a = sparse.csr_array((np.array([0.0]), np.array([0]), np.array([0, 1])), shape=(1, 1))
    assert (awor(a, a), awor(a, a, structural=True)) == (1, 0)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (5, 60), (60, 5)])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_spectral_norms_of_low_rank(shape: tuple, rank: int) -> None:
    random = np.random.default_rng(rank)
    rows, columns = shape
    a, b = (
        random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns)) * 1e-9 for _ in range(2)
    )
    for transposed, product in ((False, a.T @ b), (True, a @ b.T)):
        found = awom(csr(a), csr(b), "spectral", transposed=transposed)
        assert found == pytest.approx(np.linalg.norm(product, 2), rel=1e-6, abs=0)


def test_the_two_ways_agree_on_floats() -> None:
    random = np.random.default_rng(0)
    a, b = (sparse.random_array((120, 150), density=0.05, format="csr", rng=random) for _ in range(2))
    product = (a.T @ b).toarray()
    found = orthogonality(a, b, spectral=True)
    assert (found.awom, found.spectral) == pytest.approx((np.linalg.norm(product), np.linalg.norm(product, 2)))
    assert found.nonzero == np.count_nonzero(product)


def test_the_energy_by_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    a, b = (sparse.random_array((3, 90), density=0.7, format="csr", rng=random) for _ in range(2))
    energy, _ = module._energy_by_grams(a, b)
    assert energy == pytest.approx(np.sum((a.T @ b).toarray() ** 2))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the product itself was formed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_measure", never)
        assert awom(a, b) == pytest.approx(np.sqrt(energy))


def test_gram_matrices_do_not_hide_a_small_product() -> None:
    """Two dense rows whose terms cancel but for a part in 10^12: the sum over Gram matrices would be noise."""
    a = np.ones((2, 90))
    b = np.stack([np.ones(90), -np.ones(90) * (1 + 1e-12)])
    assert awom(csr(a), csr(b)) == pytest.approx(np.linalg.norm(a.T @ b), rel=1e-12)


def random_pair(shape: tuple, density: float, seed: int) -> list:
    random = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    pair = []
    for _ in range(2):
        indices = np.sort(random.choice(size, round(density * size), replace=False))
        pair.append(SparseTensor("w", shape, indices, random.standard_normal(indices.size), value_kind="delta"))
    return pair


def test_chance_over_seeds() -> None:
    shape = (80, 50)
    found = [orthogonality(*random_pair(shape, 0.1, seed)) for seed in range(60)]
    error = np.std([one.reached for one in found]) / np.sqrt(60)
    for expected in ("reached_if_uniform", "reached_if_independent"):
        apart = np.mean([one.reached - getattr(one, expected) for one in found])
        # Of a fixed number of entries, uniform masks are a little more even than independent entries are.
        assert abs(apart) < 5 * error + 0.002 * np.mean([one.reached for one in found])
    ratios = np.array([one.energy / one.energy_if_independent for one in found])
    assert abs(ratios.mean() - 1) < 5 * ratios.std() / np.sqrt(60)


def test_chance_knows_the_rows() -> None:
    """Masks in a few rows: only these can meet, which densities alone do not tell."""
    a = np.zeros((40, 30))
    a[:2] = 1
    b = np.zeros((40, 30))
    b[2:4] = 1
    found = orthogonality(csr(a), csr(b))
    assert (found.awor, found.awor_if_independent, found.energy_if_independent) == (1, 1, 0)
    assert found.awor_if_uniform == pytest.approx((1 - 0.05**2) ** 40)
    full = orthogonality(csr(a), csr(a))
    assert (full.awor, full.awor_if_independent) == pytest.approx((0, 0))


def test_the_figures_of_the_paper() -> None:
    """0.664 at 1 % and 4096, and the axes of its figures, which are those of the Frobenius norm."""
    found = orthogonality(*random_pair((512, 512), 0.01, 0))
    assert found.awor_if_uniform == pytest.approx((1 - found_density(512) ** 2) ** 512)
    assert (1 - 0.01**2) ** 4096 == pytest.approx(0.664, abs=5e-4)
    random = np.random.default_rng(0)
    a, b = (csr(random.standard_normal((128, 128))) for _ in range(2))
    assert awom(a, b) == pytest.approx(128**1.5, rel=0.02)
    # Each factor has 2 sqrt(m); their largest directions do not meet, and of the product's 4 m is left sqrt(27 / 4) m.
    assert awom(a, b, "spectral") == pytest.approx((27 / 4) ** 0.5 * 128, rel=0.05)


def found_density(m: int) -> float:
    return round(0.01 * m * m) / (m * m)


def test_blocks_add_up() -> None:
    parts = [orthogonality(*random_pair((30, 20), 0.2, seed), spectral=True) for seed in (1, 2)]
    matrices = [[module.delta_matrix(t) for t in random_pair((30, 20), 0.2, seed)] for seed in (1, 2)]
    product = sparse.block_diag([a.T @ b for a, b in matrices]).toarray()
    whole = sum(parts, Orthogonality())
    assert (whole.awom, whole.spectral) == pytest.approx((np.linalg.norm(product), np.linalg.norm(product, 2)))
    assert (whole.nonzero, whole.cells) == (np.count_nonzero(product), 2 * 20 * 20)


def test_refusals() -> None:
    a, b = csr(np.ones((2, 3))), csr(np.ones((3, 2)))
    with pytest.raises(SourceError, match=r"\[2, 3\] and \[3, 2\]"):
        awom(a, b)
    with pytest.raises(SourceError, match="nuclear"):
        awom(a, a, "nuclear")  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="mask"):
        awor(*[SparseTensor("w", (2, 3), [1], value_kind="none")] * 2)
    with pytest.raises(SourceError, match="too large"):
        orthogonality(1e200 * a, a)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_far_wider_than_they_have_entries(transposed: bool) -> None:
    """What is allocated follows the entries, not the width that a file claims; the zeros are those of the whole."""
    width, near = 2**44, [0, 3, 5, 7]
    places = np.array([0, 3 * 2**20, 5 * 2**30, 2**44 - 1])
    wide, narrow = [], []
    for seed in (1, 2):
        random = np.random.default_rng(seed)
        values = random.standard_normal((2, 4)) * (random.random((2, 4)) < 0.7)
        rows, columns = np.nonzero(values)
        for found, size, at in ((wide, width, places), (narrow, 8, np.array(near))):
            indices = rows * size + at[columns]
            found.append(SparseTensor("w", (2, size), indices, values[rows, columns], value_kind="delta"))
    found, expected = (orthogonality(*pair, transposed=transposed, spectral=True) for pair in (wide, narrow))
    assert (expected.nonzero, expected.reached) == (found.nonzero, found.reached)
    assert found.cells == (4 if transposed else width**2)
    assert found.energy == pytest.approx(expected.energy, rel=1e-12)
    assert found.spectral == pytest.approx(expected.spectral, rel=1e-5)
    assert awor(*wide, transposed=transposed) == pytest.approx(1 - expected.nonzero / found.cells)
    assert awom(*wide, transposed=transposed) == pytest.approx(expected.awom, rel=1e-12)


def test_the_package_itself_has_them() -> None:
    import shira_analysis

    assert (awom, awor) == (shira_analysis.awom, shira_analysis.awor)
    assert all(callable(getattr(shira_analysis, name)) for name in shira_analysis.__all__)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        shira_analysis.other  # noqa: B018
