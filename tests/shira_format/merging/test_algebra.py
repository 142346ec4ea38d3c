"""Laws of adapters made of adapters: what they do to weights, bit for bit, is what their parts do."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.format import load, save
from shira_format.merging import open_merge
from shira_format.merging.algebra import compose, intersect, invert, subtract
from shira_format.tensors import DenseTensor, SparseTensor, same_bits
from tests.shira_format.merging.small import (
    DTYPES,
    Held,
    Weights,
    applied,
    entries,
    make_adapter,
    make_base,
    models,
    same,
    tuned,
)

pytestmark = pytest.mark.usefixtures("kernels")  # everything here holds with numba and without

F32 = np.float32
bases = st.builds(make_base, st.integers(0, 2**31), st.sampled_from(DTYPES))


@given(bases, st.data())
def test_compose_is_one_after_the_other(base: Weights, data: st.DataObject) -> None:
    a = data.draw(tuned(base))
    between = applied(base, a)
    b = data.draw(tuned(between))
    both = compose(a, b, base=Held(base))
    assert 1 == both.alpha
    assert same(applied(between, b), applied(base, both))


@given(bases, st.data())
def test_compose_of_self_contained_adapters_needs_no_base(base: Weights, data: st.DataObject) -> None:
    a = data.draw(tuned(base, forms=["values"]))
    between = applied(base, a)
    b = data.draw(tuned(between, forms=["values"]))
    both = compose(a, b)
    assert same(applied(between, b), applied(base, both))
    assert both == compose(a, b, base=Held(base))
    assert all(tensor.base is not None for tensor in both.values())


@given(bases, st.data())
def test_compose_is_associative(base: Weights, data: st.DataObject) -> None:
    chain, now = [], base
    for _ in range(3):
        chain.append(data.draw(tuned(now, forms=["values"])))
        now = applied(now, chain[-1])
    a, b, c = chain
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert same(now, applied(base, left))
    assert same(now, applied(base, right))
    assert left == right == compose(a, b, c)


@given(bases, st.data())
def test_an_inverse_brings_the_base_back(base: Weights, data: st.DataObject) -> None:
    a = data.draw(tuned(base))
    back = invert(a, Held(base))
    assert set(back.removed) == {"head"} & a.dense.keys()
    after = applied(base, a)
    for name in back.removed:  # a live model keeps its tensors: patches of files remove them
        del after[name]
    kept = Adapter(back, dense=back.dense, manifest={k: v for k, v in back.manifest.items() if k != "removed"})
    now = applied(after, kept)
    assert base.keys() == now.keys()
    assert all(same_bits(base[name], now[name]) for name in base)  # NaNs with their payloads, too


@given(bases, st.data())
def test_an_inverse_refuses_all_but_what_the_adapter_gives(base: Weights, data: st.DataObject) -> None:
    a = data.draw(tuned(base, forms=["values"], whole=False))
    back, after = invert(a), applied(base, a)
    touched = [(name, index) for name in a for index in a[name].indices]
    if touched:
        name, index = data.draw(st.sampled_from(touched))
        flat = after[name].reshape(-1).view(f"u{after[name].dtype.itemsize}")
        flat[index] ^= 1
        with pytest.raises(BaseMismatch, match=f"tensor '{name}'"):
            applied(after, back)


@given(bases, st.data())
def test_an_inverse_of_an_inverse_is_the_adapter(base: Weights, data: st.DataObject) -> None:
    a = data.draw(tuned(base, forms=["values"]))
    old = Adapter(a, dense={k: v for k, v in a.dense.items() if k != "head"}, manifest=a.manifest)
    twice = invert(invert(old))
    assert 1 == twice.alpha
    assert same(applied(base, old), applied(base, twice))
    if old.alpha == 1:
        assert old == twice


@given(bases, st.data())
def test_an_adapter_and_its_inverse_cancel(base: Weights, data: st.DataObject) -> None:
    a = data.draw(tuned(base, forms=["values"], whole=False))
    nothing = compose(a, invert(a))
    assert all(same_bits(tensor.values, tensor.base) for tensor in nothing.values())


@given(models(forms=["values", "digest"]))
def test_a_difference_is_what_one_adds_beyond_the_other(model: tuple[Weights, list[Adapter]]) -> None:
    base, (a, b) = model
    found = subtract(a, b, Held(base))
    for name in found:
        expected = np.zeros(base[name].size)
        for one, sign in ((a, 1), (b, -1)):
            if name in one:
                tensor = one[name]
                step = tensor.values.astype(np.float64) - base[name].reshape(-1)[tensor.indices].astype(np.float64)
                expected[tensor.indices] += sign * one.alpha * step
        delta = np.zeros(base[name].size)
        own = base[name].reshape(-1)[found[name].indices].astype(np.float64)
        delta[found[name].indices] = found[name].values.astype(np.float64) - own
        # One rounding to the weight's dtype, and two of a strength other than 1, of numbers of a size up to 16.
        eps = float(ml_dtypes.finfo(base[name].dtype).eps)
        assert np.abs(delta - expected).max() <= 32 * eps
    assert found.keys() == {*a, *b}


def test_whole_tensors_of_a_difference() -> None:
    head, old = DenseTensor("head", W), DenseTensor("w", W + 1, base=W)
    a, b = Adapter(dense=[head, old]), Adapter(dense=[head])
    assert {"w": old} == dict(subtract(a, b).dense)
    assert {} == dict(subtract(a, a).dense)
    for one, other in ((b, a), (a, Adapter(dense=[DenseTensor("w", W + 2, base=W)]))):
        with pytest.raises(
            SourceError, match="adapter 2: tensor 'w' is replaced as a whole, which cannot be subtracted"
        ):
            dict(subtract(one, other).dense)


@given(models(forms=["values"], strengths=[1.0]))
def test_an_adapter_less_itself_changes_nothing(model: tuple[Weights, list[Adapter]]) -> None:
    base, (a, _) = model
    found = applied(base, subtract(a, a))
    assert all(np.array_equal(base[name], found[name]) for name in base)


@given(models(count=3, forms=["values", "digest"]))
def test_an_intersection_is_of_the_first_where_all_have_entries(model: tuple[Weights, list[Adapter]]) -> None:
    base, adapters = model
    found = intersect(*adapters, base=Held(base))
    first = applied(base, adapters[0])
    now = applied(base, found)
    for name in base:
        met = [set(one[name].indices.tolist()) if name in one else set() for one in adapters]
        active = [some for some, one in zip(met, adapters, strict=True) if one.alpha]
        common = sorted(set.intersection(*met)) if len(active) == 3 else None
        if common is not None:
            assert common == (found[name].indices.tolist() if name in found else [])
            flat = now[name].reshape(-1)
            assert same_bits(first[name].reshape(-1)[common], flat[common])


def test_files(tmp_path: Path) -> None:
    base = make_base(0)
    a = make_adapter(base, 1, alpha=0.5)
    b = make_adapter(applied(base, a), 2)
    save(
        Adapter(a, manifest={"alpha": 0.5, "license": "mit", "base_model": {"id": "org/base"}}), tmp_path / "a.st"
    )
    save(Adapter(b, manifest={"license": "mit", "base_model": {"id": "org/tuned"}}), tmp_path / "b.st")
    both = compose(tmp_path / "a.st", tmp_path / "b.st")
    save(both, tmp_path / "ab.st")
    read = load(tmp_path / "ab.st")
    assert read == compose(a, b)
    assert ({"id": "org/base"}, "mit") == (read.manifest["base_model"], read.manifest["license"])
    source = read.manifest["source"]
    assert ("compose", ["a.st", "b.st"], [0.5, 1.0]) == (
        source["kind"], [one["name"] for one in source["files"]], [one["alpha"] for one in source["files"]],
    )  # fmt: skip
    save(invert(tmp_path / "ab.st"), tmp_path / "back.st")
    back = load(tmp_path / "back.st")
    assert "base_model" not in back.manifest  # its base is the adapted model
    assert same(base, applied(applied(base, read), back))


W = np.arange(6, dtype=F32).reshape(2, 3)
A = Adapter([entries(W, "w", [1, 4], [10, 40])])
AFTER = applied({"w": W}, A)["w"]
MASK = Adapter([SparseTensor("w", (2, 3), [1], value_kind="none", dtype=F32)])
COMPOSED: dict[str, tuple[Adapter, Adapter, str]] = {
    "of one base": (A, Adapter([entries(W, "w", [4, 5], [1, 2])]), r"adapter 2: tensor 'w' was not made for the result of adapter 1 \(1 entries of both\)"),
    "by digest": (A, Adapter([entries(W, "w", [4, 5], [1, 2], "digest")]), "was not made for the result of adapter 1|base's values at the adapter's entries are not known"),
    "shape": (A, Adapter([entries(AFTER.T.copy(), "w", [4], [1])]), r"adapter 2: tensor 'w' is float32\[3, 2\], and float32\[2, 3\] in adapter 1"),
    "dtype": (A, Adapter([entries(AFTER.astype(np.float16), "w", [4], [1])]), r"adapter 2: tensor 'w' is float16\[2, 3\], and float32\[2, 3\]"),
    "whole after entries": (A, Adapter(dense=[DenseTensor("w", W, base=W)]), "adapter 2: tensor 'w'.*other"),
    "entries after whole": (Adapter(dense=[DenseTensor("w", W + 1, base=W)]), A, "adapter 2: tensor 'w' was not made"),
    "whole after whole": (Adapter(dense=[DenseTensor("w", W + 1, base=W)]), Adapter(dense=[DenseTensor("w", W, base=W)]), "adapter 2: tensor 'w'.*other"),
    "a mask": (A, MASK, "adapter 2: tensor 'w' is a mask"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPOSED)
def test_what_is_not_composed(case: str) -> None:
    a, b, reason = COMPOSED[case]
    with pytest.raises((BaseMismatch, BaseRequired), match=reason):
        [*(both := compose(a, b)).values(), *both.dense.values()]


def test_what_lacks_the_bases_values() -> None:
    digest = Adapter([entries(W, "w", [1, 4], [10, 40], "digest")])
    deltas = Adapter([entries(W, "w", [1, 4], [10, 40], "deltas")])
    whole = Adapter(dense=[DenseTensor("w", W + 1, base_digest=DenseTensor("w", W, base=W).base_digest)])
    for adapter in (digest, deltas, whole):
        with pytest.raises(
            BaseRequired,
            match="adapter 1: tensor 'w': the base's values at the adapter's entries are not known: pass the base",
        ):
            back = invert(adapter)
            [*back.values(), *back.dense.values()]
        back = invert(adapter, Held({"w": W}))
        assert same({"w": W}, applied(applied({"w": W}, adapter), back))
    other = Held({"w": W + 1})
    for adapter in (digest, whole):
        with pytest.raises(BaseMismatch, match="adapter 1: tensor 'w'"):
            back = invert(adapter, other)
            [*back.values(), *back.dense.values()]


def test_an_adapter_of_strength_0_changes_nothing() -> None:
    off = Adapter(A, dense=[DenseTensor("head", W)], manifest={"alpha": 0})
    for found in (compose(off, off), invert(off)):
        assert ([], [], ()) == ([*found], [*found.dense], found.removed)
    assert compose(off, A) == A == compose(A, off)


def test_the_difference_of_a_merge_and_a_part_is_the_other_part() -> None:
    a, b = (Adapter([entries(W, "w", at, W.reshape(-1)[at] + 1)]) for at in ([0, 1], [3, 5]))
    rest = subtract(open_merge([a, b]).adapter(), a)
    assert same(applied({"w": W}, b), applied({"w": W}, rest))
