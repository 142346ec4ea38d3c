"""Laws of merges as a whole: what a merge does to weights, in what order, from where, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, BaseRequired, FormatError, ShiraError, SourceError
from shira_format.format import load, save
from shira_format.live import Switcher, apply
from shira_format.merging import METHODS, merge, open_merge
from shira_format.selection import TopK
from shira_format.tensors import DenseTensor, SparseTensor
from tests.shira_format.merging.small import (
    DTYPES,
    SHAPES,
    Held,
    Weights,
    applied,
    entries,
    make_adapter,
    make_base,
    models,
    same,
)

pytestmark = pytest.mark.usefixtures("kernels")  # everything here holds with numba and without

F32 = np.float32
Model = tuple[Weights, list[Adapter]]
WEIGHTS = st.sampled_from([1.0, 1.0, 0.5, 0.3, -0.7, 2.0, 0.0])
# The same whatever the order of the adapters; random methods draw by an adapter's place, the others take by priority.
SYMMETRIC = [
    "linear", "mean", "task_arithmetic", "magnitude_prune", "ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ram",
    "ramplus_tl", "refuse", "disjoint",
]  # fmt: skip


def content(adapter: Adapter) -> dict[str, Any]:
    """All bits of it, by name; a tensor without entries is as none, since a merge leaves it out."""
    return {
        name: (
            tensor.shape,
            tensor.value_kind,
            tensor.indices.tobytes(),
            tensor.values.tobytes(),
            tensor.base_digest,
        )
        for name, tensor in adapter.items()
        if tensor.nnz
    }


# What it does to weights.


@given(models(count=3), st.lists(WEIGHTS, min_size=3, max_size=3))
def test_a_linear_merge_is_what_a_switcher_makes_of_the_adapters(model: Model, weights: list[float]) -> None:
    base, adapters = model
    together = {name: weight.copy() for name, weight in base.items()}
    Switcher(together).set([(one, w * one.alpha) for one, w in zip(adapters, weights, strict=True)])
    one = open_merge(adapters, weights=weights, base=Held(base)).adapter()
    if any(
        tensor.value_kind == "delta" for tensor in one.values()
    ):  # their sum is rounded to their own dtype first
        now = applied(base, one)
        for name in base:
            eps = max(float(ml_dtypes.finfo(base[name].dtype).eps), float(np.finfo(F32).eps))
            difference = now[name].astype(np.float64) - together[name].astype(np.float64)
            assert np.abs(difference).max() <= 64 * eps
    else:
        assert same(together, applied(base, one))


@given(models(forms=["values", "digest", "deltas"]), st.booleans())
def test_weights_of_1_and_0_give_an_input_back_bit_for_bit(model: Model, first: bool) -> None:
    base, (a, b) = model
    wanted, weights = (a, [1, 0]) if first else (b, [0, 1])
    found = open_merge([a, b], weights=weights).adapter()
    assert wanted.alpha == found.alpha
    assert content(wanted) == content(found)
    assert same(applied(base, wanted), applied(base, found))


@given(models(count=1), st.data())
def test_a_linear_merge_of_disjoint_adapters_is_their_union(model: Model, data: st.DataObject) -> None:
    base, (every,) = model
    parts: list[list[SparseTensor]] = [[], []]
    for name, tensor in every.items():
        side = np.array(data.draw(st.lists(st.booleans(), min_size=tensor.nnz, max_size=tensor.nnz)), bool)
        for part, chosen in zip(parts, (side, ~side), strict=True):
            known = None if tensor.base is None else tensor.base[chosen]
            if tensor.base is None and tensor.base_digest is not None:
                known = base[name].reshape(-1)[tensor.indices[chosen]]
            kept = SparseTensor(name, tensor.shape, tensor.indices[chosen], tensor.values[chosen],
                                value_kind=tensor.value_kind, dtype=tensor.dtype, base=known)  # fmt: skip
            part.append(kept)
    a, b = (Adapter(part) for part in parts)
    union = open_merge([a, b]).adapter()
    for name, tensor in every.items():
        if tensor.nnz:
            assert tensor.indices.tolist() == union[name].indices.tolist()
            assert tensor.values.tobytes() == union[name].values.tobytes()
    plain = Adapter(every)
    assert same(applied(base, plain), applied(base, union))
    assert same(applied(base, plain), applied(base, open_merge([a, b], method="disjoint").adapter()))
    assert (
        content(union)
        == content(open_merge([a, b], method="refuse").adapter())
        == content(open_merge([b, a]).adapter())
    )


@given(models(count=3, forms=["values"]), st.sampled_from(["first", "last"]))
def test_overwrite_is_one_adapter_laid_over_the_other(model: Model, priority: str) -> None:
    base, adapters = model
    order = adapters if priority == "last" else adapters[::-1]
    expected = {name: weight.copy() for name, weight in base.items()}
    for one in order:
        for name, weight in applied(base, one).items():
            if name in one and one.alpha:
                expected[name].reshape(-1)[one[name].indices] = weight.reshape(-1)[one[name].indices]
    found = open_merge(adapters, method="overwrite", options={"priority": priority}).adapter()
    assert same(expected, applied(base, found))


@given(models(count=3, strengths=[1.0], forms=["values"]))
def test_overwrite_is_idempotent_and_associative(model: Model) -> None:
    _, (a, b, c) = model

    def over(*adapters: Adapter) -> Adapter:
        return open_merge(adapters, method="overwrite").adapter()

    assert content(a) == content(over(a, a))
    assert content(over(a, b)) == content(over(a, b, b)) == content(over(a, a, b)) == content(over(over(a, b), b))
    assert content(over(a, b, c)) == content(over(over(a, b), c)) == content(over(a, over(b, c)))


@given(models(count=3, strengths=[1.0], forms=["values"]))
def test_sums_are_associative_within_rounding(model: Model) -> None:
    base, (a, b, c) = model
    at_once, left, right = (
        open_merge([a, b, c]).adapter(),
        open_merge([open_merge([a, b]).adapter(), c]).adapter(),
        open_merge([a, open_merge([b, c]).adapter()]).adapter(),
    )
    for name in at_once:
        eps = float(ml_dtypes.finfo(base[name].dtype).eps)
        for other in (left, right):
            assert at_once[name].indices.tolist() == other[name].indices.tolist()
            error = at_once[name].values.astype(np.float64) - other[name].values.astype(np.float64)
            assert np.abs(error).max(initial=0) <= 16 * eps  # one more rounding of numbers below 16


@pytest.mark.parametrize("method", SYMMETRIC)
@given(model=models(count=3, forms=["values", "digest"]), data=st.data())
def test_the_order_of_the_adapters_does_not_matter(method: str, model: Model, data: st.DataObject) -> None:
    base, adapters = model
    takes = METHODS[method].copies
    weights = data.draw(st.lists(st.sampled_from([0, 1]) if takes else WEIGHTS, min_size=3, max_size=3))
    order = data.draw(st.permutations(range(3)))
    options = {"density": 0.6} if "density" in METHODS[method].options else {}
    try:
        first = open_merge(adapters, method=method, weights=weights, options=options, base=Held(base)).adapter()
    except SourceError:
        with pytest.raises(SourceError):
            open_merge([adapters[i] for i in order], method=method, weights=[weights[i] for i in order],
                   options=options, base=Held(base)).adapter()  # fmt: skip
        return
    second = open_merge([adapters[i] for i in order], method=method, weights=[weights[i] for i in order],
                    options=options, base=Held(base)).adapter()  # fmt: skip
    assert content(first) == content(second)
    assert first.alpha == second.alpha


@given(models(forms=["values"]), WEIGHTS.filter(bool))
def test_an_adapters_own_strength_counts_in_its_weight(model: Model, weight: float) -> None:
    _, (a, b) = model
    plain = [Adapter(one) for one in (a, b)]
    found = open_merge([a, b], weights=[weight, 1]).adapter()
    assert 1 == found.alpha
    assert content(found) == content(open_merge(plain, weights=[weight * a.alpha, b.alpha]).adapter())


def test_the_weight_of_one_adapter_alone_joins_its_own_strength() -> None:
    base = make_base(2)
    a, b = make_adapter(base, 2, alpha=0.5), make_adapter(base, 3)
    together = {name: weight.copy() for name, weight in base.items()}
    Switcher(together).set([(a, 0.3 * 0.5)])
    found = open_merge([a, b], weights=[0.3, 0]).adapter()
    assert 1 == found.alpha
    assert same(together, applied(base, found))


# Files, threads, and what is told.


def thirds(base: Weights, start: int) -> Adapter:
    places = {name: np.arange(start, base[name].size, 3) for name in SHAPES}
    return Adapter([entries(base[name], name, at, at + 0.5) for name, at in places.items()])


def test_options_of_each_adapter() -> None:
    base = make_base(3)
    adapters = [make_adapter(base, 10 + number) for number in range(2)]
    both = open_merge(adapters, method="magnitude_prune", options={"density": [1, 0]}).adapter()
    assert content(open_merge(adapters, method="linear", weights=[1, 0]).adapter()) == content(both)
    assert [1.0, 0.0] == both.manifest["source"]["options"]["density"]
    with pytest.raises(SourceError, match="density: 3 values for 2 adapters"):
        open_merge(adapters, method="ties", options={"density": [1, 1, 1]}).adapter()
    with pytest.raises(SourceError, match="density: 1 values for 2 adapters"):
        open_merge(adapters, method="ties", layers=[("", {"density": [1]})]).adapter()
    with pytest.raises(SourceError, match="lambda=.*: not a number"):
        open_merge(adapters, method="ties", options={"lambda": [1, 1]}).adapter()


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_what_memory_holds_on_any_number_of_threads(method: str, tmp_path: Path) -> None:
    base = make_base(3)
    paths = [tmp_path / f"{name}.st" for name in "abc"]
    adapters = [make_adapter(base, 10 + number, alpha=0.5 + number / 2) for number in range(3)]
    if method == "refuse":
        adapters = [thirds(base, number) for number in range(3)]
    for one, path in zip(adapters, paths, strict=True):
        save(one, path)
    digests = set()
    for threads in (1, 2, 4):
        report = merge(paths, tmp_path / "out.st", method=method, threads=threads)
        digests.add(hashlib.sha256((tmp_path / "out.st").read_bytes()).hexdigest())
        (tmp_path / "out.st").unlink()
    assert 1 == len(digests)
    with pytest.raises(SourceError, match="0 threads: at least 1"):
        merge(paths, tmp_path / "out.st", method=method, threads=0)
    assert not (tmp_path / "out.st").exists()
    merge(paths, tmp_path / "out.st", method=method)
    found, expected = load(tmp_path / "out.st"), open_merge(adapters, method=method).adapter()
    assert content(expected) == content(found)
    assert report.nnz == sum(tensor.nnz for tensor in expected.values())


def test_what_the_result_says_of_itself(tmp_path: Path) -> None:
    base = make_base(0)
    model = {"id": "org/base", "revision": "1", "files": [{"name": "x", "digest": "0" * 64}]}
    for number, name in enumerate("ab"):
        more = {"base_model": model if name == "a" else {"id": "org/base", "revision": "1"}, "license": "mit"}
        made = make_adapter(base, number)
        save(Adapter(made, manifest=more | ({"alpha": 0.5} if name == "b" else {})), tmp_path / f"{name}.st")
    merge(
        [tmp_path / "a.st", tmp_path / "b.st"], tmp_path / "ab.st", method="ties", weights=[0.7, 0.3],
        options={"density": 0.5}, layers=[(r"^b\.", {"density": 0.25, "weights": [1, 0.5]})], max_density=0.2,
    )  # fmt: skip
    told = load(tmp_path / "ab.st").manifest
    assert ({"id": "org/base", "revision": "1"}, "mit") == (told["base_model"], told["license"])
    source = told["source"]
    assert ("merge", "ties") == (source["kind"], source["method"])
    assert 0.5 == source["options"]["density"]
    assert [{"pattern": r"^b\.", "density": 0.25, "weights": [1.0, 0.5]}] == source["layers"]
    for name, weight, alpha, file in zip("ab", (0.7, 0.3), (1.0, 0.5), source["files"], strict=True):
        digest = "sha256:" + hashlib.sha256((tmp_path / f"{name}.st").read_bytes()).hexdigest()
        assert digest.removeprefix("sha256:") == file["digest"].removeprefix("sha256:")
        assert (f"{name}.st", weight, alpha) == (file["name"], file["weight"], file["alpha"])
    assert {"rule": "top-k", "scope": "tensor", "density": 0.2} == told["selection"]
    assert "alpha" not in told


def test_licences_that_differ_are_told(tmp_path: Path) -> None:
    base = make_base(0)
    for number, name in enumerate(["mit", "cc0"]):
        save(Adapter(make_adapter(base, number), manifest={"license": name}), tmp_path / f"{name}.st")
    report = merge([tmp_path / "mit.st", tmp_path / "cc0.st"], tmp_path / "out.st")
    assert ["the adapters' licences differ (cc0, mit): the result has none"] == report.notices
    assert "license" not in load(tmp_path / "out.st").manifest


def test_notices(tmp_path: Path) -> None:
    w = make_base(0, np.float16)["a.weight"]
    one, far = entries(w, "w", [1], [6e4]), entries(w, "w", [2], [1])
    save(Adapter([one]), tmp_path / "a.st")
    save(Adapter([far]), tmp_path / "b.st")
    a, b = tmp_path / "a.st", tmp_path / "b.st"
    assert [] == merge([a, a], None, weights=[0.5, 0.5]).notices
    report = merge([a, a], None)
    assert ["1 entries of the result are NaN or infinite, for example in tensor 'w'"] == report.notices
    nothing = merge([a, a], None, weights=[0, 0])
    assert ["no entries are left: the result changes no weight"] == nothing.notices
    apart = [
        "the adapters share no entries, so whether they are of one base was not checked: pass --base to check it"
    ]
    assert apart == merge([a, b], None).notices
    assert [] == merge([a, b], None, base=Held({"w": w})).notices


# The size of the result.


@given(models(forms=["values", "digest", "deltas"]), st.sampled_from([0.01, 0.1, 0.3, 1.0]))
def test_a_result_of_a_density_is_its_largest_changes(model: Model, density: float) -> None:
    base, adapters = model
    full = open_merge(adapters, base=Held(base)).adapter()
    job = open_merge(adapters, max_density=density, base=Held(base))
    for name in full:
        tensor, account = job.tensor(name)
        delta = full[name].values.astype(np.float64)
        if full[name].value_kind == "target":
            delta -= base[name].reshape(-1)[full[name].indices].astype(np.float64)
        count = min(TopK(density).count(base[name].size), delta.size)
        # Equal magnitudes, of which there are many where the dtype is coarse: the first of them.
        wide = np.float64 if base[name].dtype == np.float64 else F32
        order = np.argsort(-np.abs(delta).astype(wide), kind="stable")[:count]
        kept = np.sort(order)
        assert tensor is not None or not count
        if tensor is not None:
            assert full[name].indices[kept].tolist() == tensor.indices.tolist()
            assert full[name].values[kept].tobytes() == tensor.values.tobytes()
            assert (full[name].base is None) == (tensor.base is None)
            assert account.energy == pytest.approx(float(delta @ delta))
            assert account.energy_kept == pytest.approx(float(delta[kept] @ delta[kept]))
            assert account.nnz == count


def test_options_and_weights_by_layer() -> None:
    base = make_base(5)
    a, b = (make_adapter(base, seed, density=0.5) for seed in (2, 6))
    layers = [(r"weight$", {"weights": [1, 0]}), (r"^b\.", {"weights": [0, 2]}), (r"^c", {"density": 0.5})]
    found = open_merge([a, b], method="magnitude_prune", options={"density": 1.0}, layers=layers).adapter()
    assert found["a.weight"] == a["a.weight"]  # the first pattern
    twice = open_merge([b, Adapter()], weights=[2, 1]).adapter()
    assert found["b.weight"] == twice["b.weight"]  # the second, which is stronger
    assert found["b.weight"] != b["b.weight"]
    half = open_merge([a], method="magnitude_prune", options={"density": 0.5}).adapter()
    assert found["c.weight"] == half["c.weight"]  # both the first and the third
    assert found["c.weight"].nnz < a["c.weight"].nnz


def test_names_can_be_chosen() -> None:
    base = make_base(5)
    a, b = (make_adapter(base, seed, density=0.5) for seed in (2, 6))
    names = {*a, *b}
    assert {name for name in names if name[0] in "ab"} == set(open_merge([a, b], include=["^a", "^b"]).adapter())
    assert {name for name in names if name[0] in "ac"} == set(open_merge([a, b], exclude=[r"^b\."]).adapter())


def test_a_huge_weight_costs_what_its_entries_cost() -> None:
    shape, at = (1 << 26, 1 << 26), np.array([5, 1 << 40, (1 << 52) - 1])
    for method in METHODS:
        a, b = (
            Adapter([SparseTensor("w", shape, at + shift, F32([1, 2, 3]), base=F32([0, 0, 0]))])
            for shift in (0, -1)
        )
        found = open_merge([a, b], method=method).adapter()
        assert set(found) <= {"w"}
        for tensor in found.values():
            assert set(tensor.indices.tolist()) <= {*at.tolist(), *(at - 1).tolist()}


# What is refused; nothing is written then.

W = np.arange(6, dtype=F32).reshape(2, 3)
A = Adapter([entries(W, "w", [1, 4], [10, 40])])
PATCH = Adapter([SparseTensor("v", (2, 3), [1], F32([3]), base=F32([1]), base_name="w")])
MASK = Adapter([SparseTensor("w", (2, 3), [1], value_kind="none", dtype=F32)])
REFUSED: dict[str, tuple[Adapter, dict[str, Any], type[ShiraError], str]] = {
    "shape": (Adapter([entries(W.T.copy(), "w", [1], [3])]), {}, BaseMismatch, r"b.st: tensor 'w' has shape \[3, 2\], and \[2, 3\] in .*a.st: these are not adapters of one base"),
    "dtype": (Adapter([entries(W.astype(np.float16), "w", [1], [3])]), {}, BaseMismatch, "b.st: tensor 'w' is float16, and float32 in .*a.st"),
    "base values": (Adapter([entries(W + 1, "w", [4, 5], [3, 4])]), {}, BaseMismatch, "st: tensor 'w': its base values differ from another adapter's at entries of both"),
    "negative zero": (Adapter([entries(W, "w", [1], [3]), entries(-W, "z", [0], [1])]), {"more": Adapter([entries(W, "z", [0], [2])])}, BaseMismatch, "tensor 'z': its base values differ"),
    "model": (Adapter(A, manifest={"base_model": {"id": "org/other"}}), {}, BaseMismatch, "b.st: made for the base org/other, and .*a.st for org/base"),
    "mask": (MASK, {}, BaseMismatch, "b.st: tensor 'w' is a mask, without values to merge"),
    "patch": (PATCH, {}, BaseMismatch, "b.st: tensor 'v' is renamed or resized: a patch of a full checkpoint"),
    "removed": (Adapter(A, manifest={"removed": ["x"]}), {}, BaseMismatch, "b.st: removes tensors"),
    "no base values": (Adapter([entries(W, "w", [4], [3], "digest")]), {"method": "ties"}, BaseRequired, "b.st: tensor 'w': the base's values at the adapter's entries are not known"),
    "wrong base": (A, {"base": Held({"w": W + 1})}, BaseMismatch, "a.st: tensor 'w': the base base holds other values"),
    "base without it": (A, {"base": Held({"v": W})}, BaseMismatch, "a.st: tensor 'w': the base base has no 'w'"),
    "base of another shape": (A, {"base": Held({"w": W.T})}, BaseMismatch, r"a.st: tensor 'w': the adapter is for shape \[2, 3\], the base base has \[3, 2\]"),
    "conflict": (Adapter([entries(W, "w", [4, 5], [3, 4])]), {"method": "refuse"}, SourceError, "tensor 'w': .*b.st and .*a.st set 1 entries to different values, for example at flat index 4"),
    "sparse and whole": (Adapter(dense=[DenseTensor("w", W + 1, base=W)]), {}, SourceError, "tensor 'w': one adapter changes entries of it, another one replaces it"),
    "infinite delta": (Adapter([entries(W, "w", [4], [np.inf])]), {"method": "ties"}, SourceError, "b.st: tensor 'w': the delta at flat index 4 is NaN or infinite"),
    "infinite, cut": (Adapter([entries(W, "w", [5], [np.inf])]), {"max_density": 0.1}, SourceError, "tensor 'w': the delta at flat index 5 is NaN or infinite"),
    "method": (A, {"method": "average"}, SourceError, "no method 'average'; known: linear, "),
    "option": (A, {"options": {"densty": 1}}, SourceError, "the method 'linear' has no option 'densty'"),
    "value": (A, {"method": "ties", "options": {"density": 2}}, SourceError, "density=2: not from 0 to 1"),
    "density 0": (A, {"max_density": 0}, SourceError, r"density 0 is not in \(0, 1\]"),
    "density nan": (A, {"max_density": float("nan")}, SourceError, r"density nan is not in \(0, 1\]"),
    "weights": (A, {"weights": [1]}, SourceError, "1 weights for 2 adapters"),
    "weight nan": (A, {"weights": [1, float("nan")]}, SourceError, "not all finite"),
    "weights in a text": (A, {"weights": "12"}, SourceError, "1 weights for 2 adapters"),
    "mean": (A, {"method": "mean", "weights": [-1, -1]}, SourceError, "a.st: the weight -1 is negative, which the method 'mean' does not allow"),
    "infinite weight": (A, {"weights": [1, 1e39]}, SourceError, r"b.st: the weight 1e\+39 is infinite in float32"),
    "weight of exact": (A, {"method": "overwrite", "weights": [1, 0.5]}, SourceError, "'overwrite' copies entries unscaled"),
    "names": (A, {"include": ["nothing"]}, SourceError, "no tensor is left by the choice of names"),
    "pattern": (A, {"layers": [("nothing", {"weights": [1, 1]})]}, SourceError, "the pattern 'nothing' matches no tensor's name"),
    "no pattern": (A, {"layers": [("(", {})]}, SourceError, r"not a regular expression: '\('"),
    "layer's option": (A, {"layers": [("w", {"densty": 1})]}, SourceError, "no option 'densty'"),
    "layer's weights": (A, {"layers": [("w", {"weights": [1]})]}, SourceError, "1 weights for 2 adapters"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_nothing(case: str, tmp_path: Path) -> None:
    b, settings, error, reason = REFUSED[case]
    more = settings.get("more")
    save(Adapter(A, manifest={"base_model": {"id": "org/base"}}), tmp_path / "a.st")
    save(b, tmp_path / "b.st")
    paths = [tmp_path / "a.st", tmp_path / "b.st"]
    if more is not None:
        save(more, tmp_path / "c.st")
        paths.append(tmp_path / "c.st")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    known = {key: value for key, value in settings.items() if key != "more"}
    for out in (tmp_path / "out.st", None):
        with pytest.raises(error, match=reason):
            merge(paths, out, **known)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("method", ["ties", "dare_linear", "overwrite", "disjoint"])
def test_other_base_values_are_found_where_nothing_is_taken_of_an_adapter(method: str) -> None:
    other = Adapter([entries(W + 1, "w", [1, 4], [10, 40])])
    options = {"density": 0.0} if "density" in METHODS[method].options else {}
    with pytest.raises(BaseMismatch, match="its base values differ"):
        open_merge([A, other], method=method, options=options).adapter()


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    path = save(A, tmp_path / "a.st")
    assert path is None
    before = (tmp_path / "a.st").read_bytes()
    with pytest.raises(SourceError, match="is one of the inputs"):
        merge([tmp_path / "a.st", tmp_path / "a.st"], tmp_path / "a.st")
    assert before == (tmp_path / "a.st").read_bytes()


def test_damage_that_shows_late_leaves_nothing(tmp_path: Path) -> None:
    base = make_base(1)
    save(make_adapter(base, 1), tmp_path / "a.st")
    raw = bytearray((tmp_path / "a.st").read_bytes())
    raw[-3] ^= 64
    (tmp_path / "b.st").write_bytes(raw)
    with pytest.raises(FormatError, match=r"b\.st.*digest"):
        merge([tmp_path / "a.st", tmp_path / "b.st"], tmp_path / "out.st")
    assert ["a.st", "b.st"] == sorted(path.name for path in tmp_path.iterdir())


def test_no_adapters() -> None:
    with pytest.raises(SourceError, match="no adapters were given"):
        open_merge([]).adapter()


def test_base_values_are_kept_if_all_have_them() -> None:
    b = Adapter([entries(W, "w", [4, 5], [1, 2], "digest")])
    base = Held({"w": W})
    assert open_merge([A, A]).adapter()["w"].base is not None
    assert open_merge([A, b], base=base).adapter()["w"].base is None
    assert open_merge([A, b], base=base, self_contained=True).adapter()["w"].base is not None
    assert open_merge([A, A], self_contained=False).adapter()["w"].base is None
    weights = {"w": W.copy()}
    apply(open_merge([A, A], self_contained=False).adapter(), weights)
    assert [19.0, 76.0] == weights["w"].reshape(-1)[[1, 4]].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_has_a_defined_result(dtype: Any) -> None:
    top = float(ml_dtypes.finfo(dtype).max)
    base = np.zeros((1, 2), dtype)
    one = Adapter([entries(base, "w", [0, 1], [top, -top])])
    found = open_merge([one, one]).adapter()["w"]
    assert [np.inf, -np.inf] == found.values.astype(np.float64).tolist()
