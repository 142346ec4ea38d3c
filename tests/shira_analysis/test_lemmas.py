"""The lemmas' laws, as properties of generated adapters; the counterexamples, recomputed; the ranks, against numpy and fractions."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from shira_analysis import lemmas
from shira_analysis.lemmas import complexity, exact, low_rank, null_space, orthogonality, scale
from shira_analysis.lemmas.report import Check, LemmaReport, as_json
from shira_analysis.lemmas.samples import KINDS, Setting, integers, mask
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.export.lora import best_factors
from shira_format.format import save
from shira_format.tensors import SparseTensor

seeds = st.integers(0, 2**32 - 1)
small = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def adapters(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, int]] = small) -> Any:
    """Integers under a mask of any kind, or anywhere; never all 0."""
    random = np.random.default_rng(draw(seeds))
    shape = draw(shapes)
    kind = draw(st.sampled_from([*KINDS, "anywhere"]))
    if kind == "anywhere":
        made = random.random(shape) < draw(st.floats(0, 1))
        made.flat[0] = True
    else:
        made = mask(kind, shape, draw(st.sampled_from([0.02, 0.2, 0.5])), random)
        made.flat[random.integers(made.size)] = True
    return np.where(made, integers(shape, random), 0)


@st.composite
def pairs(draw: st.DrawFn) -> Any:
    shape = st.just(draw(small))
    return draw(adapters(shape)), draw(adapters(shape))


def fraction_rank(matrix: Any) -> int:
    a = [[Fraction(int(v)) for v in row] for row in matrix]
    found = 0
    for column in range(len(a[0])):
        pivot = next((r for r in range(found, len(a)) if a[r][column]), None)
        if pivot is None:
            continue
        a[found], a[pivot] = a[pivot], a[found]
        for r in range(found + 1, len(a)):
            factor = a[r][column] / a[found][column]
            a[r] = [x - factor * y for x, y in zip(a[r], a[found], strict=True)]
        found += 1
        if found == len(a):
            break
    return found


# --- ranks ---


@given(adapters(), adapters(), st.integers(0, 3))
def test_rank(a: Any, b: Any, drop: int) -> None:
    for matrix in (a, a.T @ a, np.concatenate([a, 3 * a - a[::-1]]), a[:, drop:] if a.shape[1] > drop else a):
        assert fraction_rank(matrix) == exact.rank(matrix)
        assert exact.rank_modulo(matrix) <= exact.rank(matrix)


def test_rank_where_the_prime_divides() -> None:
    assert 1 == exact.rank_modulo(np.diag([exact.PRIME, 1]))
    assert 2 == exact.rank(np.diag([exact.PRIME, 1]))
    assert 0 == exact.rank(np.zeros((3, 2), int)) == exact.rank(np.zeros((0, 2), int))


# --- 4.1 ---


@settings(max_examples=40)
@given(adapters(), st.integers(1, 6), st.integers(1, 3), st.booleans(), seeds)
def test_steps_span_what_the_inputs_allow(a: Any, examples: int, batch: int, ties: bool, seed: int) -> None:
    made, random = a != 0, np.random.default_rng(seed)
    x = random.integers(-1, 2, (a.shape[1], examples)) if ties else integers((a.shape[1], examples), random, 999)
    # The rank of the Jacobian of the outputs by the trained entries, formed as a whole.
    jacobian = np.kron(np.eye(a.shape[0], dtype=np.int64), x.T)[:, made.reshape(-1)]
    free = complexity.freedom(made, x)
    assert exact.rank(jacobian) == free <= made.sum()
    assert free == complexity.steps_span(made, x, random, batch)
    if not ties:
        assert free == np.minimum(made.sum(axis=1), examples).sum()


@settings(max_examples=30)
@given(adapters(), seeds)
def test_a_teacher_without_noise_leaves_a_subspace(a: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    found, image = complexity.teacher_span(a != 0, integers(a.shape, random), random)
    assert found == image <= np.count_nonzero(a)


def test_adam_is_torchs() -> None:
    random = np.random.default_rng(3)
    made, x = random.random((4, 5)) < 0.5, integers((5, 7), random)
    ours = complexity.adam_steps(made, x, np.random.default_rng(4), 5)
    again = np.random.default_rng(4)
    weight = torch.nn.Parameter(torch.from_numpy(again.standard_normal(made.shape)))
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    for step in ours:
        inputs = torch.from_numpy(x[:, again.permutation(7)[:4]].astype(float))
        before = weight.detach().clone()
        loss = ((weight @ inputs - torch.from_numpy(again.standard_normal((4, 4)))) ** 2).sum() / 2
        loss.backward()
        assert weight.grad is not None
        weight.grad *= torch.from_numpy(made)
        optimizer.step()
        optimizer.zero_grad()
        moved = (weight.detach() - before).numpy()
        np.testing.assert_allclose(step, moved[made], rtol=1e-9, atol=1e-15)
        assert not moved[~made].any()


# --- 4.2 ---


@settings(max_examples=50)
@given(adapters(), st.integers(1, 4), seeds)
def test_eckart_young(a: Any, rank: int, seed: int) -> None:
    flat = np.flatnonzero(a)
    found = best_factors(a.shape, flat, a.reshape(-1)[flat].astype(float), rank=rank)
    sigma = np.linalg.svd(a, compute_uv=False)
    rest = a - found.up.astype(float) @ found.down.astype(float)
    allowed = low_rank.rounding(sigma, rank, max(a.shape))
    following = sigma[rank] if rank < sigma.size else 0
    assert abs(np.linalg.norm(rest, 2) - following) <= allowed
    assert abs(np.linalg.norm(rest) - np.linalg.norm(sigma[rank:])) <= allowed
    assert (np.linalg.norm(rest, 2) <= 2 * allowed) == (exact.rank(a) <= rank)
    random = np.random.default_rng(seed)
    fits = low_rank.other_fits(a.astype(float), rank, random) if rank < min(a.shape) else []
    other = random.standard_normal((a.shape[0], rank)) @ random.standard_normal((rank, a.shape[1]))
    for _, fit in [*fits, ("random", other)]:
        assert np.linalg.matrix_rank(fit) <= rank
        assert np.linalg.norm(a - fit, 2) >= following - 1e-12 * sigma[0]
        assert np.linalg.norm(a - fit) >= np.linalg.norm(sigma[rank:]) - 1e-12 * sigma[0]


# --- 4.3 ---


@given(pairs(), seeds)
def test_first_steps(two: Any, seed: int) -> None:
    small, other = (a != 0 for a in two)
    larger, random = small | other, np.random.default_rng(seed)
    x, error = integers((small.shape[1],), random), integers((small.shape[0],), random)
    gradient = np.outer(error, x).astype(float)
    for one, more in zip(scale.first_steps(small, gradient), scale.first_steps(larger, gradient), strict=True):
        assert np.array_equal(one[small], more[small])
        assert not one[~small].any()
    step, _ = scale.first_steps(small, gradient)
    assert np.array_equal(step @ x, -error * (small * x**2).sum(axis=1))
    inputs = random.standard_normal((small.shape[1], 3))
    assert scale.stable_step(larger, inputs) <= scale.stable_step(small, inputs) * (1 + 1e-12)


@given(adapters(), seeds)
def test_the_stable_step_is_one(a: Any, seed: int) -> None:
    """At a little less, gradient descent on noiseless targets shrinks the largest error mode; at a little more it grows."""
    made, random = a != 0, np.random.default_rng(seed)
    inputs = random.standard_normal((a.shape[1], 4))
    limit = scale.stable_step(made, inputs)
    row = max((r for r in made if r.any()), key=lambda r: float(np.linalg.norm(inputs[r], 2)))
    top = np.linalg.svd(inputs[row], full_matrices=False)[2][0]  # errors over the examples
    for factor, grows in ((0.99, False), (1.01, True)):
        after = top - factor * limit * inputs[row].T @ (inputs[row] @ top)
        assert (np.linalg.norm(after) > np.linalg.norm(top)) == grows


# --- 4.4 ---


@given(pairs(), seeds)
def test_interaction(two: Any, seed: int) -> None:
    s1, s2 = two
    random = np.random.default_rng(seed)
    x, other = random.integers(-9, 10, (2, s1.shape[1], 8))
    w = integers(s1.shape, random)
    a, b, z = s1 @ x, s2 @ x, w @ x
    assert (np.abs(null_space.interaction(null_space.relu, z, a, b)) <= np.minimum(np.abs(a), np.abs(b))).all()
    assert null_space.interaction(np.square, z, a, b).sum() == 2 * (x * (s1.T @ s2 @ x)).sum()
    for f, most in null_space.SMOOTH.values():
        found = np.abs(null_space.interaction(f, z / 8, a / 8, b / 8))
        assert (found <= most * np.abs(a * b) / 64 + 1e-12 * (1 + np.abs(z) + np.abs(a) + np.abs(b))).all()
    mine = random.random(s1.shape[0]) < 0.5
    a, b = (s1 * mine[:, None]) @ x, (s2 * ~mine[:, None]) @ x
    for f in (null_space.relu, np.square, *(f for f, _ in null_space.SMOOTH.values())):
        assert not null_space.interaction(f, z / 8, a / 8, b / 8).any()
    t1, t2 = null_space.orthogonal_pair(s1.shape, random)
    assert not (t1.T @ t2).any()
    assert not ((t1 @ x).T @ (t2 @ other)).any()
    if s1.shape[0] > 1:
        assert (t1.any(axis=1) & t2.any(axis=1)).any()  # rows are shared, so it is no case of the one above


def test_bounds_of_second_derivatives_are_met() -> None:
    z = np.linspace(-6, 6, 2401)
    h = 1e-3
    for f, most in null_space.SMOOTH.values():
        largest = np.abs(f(z + h) - 2 * f(z) + f(z - h)).max() / h**2
        assert most * 0.999 < largest < most * 1.001
    x = torch.from_numpy(z)
    np.testing.assert_allclose(null_space.silu(z), torch.nn.functional.silu(x).numpy(), atol=1e-14)
    np.testing.assert_allclose(null_space.softplus(z), torch.nn.functional.softplus(x).numpy(), atol=1e-8)


# --- 4.5 ---


@given(pairs(), seeds)
def test_products(two: Any, seed: int) -> None:
    made = [a != 0 for a in two]
    found = orthogonality.product_nnz(*(orthogonality.pattern(m) for m in made))
    assert np.count_nonzero(made[0].T.astype(int) @ made[1].astype(int)) == found
    assert np.count_nonzero(two[0].T @ two[1]) <= found <= (made[0].sum(axis=1) * made[1].sum(axis=1)).sum()
    random = np.random.default_rng(seed)
    mine = random.random(made[0].shape[0]) < 0.5
    eye = orthogonality.diagonal(made[0].shape, int(random.integers(-2, 3)))
    rest = [made[0] & mine[:, None] & ~eye, made[1] & ~mine[:, None] & ~eye]
    product = orthogonality.product_nnz(*(orthogonality.pattern(eye | s) for s in rest))
    assert product <= eye.sum() + rest[0].sum() + rest[1].sum()


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 29), st.integers(0, 29))
def test_struct_is_counted(side: int, step: int, one: int, two: int) -> None:
    eye = orthogonality.diagonal((side, side))
    picked = [np.arange(offset % min(step, side), side, step) for offset in (one, two)]
    k1, k2 = (p.size for p in picked)
    for kind in ("rows", "columns"):
        made = [orthogonality.lines((side, side), kind, p) | eye for p in picked]
        found = np.count_nonzero(made[0].T.astype(int) @ made[1].astype(int))
        bound = side + (k1 + k2) * (side - 1)
        common = np.intersect1d(*picked).size
        if kind == "columns":
            assert found == k1 * side + k2 * (side - k1) + side - (k1 + k2 - common) <= bound
        elif common:
            assert found == side**2
        else:
            assert found == bound - k1 * k2


def test_products_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    made = [random.random((40, 30)) < 0.2 for _ in range(2)]
    whole = orthogonality.product_nnz(*(orthogonality.pattern(m) for m in made))
    for piece in (1, 7, 100):
        monkeypatch.setattr(orthogonality, "_PIECE", piece)
        assert whole == orthogonality.product_nnz(*(orthogonality.pattern(m) for m in made))
    assert 0 == orthogonality.product_nnz(sparse.csr_matrix((3, 4)), sparse.csr_matrix((3, 4)))


# --- reports ---


@pytest.fixture(scope="module")
def quick() -> lemmas.Verification:
    return lemmas.verify_lemmas(quick=True)


def matrices(report: LemmaReport, text: str) -> dict[str, Any]:
    (reading,) = (r for r in report.readings if r.text.startswith(text) and r.verdict == "fails")
    assert reading.counterexample is not None
    return {
        name: np.array([[int(v) for v in row] for row in m]) for name, m in reading.counterexample.matrices.items()
    }


def test_everything_holds_and_is_repeated(quick: lemmas.Verification) -> None:
    assert quick.ok
    assert ["4.1", "4.2", "4.3", "4.4", "4.5"] == [lemma.number for lemma in quick.lemmas]
    assert all(check.ok and check.cases for lemma in quick.lemmas for check in lemma.checks)
    assert all(lemma.counterexample for lemma in quick.lemmas)
    assert as_json(quick) == as_json(lemmas.verify_lemmas(quick=True))
    other = lemmas.verify_lemmas(quick=True, seed=1)
    assert other.ok
    assert as_json(quick) != as_json(other)
    assert [r for lemma in quick.lemmas for r in lemma.readings] == [
        r for lemma in other.lemmas for r in lemma.readings
    ]


def test_one_lemma_alone_sees_the_same_numbers(quick: lemmas.Verification) -> None:
    (alone,) = lemmas.verify_lemmas(quick=True, lemmas=["4.4"]).lemmas
    assert quick.lemmas[3] == alone


def test_counterexamples_by_hand(quick: lemmas.Verification) -> None:
    one, two, _, four, five = quick.lemmas
    found = matrices(one, "training has nnz")
    assert found["M"].sum() == 2 > np.linalg.matrix_rank(found["X"]) == 1
    found = matrices(one, "the steps from one W")
    steps = [np.outer(x, x)[found["M"] == 1] for x in np.random.default_rng(0).integers(-5, 6, (9, 2))]
    assert found["M"].sum() == 2 > np.linalg.matrix_rank(steps) == 1
    sigma = np.linalg.svd(matrices(two, "||S - BA||_2 <=")["S"], compute_uv=False)
    assert 0 < sigma[1] ** 2 < sigma[1] < 1
    found = matrices(two, "||S - BA||_F^2")
    assert ((found["S"] - found["BA"]) ** 2).sum() == 2 > 1
    found = matrices(four, "after a non-linearity")
    w, s1, s2 = found["W"], found["S1"], found["S2"]
    assert not (s1.T @ s2).any()
    assert null_space.interaction(null_space.relu, w, s1, s2).any()
    found = matrices(four, "S1^T S2 = 0 also")
    assert not (found["S1"].T @ found["S2"]).any()
    assert (found["S2"] @ found["S1"]).any()
    found = matrices(five, "1 - AWOR <= density(I) + density(S1)")
    assert not (found["S1"] & found["S2"]).any()
    assert np.count_nonzero(found["A1^T A2"]) > 3 + found["S1"].sum() + found["S2"].sum()
    found = matrices(five, "AWOR <= density(S1)")
    assert 9 - np.count_nonzero(found["A1^T A2"]) > found["S1"].sum() + found["S2"].sum()
    found = matrices(five, "whole columns at any offsets")
    assert np.count_nonzero(found["A1"].T @ found["A2"]) == 4 > 3


def test_what_does_not_hold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, broken, number in (
        (complexity, "freedom", lambda made, _: int(made.sum()), "4.1"),
        (low_rank, "rounding", lambda *_: 1e-30, "4.2"),
        (scale, "first_steps", lambda made, g: (g * made / made.sum(), g * made / made.sum()), "4.3"),
        (null_space, "interaction", lambda f, z, a, b: 2 * (f(z + a + b) - f(z + a) - f(z + b) + f(z)), "4.4"),
        (orthogonality, "product_nnz", lambda a, b: a.nnz * b.nnz, "4.5"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            if number == "4.1":  # no smallest counterexample is found by it
                patch.setattr(complexity, "_repeated", complexity._symmetric)
            (report,) = lemmas.verify_lemmas(quick=True, lemmas=[number]).lemmas
        assert not report.ok
        assert any(check.broken and check.margin < 0 and check.where for check in report.checks)


def test_checks() -> None:
    check = Check("a <= b", "<=", exact=True)
    assert not check.ok  # nothing was tried
    check.add(3, 5, "first")
    check.add(4, 5, "second")
    assert (True, 2, 1.0, "second") == (check.ok, check.cases, check.margin, check.where)
    check.add(6, 5, "third")
    assert (False, 1, -1.0, "third") == (check.ok, check.broken, check.margin, check.where)
    rounded = Check("a = b", "=", exact=False)
    rounded.add(1.0, 1.25, "near", allowed=0.5)
    assert (True, 0.5) == (rounded.ok, rounded.margin)
    rounded.add(float("nan"), 1.0, "nan", allowed=0.5)
    assert (False, "nan") == (rounded.ok, rounded.where)
    with pytest.raises(ValueError, match="an allowance of 0"):
        rounded.add(1, 1, "exact")
    with pytest.raises(ValueError, match=r"an allowance of 0\.5"):
        check.add(1, 1, "rounded", allowed=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 60)])
def test_masks(kind: str, shape: tuple[int, int]) -> None:
    made = mask(kind, shape, 0.1, np.random.default_rng(0))
    assert (bool, shape) == (made.dtype, made.shape)
    assert made.any()
    if shape == (40, 60):
        assert 0.05 < made.mean() < 0.2


# --- files ---


def adapter(path: Path, seed: int, **more: Any) -> Path:
    """Two matrices, a convolution and a vector; base values with them unless ``more`` says otherwise."""
    random = np.random.default_rng(seed)
    tensors = []
    for name, shape in (
        ("a.weight", (40, 30)),
        ("b.weight", (64, 64)),
        ("c.weight", (8, 3, 3, 3)),
        ("n.bias", (9,)),
    ):
        size = int(np.prod(shape))
        places = np.sort(random.choice(size, size // 3, replace=False))
        options = {"base": random.standard_normal(places.size).astype(np.float32), **more}
        values = random.standard_normal(places.size).astype(np.float32) / 16
        tensors.append(SparseTensor(name, shape, places, values, **options))
    save(Adapter(tensors), path)
    return path


def test_files(tmp_path: Path, quick: lemmas.Verification) -> None:
    paths = [adapter(tmp_path / f"{n}.st", n) for n in range(2)]
    found = lemmas.verify_lemmas(paths, quick=True)
    assert found.ok
    assert [str(path) for path in paths] == found.files
    for lemma, bare in zip(found.lemmas, quick.lemmas, strict=True):
        assert lemma.of_files
        assert lemma.cases > bare.cases
        assert any(check.law.startswith("files:") for check in lemma.checks)
    assert [f"{path}: 1 of its tensors is not a matrix" for path in paths] == found.lemmas[0].notes
    # A single file is put beside itself; all rows are common then.
    alone = lemmas.verify_lemmas(paths[:1], quick=True, lemmas=["4.5"]).lemmas[0]
    assert "a.weight with 0.st" in alone.of_files[0][0]


def test_files_that_share_nothing_and_masks(tmp_path: Path) -> None:
    first = adapter(tmp_path / "first.st", 0)
    second = tmp_path / "second.st"
    save(Adapter([SparseTensor("x", (20, 20), np.arange(0, 400, 7), value_kind="none")]), second)
    found = lemmas.verify_lemmas([first, second], quick=True)
    assert found.ok
    assert ["first.st and second.st have no weight of the same name and shape in common"] == found.lemmas[4].notes
    assert ["second.st: x: no non-zero values"] == found.lemmas[1].notes
    vector = tmp_path / "vector.st"
    save(Adapter([SparseTensor("n", (3,), [1], np.float32([1]), value_kind="delta")]), vector)
    with pytest.raises(SourceError, match="no matrix in it has entries"):
        lemmas.verify_lemmas([vector], quick=True)
    # Beside others it is left out, with a word.
    beside = lemmas.verify_lemmas([vector, first], quick=True, lemmas=["4.2"])
    assert beside.ok
    left_out = f"{vector}: no matrix in it has entries and can be checked: it is skipped"
    assert left_out in beside.lemmas[0].notes
    assert beside.lemmas[0].of_files


def test_interference_is_measured_after_one_layer_and_after_two() -> None:
    (found,) = lemmas.verify_lemmas(quick=True, lemmas=["4.4"]).lemmas
    measured = dict(found.measured)
    struct = "Struct rows, different offsets, no diagonal"
    assert "ReLU 0, SiLU 0, tanh 0" == measured[f"|I| / smaller effect: {struct}"]
    after = measured[f"the same after a second layer and its non-linearity: {struct}"]
    assert all(0.01 < float(part.split()[1]) < 2 for part in after.split(", "))
    assert len(measured) == 8


def test_weights_with_a_side_beyond_memory_are_left_out(tmp_path: Path) -> None:
    """Laws are tried on vectors as long as a side, which a small file may claim to be anything."""
    large = SparseTensor("large", (4, 1 << 40), [1, 1 << 41], np.float32([1, 2]), value_kind="delta")
    small = SparseTensor("small", (4, 4), [1, 5], np.float32([1, 2]), value_kind="delta")
    save(Adapter([large, small]), tmp_path / "both.st")
    save(Adapter([large]), tmp_path / "large.st")
    found = lemmas.verify_lemmas([tmp_path / "both.st"], quick=True, lemmas=["4.3"])
    assert found.ok
    assert [f"{tmp_path / 'both.st'}: 1 of its tensors has a side above 1048576: 'large'"] == found.lemmas[0].notes
    with pytest.raises(SourceError, match="all have a side above 1048576: there is nothing to check"):
        lemmas.verify_lemmas([tmp_path / "large.st"], quick=True)


def test_files_that_need_a_base(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from shira_format._core.arrays import array_digest

    values = np.float32([3, 4])
    needs = SparseTensor("w", (4, 5), [2, 9], values, base_digest=array_digest(np.zeros(2, np.float32)))
    path, base = tmp_path / "a.st", tmp_path / "base.safetensors"
    save(Adapter([needs]), path)
    with pytest.raises(BaseRequired, match=r"a\.st: tensor 'w' holds target values .* pass the base"):
        lemmas.verify_lemmas([path], quick=True)
    save_file({"w": np.zeros((4, 5), np.float32)}, base)
    assert lemmas.verify_lemmas([path], base=base, quick=True).ok
    save_file({"w": np.ones((4, 5), np.float32)}, base)
    with pytest.raises(BaseMismatch, match=r"a\.st: tensor 'w'"):
        lemmas.verify_lemmas([path], base=base, quick=True)
    save_file({"v": np.ones((4, 5), np.float32)}, base)
    with pytest.raises(BaseMismatch, match=r"a\.st: tensor 'w': the base .* has no 'w'"):
        lemmas.verify_lemmas([path], base=base, quick=True)
    wild = SparseTensor("w", (4, 5), [2, 9], np.float32([3, np.inf]), value_kind="delta")
    save(Adapter([wild]), path)
    with pytest.raises(SourceError, match=r"a\.st: tensor 'w': .* flat index 9"):
        lemmas.verify_lemmas([path], quick=True)


def test_products_that_are_too_large_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonality, "_MOST_PRODUCTS", 10)
    found = lemmas.verify_lemmas([adapter(tmp_path / "a.st", 0)], quick=True, lemmas=["4.5"]).lemmas[0]
    assert found.ok
    assert not found.of_files
    _, *notes = found.notes  # the first is about the vector
    assert notes
    assert all(note.endswith("the limit is 10") for note in notes)


def test_no_heavy_import() -> None:
    code = "import sys, shira_analysis.lemmas; sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'transformers')))"
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_the_default_seed() -> None:
    assert Setting().seed == 0
