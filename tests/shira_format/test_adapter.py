"""An adapter as a mapping: order, lookups, equality, strength."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_format._core.arrays import Array
from shira_format.adapter import Adapter
from shira_format.format import load, save
from shira_format.tensors import DenseTensor, SparseTensor
from tests.strategies import adapters


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def tensor(name: str, value: float = 1) -> SparseTensor:
    return SparseTensor(name, (2, 3), [1, 4], f32(value, 2), base=f32(0, 0))


def test_the_mapping_keeps_the_order() -> None:
    names = ["z", "a", "m/x", "é"]
    adapter = Adapter(tensor(name) for name in names)
    assert names == list(adapter)
    assert 4 == len(adapter)
    assert names == [t.name for t in adapter.values()]
    assert [(name, tensor(name)) for name in names] == list(adapter.items())
    assert tensor("a") == adapter["a"]
    assert ("a" in adapter, "b" in adapter) == (True, False)
    assert adapter.get("b") is None
    with pytest.raises(KeyError):
        adapter["b"]


def test_an_adapter_is_empty_by_default() -> None:
    adapter = Adapter()
    assert ([], {}, {}) == (list(adapter), dict(adapter.dense), adapter.manifest)
    assert "Adapter(0 sparse tensors, 0 dense tensors)" == repr(adapter)
    assert "Adapter(1 sparse tensors, 1 dense tensors)" == repr(
        Adapter([tensor("w")], dense=[DenseTensor("b", f32(1))])
    )
    with pytest.raises(TypeError, match="unhashable"):
        hash(adapter)


def test_mappings_are_taken_as_they_are() -> None:
    tensors, whole = {"w": tensor("w")}, {"b": DenseTensor("b", f32(1))}
    adapter = Adapter(tensors, dense=whole)
    assert tensors["w"] is adapter["w"]
    assert whole["b"] is adapter.dense["b"]


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="two tensors are named 'w'"):
        Adapter([tensor("w"), tensor("w", 2)])
    with pytest.raises(ValueError, match="two tensors are named 'b'"):
        Adapter(dense=[DenseTensor("b", f32(1)), DenseTensor("b", f32(1))])


@pytest.mark.parametrize(
    ("manifest", "alpha"),
    [(None, 1.0), ({}, 1.0), ({"alpha": 0.25}, 0.25), ({"alpha": 0}, 0.0), ({"alpha": -2}, -2.0)],
)
def test_alpha(manifest: dict[str, Any] | None, alpha: float, tmp_path: Path) -> None:
    adapter = Adapter([tensor("w")], manifest=manifest)
    assert alpha == adapter.alpha
    assert isinstance(adapter.alpha, float)
    save(adapter, tmp_path / "a.st")
    assert alpha == load(tmp_path / "a.st").alpha


def test_the_manifest_is_a_copy() -> None:
    manifest = {"alpha": 0.5}
    adapter = Adapter(manifest=manifest)
    manifest["alpha"] = 1
    assert 0.5 == adapter.alpha


@given(adapter=adapters(), random=st.randoms())
def test_equality_sees_content_alone(adapter: Adapter, random: Any) -> None:
    names, whole = list(adapter), list(adapter.dense)
    random.shuffle(names)
    random.shuffle(whole)
    alpha = {"alpha": adapter.alpha, "removed": list(adapter.removed)}
    same = Adapter(
        [adapter[name] for name in names],
        dense=[adapter.dense[name] for name in whole],
        manifest={"description": "another", "writer": "me"} | alpha,
    )
    assert adapter == same
    assert adapter == pickle.loads(pickle.dumps(adapter))
    assert adapter != Adapter(adapter, dense=adapter.dense, manifest=alpha | {"alpha": adapter.alpha + 1})
    assert adapter != Adapter([*adapter.values(), tensor("new")], dense=adapter.dense, manifest=alpha)
    assert adapter != Adapter(adapter, dense=[*adapter.dense.values(), DenseTensor("new", f32(1))], manifest=alpha)
    assert adapter != dict(adapter)


def test_adapters_that_differ_in_a_value() -> None:
    whole = [DenseTensor("b", f32(1))]
    assert Adapter([tensor("w")], dense=whole) != Adapter([tensor("w", 3)], dense=whole)
    assert Adapter([tensor("w")], dense=whole) != Adapter([tensor("w")], dense=[DenseTensor("b", f32(-1))])
    assert Adapter([tensor("w")]) != Adapter([tensor("v")])


@settings(max_examples=30)
@given(adapter=adapters())
def test_equality_does_not_see_the_codec(tmp_path: Path, adapter: Adapter) -> None:
    save(adapter, tmp_path / "a.st", block_size=16)
    backwards = list(adapter.values())[::-1]
    save(
        Adapter(backwards, dense=adapter.dense, manifest=adapter.manifest),
        tmp_path / "b.st",
    )
    assert load(tmp_path / "a.st") == load(tmp_path / "b.st")
    masks = [SparseTensor(t.name, t.shape, t.indices, value_kind="none") for t in adapter.values()]
    save(Adapter(masks), tmp_path / "m.masks")
    save(adapter, tmp_path / "c.st", masks=tmp_path / "m.masks")
    assert adapter == load(tmp_path / "c.st")
