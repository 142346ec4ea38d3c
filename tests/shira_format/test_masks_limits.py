"""Masks that are chosen within others, and without others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shira_format as shira
from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.masks import make_mask
from shira_format.tensors import SparseTensor
from tests.models import save_arrays


def support(name: str, shape: tuple[int, int], chosen: Any) -> Adapter:
    return Adapter([SparseTensor(name, shape, np.flatnonzero(chosen), None, value_kind="none")])


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 24), st.integers(0, 99), st.sampled_from([1, 2, 4]), st.sampled_from(["tensor", "global", "row"]), st.booleans(), st.integers(1, 20))  # fmt: skip
def test_the_best_of_those_that_are_allowed(
    tmp_path_factory: Any, m: int, n: int, seed: int, runs: int, scope: str, inside: bool, wanted: int
) -> None:
    """Exactly as many as asked for, the largest of those allowed, or a refusal."""
    rng = np.random.default_rng(seed)
    n = max(runs, n // runs * runs)  # whole runs in each row
    weight = rng.integers(-4, 5, (m, n)).astype(np.float32)
    base = save_arrays(tmp_path_factory.mktemp("w") / "model.safetensors", {"a.weight": weight})
    within = np.repeat(rng.random(m * n // runs) < 0.7, runs) if inside else np.ones(m * n, bool)
    without = rng.random(m * n) < 0.15
    options: dict[str, Any] = {"within": [support("a.weight", (m, n), within)]} if inside else {}
    options["without"] = [support("a.weight", (m, n), without)]
    count = min(wanted * runs, m * n)
    allowed = (within & ~without).reshape(-1, runs).all(1)
    scores = np.abs(weight).reshape(-1, runs).sum(1)
    if inside and not within.any():
        with pytest.raises(SourceError, match="no weight has entries within the masks"):
            make_mask(base, "wm", top_k=count, runs=runs, scope=scope, **options)
        return
    rows = m if scope == "row" else 1
    each = max(1, int(count / m + 0.5)) if scope == "row" else count
    each = min(each, n) if scope == "row" else each
    take = max(min(each, 1), (2 * each + runs) // (2 * runs))
    if allowed.reshape(rows, -1).sum(1).min() < take:
        with pytest.raises(SourceError, match=r"are wanted, and \d+ may be chosen"):
            make_mask(base, "wm", top_k=count, runs=runs, scope=scope, **options)
        return
    (found,) = make_mask(base, "wm", top_k=count, runs=runs, scope=scope, **options).values()
    ranks = np.where(allowed, scores, -1).reshape(rows, -1)
    best = np.argsort(-ranks, axis=1, kind="stable")[:, :take]
    chosen = np.zeros(ranks.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    assert np.flatnonzero(np.repeat(chosen.reshape(-1), runs)).tolist() == found.indices.tolist()


def test_files_names_and_weights_that_are_left_out(tmp_path: Path) -> None:
    weights = {f"model.{name}.weight": np.arange(1, 13, dtype=np.float32).reshape(3, 4) for name in "ab"}
    base = save_arrays(tmp_path / "model.safetensors", weights)
    shira.save(support("a.weight", (3, 4), [1] * 6 + [0] * 6), tmp_path / "inner.st")
    shira.save(support("a.weight", (3, 4), [0] * 5 + [1] * 7), tmp_path / "outer.st")
    found = make_mask(base, top_k=2, within=[tmp_path / "inner.st"], without=[tmp_path / "outer.st"])
    assert {"model.a.weight": [3, 4]} == {name: tensor.indices.tolist() for name, tensor in found.items()}
    notes = found.manifest["selection"]
    assert (["inner.st"], ["outer.st"]) == (notes["within"], notes["without"])
    # A weight that no mask names is free.
    assert {"model.a.weight", "model.b.weight"} == set(make_mask(base, top_k=2, without=[tmp_path / "outer.st"]))
    with pytest.raises(SourceError, match=r"inner.st: .* are not in the base"):
        make_mask(
            save_arrays(tmp_path / "other.safetensors", {"z.weight": weights["model.a.weight"]}),
            within=[tmp_path / "inner.st"],
        )
    with pytest.raises(SourceError, match=r"has the shape \[3, 4\], and the weight \[4, 3\]"):
        make_mask(
            save_arrays(tmp_path / "turned.safetensors", {"a.weight": np.ones((4, 3), np.float32)}),
            without=[tmp_path / "inner.st"],
        )
    with pytest.raises(ValueError, match="combine its mask with these"):
        make_mask(base, "struct", within=[tmp_path / "inner.st"])
