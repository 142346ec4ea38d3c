"""Weights that overlap in memory: which are refused, which are not, and that nothing is written then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch
from shira_format.live import Switcher
from shira_format.live.memory import Places, memory_of
from shira_format.tensors import SparseTensor

pytestmark = pytest.mark.usefixtures("kernels")  # everything here holds with numba and without


def entry(name: str, weight: Any, index: int = 1) -> SparseTensor:
    flat = as_array(weight).reshape(-1)
    return SparseTensor(
        name, tuple(weight.shape), [index], flat[[index]] + 9, base=flat[[index]].copy(), dtype=flat.dtype
    )


def fused(rows: int = 6, columns: int = 4) -> torch.Tensor:
    return torch.arange(float(rows * columns)).view(rows, columns)


def _turned() -> dict[str, Any]:
    square = fused(5, 5)
    return {"w": square, "v": square.t()}


def _part() -> dict[str, Any]:
    qkv = fused()
    return {"w": qkv, "v": qkv[2:4]}


def _shifted() -> dict[str, Any]:
    memory = torch.arange(30.0)
    return {"w": memory[:24].view(6, 4), "v": memory[3:27].view(6, 4)}


def _column() -> dict[str, Any]:
    qkv = fused()
    return {"w": qkv[:, :3], "v": qkv[:, 2:]}


def _arrays() -> dict[str, Any]:
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    return {"w": array, "v": array[::-1]}


OVERLAPPING = {
    "transposed": _turned,
    "a part": _part,
    "shifted": _shifted,
    "columns": _column,
    "reversed": _arrays,
}


@pytest.mark.parametrize("case", OVERLAPPING)
@pytest.mark.parametrize("how", ["at once", "one after the other", "instead"])
def test_weights_that_overlap_are_refused(case: str, how: str) -> None:
    weights = OVERLAPPING[case]()
    before = {name: as_array(weight).copy() for name, weight in weights.items()}
    switcher = Switcher(weights)
    w, v = entry("w", weights["w"]), entry("v", weights["v"])
    with pytest.raises(BaseMismatch, match="tensors '[wv]' and '[wv]' overlap in memory"):
        if how == "at once":
            switcher.load(Adapter([w, v]))
        else:
            switcher.load(Adapter([w]))
            (switcher.load if how == "one after the other" else switcher.switch)(Adapter([v]))
    switcher.revert()
    assert all(np.array_equal(before[name], as_array(weight)) for name, weight in weights.items())
    switcher.load(Adapter([v]))  # one of them may change
    switcher.revert()
    assert all(np.array_equal(before[name], as_array(weight)) for name, weight in weights.items())


def test_parts_of_a_fused_weight_lie_beside_each_other() -> None:
    qkv = fused(6, 6)
    weights = {"q": qkv[:, :2], "k": qkv[:, 2:4], "v": qkv[:, 4:]}  # interleaved, without an element in common
    base = qkv.clone()
    switcher = Switcher(weights)
    switcher.load(Adapter([entry(name, weight, 3) for name, weight in weights.items()]))
    assert 3 == int((qkv != base).sum())
    switcher.revert()
    assert torch.equal(base, qkv)


def test_elements_that_share_one_place() -> None:
    weights = {"w": torch.ones(1, 4).expand(3, 4)}
    with pytest.raises(BaseMismatch, match="tensor 'w': several elements share one place in memory"):
        Switcher(weights).load(Adapter([entry("w", weights["w"])]))
    assert (weights["w"] == 1).all()


SLICES = st.builds(slice, st.integers(0, 3), st.integers(4, 7), st.integers(1, 3))


@given(slices=st.lists(st.tuples(SLICES, SLICES, st.booleans()), min_size=2, max_size=4))
def test_overlap_is_told_exactly(slices: list[tuple[slice, slice, bool]]) -> None:
    array = np.arange(49).reshape(7, 7)
    views = [part.T if turned else part for part, turned in ((array[a, b], t) for a, b, t in slices)]
    live = {
        str(n): view for n, view in enumerate(views) if all(memory_of(view) != memory_of(v) for v in views[:n])
    }
    together = [value for view in live.values() for value in view.flat]
    places = Places(live)
    if len(set(together)) == len(together):
        places.check_apart(live)
    else:
        with pytest.raises(BaseMismatch, match="overlap"):
            places.check_apart(live)


def test_many_weights_are_compared_at_once() -> None:
    memory = torch.zeros(20_000, 16)
    live = {str(n): memory[n] for n in range(20_000)}
    Places(live).check_apart(live)  # in seconds if each were compared with each
