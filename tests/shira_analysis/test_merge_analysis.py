"""The analysis of a merge against dense arithmetic."""

from __future__ import annotations

import json
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_analysis.lemmas.null_space import orthogonal_pair
from shira_analysis.lemmas.orthogonality import diagonal
from shira_analysis.measures.interference import interference
from shira_analysis.measures.pairs import measure_pairs
from shira_analysis.merging import lemmas as merge_lemmas
from shira_analysis.merging.analysis import analyse_merge
from shira_analysis.merging.lemmas import struct_rows
from shira_analysis.merging.report import MergeAnalysis
from shira_analysis.merging.sentences import NO_PROMISE, lemma_words
from shira_format._core.arrays import array_digest
from shira_format._core.text import percent
from shira_format.adapter import Adapter
from shira_format.calibration.moments import Moment, Moments
from shira_format.convert import lora_to_shira
from shira_format.errors import BaseRequired, SourceError
from shira_format.format import save
from shira_format.merging import METHODS, Merge, open_merge
from shira_format.tensors import DenseTensor, SparseTensor, matrix_shape
from tests import models

QUERY, DOWN, NORM, CONV = "h.0.q_proj.weight", "h.0.down_proj.weight", "h.0.norm.weight", "h.0.conv.weight"
SHAPES = {QUERY: (5, 4), DOWN: (3, 6), NORM: (7,), CONV: (2, 3, 2, 1)}
METHODS_TRIED = ("linear", "mean", "overwrite", "disjoint", "intersect", "magnitude_prune", "ties")


def of_delta(delta: Any, name: str = QUERY, mask: Any = None, dtype: Any = np.float32) -> SparseTensor:
    """A tensor of targets whose dense deltas, on a base of zeros, are these."""
    delta = np.asarray(delta, np.float64)
    flat = delta.reshape(-1)
    indices = np.flatnonzero(flat if mask is None else np.asarray(mask).reshape(-1))
    values = flat[indices].astype(dtype)
    return SparseTensor(name, delta.shape, indices, values, base=np.zeros_like(values))


def of_deltas(*deltas: Any, **more: Any) -> Merge:
    return open_merge([Adapter([of_delta(delta)]) for delta in deltas], **more)


def dense(tensor: SparseTensor | None, shape: tuple[int, ...]) -> Any:
    found = np.zeros(int(np.prod(shape)))
    if tensor is not None and tensor.nnz:
        found[tensor.indices] = tensor.values.astype(float)
        if tensor.value_kind == "target":
            found[tensor.indices] -= tensor.base.astype(float)
    return found


def as_json(report: MergeAnalysis) -> dict[str, Any]:
    """The report as JSON without NaN; its text is made, too."""
    assert report.text()
    return json.loads(json.dumps(report.as_json(), allow_nan=False))


@st.composite
def merges(draw: st.DrawFn) -> Merge:
    """Adapters with small integers as deltas, so that dense arithmetic is exact and terms cancel now and then."""
    base = {name: np.random.default_rng(1).integers(-9, 9, shape) for name, shape in SHAPES.items()}
    adapters = []
    for _ in range(draw(st.integers(1, 3))):
        tensors = []
        for name in draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, unique=True)):
            size = int(np.prod(SHAPES[name]))
            indices = np.array(sorted(draw(st.sets(st.integers(0, size - 1)))), np.int64)
            steps = draw(st.lists(st.integers(-3, 3), min_size=indices.size, max_size=indices.size))
            known = base[name].reshape(-1)[indices].astype(np.float32)
            values = known + np.array(steps, np.float32)
            if draw(st.booleans()):
                tensors.append(SparseTensor(name, SHAPES[name], indices, values, base=known))
            else:
                tensors.append(
                    SparseTensor(name, SHAPES[name], indices, values - known, value_kind="delta", base=known)
                )
        adapters.append(Adapter(tensors, manifest={"alpha": draw(st.sampled_from([1.0, 0.5]))}))
    method = draw(st.sampled_from(METHODS_TRIED))
    weights = st.sampled_from([0.0, 1.0] if METHODS[method].copies else [1.0, 0.0, -0.5, 2.0])
    count = len(adapters)
    return open_merge(
        adapters, method=method, weights=draw(st.lists(weights, min_size=count, max_size=count)),
        max_density=draw(st.sampled_from([None, 0.3])),
    )  # fmt: skip


@given(merges())
def test_every_figure_by_dense_arithmetic(job: Merge) -> None:
    report = analyse_merge(job, alternatives=["linear", "mean", "overwrite", "refuse"])
    as_json(report)
    if job.settings.method.name == "mean" and min(report.weights) < 0:
        assert "which the method 'mean' cannot take" in (report.chosen.refused or "")
        assert [] == report.after
        return
    names = list(job.names)
    parts = {name: job.aligned(name).parts for name in names}
    of = {
        (name, at): dense(part.tensor, part.tensor.shape) for name in names for at, part in enumerate(parts[name])
    }
    for pair in report.pairs:
        i, j = pair.numbers
        lemmas = {one.name: one for one in pair.lemmas.tensors}
        assert [one.name for one in pair.pair.tensors] == [n for n in names if parts[n][i].tensor.nnz or parts[n][j].tensor.nnz]  # fmt: skip
        for one in pair.pair.tensors:
            common, product = one.measures.overlap, one.measures.product
            # Each with the sign that it has in the merge.
            a, b = (of[one.name, at] * (-1 if parts[one.name][at].weight < 0 else 1) for at in (i, j))
            sets = [set(parts[one.name][at].tensor.indices.tolist()) for at in (i, j)]
            assert len(sets[0] & sets[1]) == common.shared
            assert np.count_nonzero(a * b < 0) == common.opposite_sign
            assert len(sets[0]) * len(sets[1]) / a.size == pytest.approx(common.expected)
            if len(one.shape) < 2 or not all(sets):
                assert product is None
                assert one.name not in lemmas
                continue
            view = matrix_shape(one.shape)
            a, b = a.reshape(view), b.reshape(view)
            cells = a.T @ b  # integers: exact
            assert product is not None
            assert np.linalg.norm(cells) == pytest.approx(product.awom)
            assert np.count_nonzero(cells) == product.nonzero == lemmas[one.name].nonzero
            assert 1 - np.count_nonzero(cells) / cells.size == pytest.approx(product.awor)
            assert lemmas[one.name].zero is (not cells.any())
            assert lemmas[one.name].apart == (not (a.any(axis=1) & b.any(axis=1)).any())
            sizes = np.linalg.norm(a) * np.linalg.norm(b)
            margin = lemmas[one.name].margin
            assert margin is None if not sizes else margin == pytest.approx(np.linalg.norm(cells) / sizes)
        assert (NO_PROMISE in lemma_words(pair)) is (pair.lemmas.zero > 0 or pair.lemmas.struct > 0)
        assert pair.pair.whole.overlap.shared == sum(one.measures.overlap.shared for one in pair.pair.tensors)
    assert [one.name for one in report.after] == names
    off = np.zeros(len(job.inputs))
    energy, dropped, entries = np.zeros_like(off), np.zeros_like(off), np.zeros_like(off)
    for one in report.after:
        result, account = job.tensor(one.name)
        assert account.nnz == one.nnz
        step = dense(result, one.shape)
        there = set() if result is None else set(result.indices.tolist())
        for at, part in enumerate(parts[one.name]):
            if not part.weight:
                assert not one.accounts[at].entries
                continue
            indices = part.tensor.indices
            due = part.weight * of[one.name, at][indices]
            assert one.accounts[at].off == pytest.approx(np.square(step[indices] - due).sum(), abs=1e-6)
            assert one.accounts[at].energy == pytest.approx(np.square(due).sum())
            gone = [index not in there for index in indices.tolist()]
            assert one.accounts[at].dropped >= sum(gone)
            assert one.accounts[at].dropped_energy >= np.square(due[gone]).sum() - 1e-9
            entries[at] += indices.size
            off[at] += one.accounts[at].off
            energy[at] += one.accounts[at].energy
            dropped[at] += one.accounts[at].dropped
    assert report.chosen.chosen
    for at, account in enumerate(report.chosen.accounts):
        assert (account.entries, account.dropped) == (entries[at], dropped[at])
        assert account.disturbed == (pytest.approx(off[at] / energy[at]) if energy[at] else None)
    assert report.chosen.kept == (pytest.approx(1 - off.sum() / energy.sum()) if energy.sum() else None)
    worst = min((1 - off[at] / energy[at] for at in range(off.size) if energy[at]), default=None)
    assert worst is None if report.chosen.worst is None else report.chosen.worst[1] == pytest.approx(worst)


def test_other_methods_are_what_their_own_merges_give() -> None:
    random = np.random.default_rng(3)
    deltas = [np.where(random.random((30, 20)) < 0.3, random.standard_normal((30, 20)), 0) for _ in range(3)]
    weights = [1.0, 0.5, 2.0]
    report = analyse_merge(of_deltas(*deltas, weights=weights, max_density=0.4))
    assert {"overwrite", "refuse", "disjoint", "intersect"} == {one.method for one in report.refused}
    assert all("copies entries unchanged" in str(one.refused) for one in report.refused)
    assert {one.method for one in report.trials} == set(METHODS)
    for trial in report.ranked:
        job = of_deltas(*deltas, method=trial.method, weights=weights, max_density=0.4)
        own = analyse_merge(job, alternatives=[])
        assert trial.kept == own.chosen.kept
        assert [one.method for one in own.trials] == [trial.method]
    kept = [one.kept for one in report.ranked]
    assert all(a is not None and b is not None and a >= b - 1e-8 for a, b in zip(kept, kept[1:], strict=False))
    ranked = analyse_merge(of_deltas(*deltas)).ranked
    assert {"overwrite", "disjoint", "intersect"} <= {one.method for one in ranked}
    assert "refuse" not in {one.method for one in ranked}


def test_what_methods_drop() -> None:
    a, b = [[1, 1, 0, 0]], [[0, 2, 2, 0]]
    for method, dropped in (
        ("overwrite", (1, 0)),
        ("disjoint", (1, 1)),
        ("intersect", (2, 1)),
        ("linear", (0, 0)),
    ):
        report = analyse_merge(of_deltas(a, b, method=method))
        assert dropped == tuple(one.dropped for one in report.chosen.accounts), method
    report = analyse_merge(of_deltas(a, b, method="overwrite"))
    first, second = report.chosen.accounts
    assert (0.5, 0.5, 0.0, 0.0) == (first.energy_dropped, first.disturbed, second.energy_dropped, second.disturbed)
    assert "adapter 1 loses 50.00 % of its energy: 1 of its 2 entries are dropped." in report.warnings()
    cut = analyse_merge(of_deltas([[1, 3, 0, 0]], [[0, 0, 2, 0]], max_density=0.5))
    assert [1, 0] == [one.dropped for one in cut.chosen.accounts]
    assert [0.1, 0.0] == [one.disturbed for one in cut.chosen.accounts]


def test_every_method_with_adapters_of_different_weights() -> None:
    adapters = [Adapter([of_delta([[1, 2]], name)]) for name in (QUERY, DOWN)]
    report = analyse_merge(open_merge(adapters))
    assert set(METHODS) == {one.method for one in report.ranked}
    assert (2, 0) == (report.pairs[0].pair.whole.tensors, report.pairs[0].pair.whole.both)
    assert "No weight is changed by both: there is no product" in report.text()
    as_json(report)


def test_a_weight_of_zero_has_no_account() -> None:
    report = analyse_merge(of_deltas([[1, 2]], [[3, 0]], weights=[1, 0]))
    assert (2, 0) == tuple(one.entries for one in report.chosen.accounts)
    assert (1.0, (0, 1.0)) == (report.chosen.kept, report.chosen.worst)
    as_json(report)


def test_layers_have_their_own_weights() -> None:
    job = of_deltas([[1, 0]], [[1, 1]], layers=[("q_proj", {"weights": [0.5, 0.25]})])
    report = analyse_merge(job)
    assert (0.25, 0.125) == tuple(one.energy for one in report.chosen.accounts)
    assert [one.method for one in report.refused] == ["overwrite", "refuse", "disjoint", "intersect"]
    assert "in layers with 'q_proj': weights=0.5,0.25" in report.text()
    assert ["0.5", "0.25"] == report.strength_words
    two = [Adapter([of_delta([[1, 0]]), of_delta([[1, 0]], "other")], manifest={"alpha": 0.5}) for _ in range(2)]
    report = analyse_merge(open_merge(two, weights=[1, 2], layers=[("q_proj", {"weights": [1, -3]})]))
    assert ["0.5", "-1.5 to 1, by layer"] == report.strength_words
    assert [[0.5], [-1.5, 1.0]] == [one["strengths"] for one in as_json(report)["inputs"]]
    assert "-1.5 to 1, by layer" in report.text()


def test_a_density_limit_reports_the_energy_lost() -> None:
    report = analyse_merge(of_deltas([[3, 0, 0, 0]], [[0, 1, 2, 0]], max_density=0.25))
    assert 5 / 14 == report.chosen.lost_to_cut == as_json(report)["after"]["energy_lost_to_density"]
    said = "The density limit drops 35.71 % of the energy of the result."
    assert said in report.warnings()
    assert "density limit: 35.71 % of the energy of the result is lost" in report.text()
    assert analyse_merge(of_deltas([[3, 0]])).chosen.lost_to_cut is None


def test_other_methods_run_with_the_same_options() -> None:
    report = analyse_merge(
        of_deltas([[4, 3, 2, 1]], [[4, 0, 0, 1]], method="ties", options={"density": 0.5, "of": "entries"})
    )
    options = {trial.method: trial.options for trial in report.trials}
    assert (0.5, "entries") == (options["magnitude_prune"]["density"], options["magnitude_prune"]["of"])
    assert METHODS["linear"].settings({}) == options["linear"]
    alone = analyse_merge(
        of_deltas(
            [[4, 3, 2, 1]], [[4, 0, 0, 1]], method="magnitude_prune", options={"density": 0.5, "of": "entries"}
        )
    )
    kept = {trial.method: trial.kept for trial in report.trials}
    assert kept["magnitude_prune"] == alone.chosen.kept != kept["linear"]


def struct(shape: tuple[int, int], rows: list[int], seed: int = 0) -> SparseTensor:
    mask = diagonal(shape)
    mask[rows] = True
    delta = np.random.default_rng(seed).standard_normal(shape) * mask
    return of_delta(delta, mask=mask)


@given(st.integers(1, 7), st.integers(1, 7), st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)))
def test_lemma_4_5(rows: int, columns: int, first: set[int], second: set[int]) -> None:
    some = [sorted(row for row in chosen if row < rows) for chosen in (first, second)]
    tensors = [struct((rows, columns), one, seed) for seed, one in enumerate(some)]
    for tensor, one in zip(tensors, some, strict=True):
        found = struct_rows(tensor)
        assert found is not None
        assert set(one) <= set(found.tolist()) <= set(one) | ({0} if columns == 1 else set())
    report = analyse_merge(open_merge([Adapter([tensor]) for tensor in tensors]), alternatives=[])
    (lemmas,) = report.pairs[0].lemmas.tensors
    if columns > 1:
        assert ("shared rows" if set(some[0]) & set(some[1]) else "yes") == lemmas.struct
    if lemmas.struct != "yes":
        assert (lemmas.bound, lemmas.bound_margin) == (None, None)
        return
    a, b = (dense(tensor, tensor.shape).reshape(rows, columns) for tensor in tensors)
    found = np.count_nonzero(a.T @ b)
    off = [tensor.nnz - min(rows, columns) for tensor in tensors]
    assert lemmas.bound == min(rows, columns) + sum(off)
    assert lemmas.bound_margin == pytest.approx((lemmas.bound - found) / columns**2)
    assert lemmas.bound_margin >= 0
    assert (
        "Lemma 4.5 (each mask is the diagonal and whole rows, and no row is in both) applies to 1 of the 1"
        in report.text().replace("\n", " ")
    )


@pytest.mark.parametrize("wrong", [[(0, 0)], [(3, 3)], [(1, 2)], [(1, 1)], [(0, 1), (3, 3)]], ids=str)
def test_masks_that_are_not_struct(wrong: list[tuple[int, int]]) -> None:
    mask = diagonal((4, 4))
    mask[2] = True
    assert struct_rows(of_delta(mask, mask=mask)) is not None
    for cell in wrong:
        mask[cell] = not mask[cell]
    assert struct_rows(of_delta(mask, mask=mask)) is None
    report = analyse_merge(of_deltas(mask, np.eye(4)), alternatives=[])
    assert report.pairs[0].lemmas.struct == 0


def test_lemma_4_4_is_claimed_only_where_the_product_is_0_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    made = orthogonal_pair((6, 5), np.random.default_rng(1))
    report = analyse_merge(of_deltas(*made), alternatives=[])
    (one,) = report.pairs[0].lemmas.tensors
    assert (True, False, 0.0) == (one.zero, one.apart, one.margin)
    assert "In 1, both change some of the same rows" in report.text().replace("\n", " ")
    monkeypatch.setattr(merge_lemmas, "_TERMS", 3)
    report = analyse_merge(of_deltas(*made), alternatives=[])
    assert report.pairs[0].lemmas.tensors[0].zero is None
    assert (0, 1) == (report.pairs[0].lemmas.zero, report.pairs[0].lemmas.unclear)
    assert "whether it is exactly 0 was not computed" in report.text().replace("\n", " ")


def test_products_that_are_small_are_not_0() -> None:
    tiny = np.array([[0.1], [0.2], [0.3]]), np.array([[1.0], [1.0], [-1.0]])
    tensors = [of_delta(delta, dtype=np.float64) for delta in tiny]
    exact = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(*map(np.ravel, tiny), strict=True)), Fraction(0))  # fmt: skip
    (one,) = analyse_merge(open_merge([Adapter([t]) for t in tensors]), alternatives=[]).pairs[0].lemmas.tensors
    assert one.zero is (exact == 0)
    assert one.zero is False
    assert one.margin is not None
    assert one.margin < 1e-12
    small = [
        Adapter([of_delta([[1e-200]], dtype=np.float64)]) for _ in range(2)
    ]  # the product vanishes in float64
    report = analyse_merge(open_merge(small), alternatives=[])
    assert (False, 0) == (report.pairs[0].lemmas.tensors[0].zero, report.pairs[0].lemmas.tensors[0].nonzero)
    as_json(report)


def test_disjoint_rows() -> None:
    report = analyse_merge(of_deltas([[1, 1], [0, 0]], [[0, 0], [1, 2]]))
    (one,) = report.pairs[0].lemmas.tensors
    assert (True, True, 0.0) == (one.zero, one.apart, one.margin)
    text = report.text().replace("\n", " ")
    assert "Lemma 4.4 (A1^T A2 = 0, exactly) applies to 1 of the 1 matrix that both change" in text
    assert "Neither lemma" not in text


def test_interference_by_moments() -> None:
    x = np.random.default_rng(5).standard_normal((30, 4)) + 1
    moments = Moments([Moment(QUERY, (x.T @ x / 30)[None, None], 4, 30)])
    job = of_deltas([[1, 2, 0, 0]], [[1, 0, 0, 3]])
    report = analyse_merge(job, moments)
    parts = job.aligned(QUERY).parts
    assert report.pairs[0].pair.whole.interference == interference(
        parts[0].tensor, parts[1].tensor, moments[QUERY]
    )
    assert "on inputs" in report.text()
    kept = Moments([Moment(QUERY, (x.T @ x / 30)[None, None], 4, 30, inputs=x[:, None])])
    met = interference(parts[0].tensor, parts[1].tensor, kept[QUERY])
    each = ", ".join(percent(share) for share in (met.disturbed_first_each, met.disturbed_second_each))
    assert each in analyse_merge(job, kept).text()
    assert each not in report.text()
    assert "on the layers' inputs" in " ".join(report.warnings())
    other = Moments([Moment("other", np.ones((1, 1, 4, 4)), 4, 30)])
    with pytest.raises(
        SourceError, match="the moments cover none of the adapted weights; they cover 'other', for example"
    ):
        analyse_merge(job, other)


def test_warnings_of_signs() -> None:
    a, b = [[1, 1, 1, 0]], [[1, -1, 1, 0]]

    def of(share: str) -> str:
        return f"adapter 1 and adapter 2 have sign conflicts at {share} of their shared entries (unrelated adapters: half)."

    by_layer = [("q_proj", {"weights": [1, -1]})]
    assert of("33.33 %") in analyse_merge(of_deltas(a, b)).warnings()
    assert of("33.33 %") in analyse_merge(of_deltas(a, b, weights=[-1, -2])).warnings()
    assert of("66.67 %") in analyse_merge(of_deltas(a, b, weights=[-1, 2])).warnings()
    assert of("66.67 %") in analyse_merge(of_deltas(a, b, layers=by_layer)).warnings()
    for turned in ({"weights": [1, -1]}, {"layers": by_layer}):
        said = analyse_merge(of_deltas(a, a, **turned)).warnings()
        assert any("deltas of adapter 1 and adapter 2 have a cosine of -1.00: merged, they partly cancel each other" in one for one in said)  # fmt: skip
        assert any("differs from it by 100.00 %" in one for one in said)
    assert not analyse_merge(of_deltas([[1, 0]], [[0, 1]])).warnings()


def test_a_refused_merge_is_reported() -> None:
    report = analyse_merge(of_deltas([[1, 2]], [[3, 0]], method="refuse"))
    assert report.chosen.refused is not None
    assert report.warnings()[0].startswith(
        "The merge is refused: tensor 'h.0.q_proj.weight': adapter 2 and adapter 1 set 1"
    )
    found = as_json(report)
    assert (None, []) == (found["after"]["inputs"], found["after"]["tensors"])
    assert found["methods"]["not_ranked"][0]["chosen"]
    assert "mean" in {one.method for one in report.ranked}


def test_what_cannot_be_measured() -> None:
    with pytest.raises(SourceError, match="no method 'best'; known: linear"):
        analyse_merge(of_deltas([[1]]), alternatives=["best"])
    needy = SparseTensor(QUERY, (1, 2), [1], np.float32([2]), base_digest=array_digest(np.float32([1])))
    with pytest.raises(
        BaseRequired, match=r"adapter 1: tensor 'h.0.q_proj.weight' holds target values without .*--base"
    ):
        analyse_merge(open_merge([Adapter([needy])]))
    bad = SparseTensor(QUERY, (1, 2), [1], np.float32([np.inf]), value_kind="delta")
    with pytest.raises(
        SourceError, match=r"adapter 1: tensor 'h.0.q_proj.weight': the delta at flat index 1 is NaN"
    ):
        analyse_merge(open_merge([Adapter([bad])]))
    large = SparseTensor(QUERY, (1, 2), [1], np.float64([1e200]), value_kind="delta")
    with pytest.raises(
        SourceError, match="tensor 'h.0.q_proj.weight': the energy of the first adapter's delta is too large"
    ):
        analyse_merge(open_merge([Adapter([large]), Adapter([large])]))


def test_a_result_that_is_not_finite() -> None:
    one = Adapter([of_delta([[60000, 1]], dtype=np.float16)])
    for density, warning, reason in (
        (None, "adapter 1: the result is NaN or infinite at entries of this adapter.", "not finite"),
        # Without a place in the order of magnitudes, it cannot be cut to a density.
        (0.5, f"The merge is refused: the result: tensor '{QUERY}': the delta at flat index 0 is NaN or infinite.", "NaN or infinite"),
    ):  # fmt: skip
        report = analyse_merge(
            open_merge([one, one], weights=[1, 1], max_density=density), alternatives=["mean", "linear"]
        )
        assert (None, None) == (report.chosen.kept, report.chosen.accounts[0].disturbed)
        assert warning in report.warnings()
        found = as_json(report)
        assert ["mean"] == [row["method"] for row in found["methods"]["ranked"]]
        assert reason in found["methods"]["not_ranked"][0]["refused"]


def test_one_adapter_and_whole_tensors() -> None:
    whole = DenseTensor("bias", np.float32([1, 2]))
    report = analyse_merge(open_merge([Adapter([of_delta([[1, 2]])], dense=[whole])]))
    assert ([], 1.0, ["bias"]) == (report.pairs, report.chosen.kept, report.whole)
    assert "1 tensor is replaced as a whole (the first: bias): they are not measured" in report.text()
    report = analyse_merge(open_merge([Adapter([], dense=[whole]), Adapter([], dense=[whole])]))
    found = as_json(report)
    assert (0, None) == (found["before"]["pairs"][0]["whole"]["tensors"], report.chosen.kept)
    assert "The adapters change nothing" in report.text()


def test_names_stay_apart(tmp_path: Path) -> None:
    for folder in "xy":
        (tmp_path / folder).mkdir()
        save(Adapter([of_delta([[1, 2]])]), tmp_path / folder / "a.st")
    paths = [str(tmp_path / folder / "a.st") for folder in "xy"]
    assert paths == analyse_merge(open_merge(paths), alternatives=[]).names
    assert ["a.st (1)", "a.st (2)"] == analyse_merge(open_merge(paths[:1] * 2), alternatives=[]).names
    save(Adapter([of_delta([[1, 2]])]), tmp_path / "b\x1b[2J\u202e.st")
    report = analyse_merge(open_merge([paths[0], tmp_path / "b\x1b[2J\u202e.st"]))
    assert not {"\x1b", "\u202e"} & set(report.text())


@pytest.mark.parametrize("shape", [(2**32, 3), (3, 2**40), (2**20, 2**10, 2**20), (2**52,), (2**26 - 1, 2**27)])
def test_memory_follows_the_entries(shape: tuple[int, ...]) -> None:
    size = int(np.prod([int(side) for side in shape]))
    adapters = []
    for seed in range(2):
        indices = np.unique(np.append(np.random.default_rng(seed).integers(0, size, 50), [0, size - 1]))
        values = np.random.default_rng(seed).standard_normal(indices.size).astype(np.float32)
        adapters.append(Adapter([SparseTensor(DOWN, shape, indices, values, value_kind="delta")]))
    job = open_merge(adapters)
    analyse_merge(job)  # machine code and modules are loaded now
    tracemalloc.start()
    report = analyse_merge(job)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6
    whole = report.pairs[0].pair.whole
    assert 2 <= whole.overlap.shared < 10
    if len(shape) > 1:
        assert whole.product is not None
        columns = matrix_shape(shape)[1]
        assert whole.product.cells == columns**2
        assert whole.product.nonzero >= 1
        uniform = whole.overlap.first * whole.overlap.second / matrix_shape(shape)[0]
        assert whole.product.reached_if_uniform == pytest.approx(uniform, rel=1e-3)
    as_json(report)


def test_rows_that_are_left_out_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(7)
    deltas = [np.where(random.random((40, 6)) < 0.1, random.standard_normal((40, 6)), 0) for _ in range(2)]
    full = analyse_merge(of_deltas(*deltas), alternatives=[]).pairs[0]
    monkeypatch.setattr("shira_analysis.merging.analysis.MAX_ROWS", 4)
    small = analyse_merge(of_deltas(*deltas), alternatives=[]).pairs[0]
    assert small.lemmas == full.lemmas
    assert small.pair.whole.product is not None
    assert full.pair.whole.product is not None
    assert vars(small.pair.whole.product) == pytest.approx(vars(full.pair.whole.product))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the real MiniLM."""
    folder = tmp_path_factory.mktemp("merge")
    for name in ("spam", "genre"):
        lora_to_shira(
            models.LORAS / name, models.minilm(), folder / f"{name}.st", density=0.01, self_contained=True
        )
    return [folder / "spam.st", folder / "genre.st"]


def test_real_adapters(real: list[Path]) -> None:
    from shira_analysis.measures.deltas import open_deltas

    done: list[str] = []
    job = open_merge(real, method="ties", weights=[0.7, 0.3])
    report = analyse_merge(job, progress=done.append)
    assert list(job.names) == done
    (pair,) = measure_pairs([open_deltas(path) for path in real])
    assert pair.tensors == report.pairs[0].pair.tensors
    assert len(report.pairs[0].lemmas.tensors) == 36
    assert (0, 0, 0) == tuple(getattr(report.pairs[0].lemmas, key) for key in ("zero", "apart", "struct"))
    assert "Neither lemma applies to any of them" in report.text()
    found = as_json(report)
    share = found["before"]["pairs"][0]["kinds"]["attention output"]["sign_conflict_share"]
    assert f"{100 * share:.2f} %" in report.text()
    off = energy = 0.0
    for name in job.names:
        result, _ = job.tensor(name)
        parts = job.aligned(name).parts
        step = dense(result, parts[0].tensor.shape)
        for part in parts:
            due = part.weight * part.delta
            off += float(np.square(step[part.tensor.indices] - due).sum())
            energy += float(np.square(due).sum())
    assert report.chosen.kept == pytest.approx(1 - off / energy)
    assert ["ties", 0.7, 0.3] == [found["method"], *(one["weight"] for one in found["inputs"])]
