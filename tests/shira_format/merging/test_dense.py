"""Whole tensors (biases, heads) in a merge: taken, joined through their deltas, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.format import load, save
from shira_format.live import Switcher
from shira_format.merging import METHODS, merge, open_merge
from shira_format.tensors import DenseTensor
from tests.shira_format.merging.small import DTYPES, Held, applied, entries, same

F32 = np.float32
BASE = np.arange(6, dtype=F32).reshape(2, 3)
MODEL = {"b": BASE}


def whole(values: Any, *, known: str = "values", alpha: float = 1.0) -> Adapter:
    """An adapter that replaces ``b``: with the base, its digest, or as a new tensor."""
    tensor = DenseTensor("b", np.asarray(values), base=None if known == "new" else BASE)
    if known == "digest":
        tensor = DenseTensor("b", tensor.values, base_digest=tensor.base_digest)
    return Adapter(dense=[tensor], manifest={"alpha": alpha} if alpha != 1 else {})


@pytest.mark.parametrize("known", ["values", "digest", "new"])
@pytest.mark.parametrize("method", METHODS)
def test_what_one_adapter_alone_replaces_it_replaces_at_any_strength(method: str, known: str) -> None:
    one, other = whole(BASE + 1, known=known, alpha=0.5), Adapter([entries(BASE, "w", [1], [7])])
    for adapters in ([one, other], [other, one]):
        found = open_merge(adapters, method=method).adapter()
        assert one.dense["b"] == found.dense["b"]
    assert {} == open_merge([one, other], weights=[0, 1], method=method).adapter().dense


@pytest.mark.parametrize("method", METHODS)
def test_what_several_replace_by_the_same_bits_stays(method: str) -> None:
    a, b = whole(BASE - 1, known="digest"), whole(BASE - 1)
    found = open_merge([a, b], method=method, base=Held(MODEL)).adapter()
    assert same({"b": BASE - 1}, {"b": found.dense["b"].values})


@given(st.sampled_from(DTYPES), st.integers(0, 99), st.sampled_from([1.0, 0.5, -2.0]), st.booleans())
def test_different_ones_are_joined_through_their_deltas(
    dtype: Any, seed: int, weight: float, given_base: bool
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((3, 4)).astype(dtype)
    tuned = [(base.astype(np.float64) + rng.standard_normal((3, 4))).astype(dtype) for _ in range(2)]
    adapters = [Adapter(dense=[DenseTensor("b", values, base=base)], manifest={"alpha": 0.5}) for values in tuned]
    if given_base:
        adapters = [
            Adapter(dense=[DenseTensor("b", one.dense["b"].values, base_digest=one.dense["b"].base_digest)], manifest=one.manifest)
            for one in adapters
        ]  # fmt: skip
    found = (
        open_merge(adapters, weights=[weight, 1], base=Held({"b": base}) if given_base else None)
        .adapter()
        .dense["b"]
    )
    wide = base.astype(np.float64)
    expected = (
        wide + 0.5 * weight * (tuned[0].astype(np.float64) - wide) + 0.5 * (tuned[1].astype(np.float64) - wide)
    )
    error = np.abs(found.values.astype(np.float64) - expected)
    assert error.max() <= 16 * float(ml_dtypes.finfo(dtype).eps)  # a rounding of numbers below 16
    assert (found.base is None) == given_base
    assert found.base_digest == DenseTensor("b", base, base=base).base_digest


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.copies])
def test_each_method_joins_them_as_it_joins_entries(method: str) -> None:
    rng = np.random.default_rng(4)
    tuned = [BASE + rng.standard_normal((2, 3)).astype(F32) for _ in range(2)]
    options = {name: 0.5 for name in METHODS[method].options if name == "density"}
    found = open_merge([whole(values) for values in tuned], method=method, options=options).adapter()
    sparse = open_merge(
        [Adapter([entries(BASE, "b", np.arange(6), values.reshape(-1))]) for values in tuned], method=method, options=options
    ).adapter()  # fmt: skip
    assert same(applied(MODEL, sparse), applied(MODEL, found))


@pytest.mark.parametrize(("priority", "winner"), [("first", 0), ("last", 1)])
def test_overwrite_takes_one_of_them(priority: str, winner: int) -> None:
    adapters = [whole(BASE + 1, known="new"), whole(BASE + 2, known="new")]
    found = open_merge(adapters, method="overwrite", options={"priority": priority}).adapter()
    assert adapters[winner].dense["b"] == found.dense["b"]


REFUSED: dict[str, tuple[Adapter, str, str]] = {
    "new": (whole(BASE + 2, known="new"), "linear", "the base's is not known"),
    "digest": (whole(BASE + 2, known="digest"), "ties", "the base's is not known"),
    "integers": (Adapter(dense=[DenseTensor("b", np.arange(6), base=np.zeros(6, int))]), "linear", "int64 is no float"),
    "refuse": (whole(BASE + 2), "refuse", "the method 'refuse' merges no dense tensors"),
    "disjoint": (whole(BASE + 2), "disjoint", "the method 'disjoint' merges no dense tensors"),
    "shape": (Adapter(dense=[DenseTensor("b", F32([1]), base=F32([0]))]), "linear", r"has shape \[1\], and \[2, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    b, method, reason = REFUSED[case]
    save(whole(BASE + 1), tmp_path / "a.st")
    save(b, tmp_path / "b.st")
    with pytest.raises(SourceError, match=rf"\.st: tensor 'b' .*{reason}"):
        merge([tmp_path / "a.st", tmp_path / "b.st"], tmp_path / "out.st", method=method)
    assert ["a.st", "b.st"] == sorted(path.name for path in tmp_path.iterdir())


def test_files_and_live_models(tmp_path: Path) -> None:
    sparse = entries(BASE, "w", [1], [7])
    one = Adapter([sparse], dense=[DenseTensor("b", BASE + 1, base=BASE)])
    save(one, tmp_path / "a.st")
    save(Adapter([sparse]), tmp_path / "b.st")
    report = merge([tmp_path / "a.st", tmp_path / "b.st"], tmp_path / "out.st", method="mean")
    assert ["b"] == report.whole
    together = {"b": BASE.copy(), "w": BASE.copy()}
    Switcher(together).set([(one, 0.5), (Adapter([sparse]), 0.5)])
    assert same(together, applied({"b": BASE, "w": BASE}, load(tmp_path / "out.st")))
