"""Weights that change their place or shape while an adapter is on: refused, or right; never a write past an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch
from shira_format.live import Switcher
from shira_format.tensors import DenseTensor, SparseTensor, same_bits
from tests import models

pytestmark = pytest.mark.usefixtures("kernels")  # everything here holds with numba and without


def sparse(name: str, weight: torch.Tensor, every: int = 3) -> SparseTensor:
    flat = as_array(weight).reshape(-1)
    indices = np.arange(0, flat.size, every)
    return SparseTensor(name, tuple(weight.shape), indices, flat[indices] + 1, base=flat[indices].copy())


def whole(name: str, weight: torch.Tensor) -> DenseTensor:
    return DenseTensor(name, as_array(weight) + 1, base=as_array(weight).copy())


def guarded(rows: int, columns: int, guard: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in the middle of other memory, and that memory."""
    memory = torch.zeros(rows * columns + 2 * guard)
    weight = memory[guard:-guard].view(rows, columns)
    weight.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    return weight, memory


def cut(weights: dict[str, torch.Tensor]) -> None:
    weights["w"].set_(weights["w"].untyped_storage(), weights["w"].storage_offset(), (2, 5), (5, 1))


def turn(weights: dict[str, torch.Tensor]) -> None:
    weights["w"].t_()


def replace(weights: dict[str, torch.Tensor]) -> None:
    weights["w"].set_(torch.full((8, 5), 7.0))


def narrow(weights: dict[str, torch.Tensor]) -> None:
    weights["w"] = weights["w"][:, :4]


def release(weights: dict[str, torch.Tensor]) -> None:
    weights["w"] = torch.ones(8, 5)
    weights["w"].untyped_storage().resize_(0)


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "made smaller in place": (
        cut,
        r"weight of \[8, 5\] became \[2, 5\] after an adapter was applied: call revert",
    ),
    "transposed in place": (turn, r"became \[5, 8\]"),
    "other memory in place": (replace, "was replaced by one with other values"),
    "another tensor": (narrow, r"became \[8, 4\]"),
    "released": (release, "the memory of the weight was released"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("kind", ["entries", "whole"])
@pytest.mark.parametrize("then", ["revert", "switch"])
def test_a_weight_that_is_another_one_is_not_written(case: str, kind: str, then: str) -> None:
    change, reason = CHANGES[case]
    weight, memory = guarded(8, 5)
    weights, before = {"w": weight, "v": torch.ones(4, 4)}, weight.clone()
    first = Adapter([sparse("w", weight)]) if kind == "entries" else Adapter(dense=[whole("w", weight)])
    second = Adapter([sparse("v", weights["v"])])
    switcher = Switcher(weights)
    switcher.load(first)
    applied = memory.clone()
    change(weights)
    now = {n: None if case == "released" and n == "w" else t.clone() for n, t in weights.items()}
    with pytest.raises(BaseMismatch, match=f"tensor 'w': .*{reason}"):
        switcher.revert() if then == "revert" else switcher.switch(second)
    assert torch.equal(applied, memory)
    assert all(t is None or torch.equal(t, weights[n]) for n, t in now.items())
    # The weight is put back, or a copy of it with the adapter's values: it can be reverted.
    weights["w"] = memory[64:-64].view(8, 5)
    switcher.revert()
    assert torch.equal(before, memory[64:-64].view(8, 5))
    assert not memory[:64].any()
    assert not memory[-64:].any()


def test_an_embedding_that_is_resized() -> None:
    model = models.gpt2()
    name = "transformer.wte.weight"
    base = model.transformer.wte.weight.detach().clone()
    switcher = Switcher(model)
    switcher.load(Adapter([sparse(name, base)]))
    rows = base.shape[0]
    model.resize_token_embeddings(rows - 7)
    with pytest.raises(BaseMismatch, match=f"{name}.*became"):
        switcher.revert()
    model.resize_token_embeddings(rows)  # the last rows are new ones
    with pytest.raises(BaseMismatch, match=f"{name}.*was replaced by one with other values"):
        switcher.revert()


def test_an_array_that_is_resized_in_place() -> None:
    weight = np.arange(40, dtype=np.float32)
    weights = {"w": weight}
    switcher = Switcher(weights)
    switcher.load(Adapter([sparse("w", torch.arange(40.0))]))
    with pytest.raises(ValueError, match="cannot resize"):  # numpy sees that it is referred to
        weight.resize(10, refcheck=False)
    switcher.revert()
    weight.resize(10, refcheck=False)
    assert weight.tolist() == list(range(10))


def test_a_tie_that_is_broken() -> None:
    model = models.gpt2()
    base = model.lm_head.weight.detach().clone()
    switcher = Switcher(model)
    switcher.load(Adapter([sparse("lm_head.weight", base)]))
    changed = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(changed.detach().clone())  # would keep the adapter's values
    with pytest.raises(BaseMismatch, match=r"untied from '.*' after an adapter was applied"):
        switcher.revert()
    model.lm_head.weight = changed
    switcher.revert()
    assert torch.equal(base, model.lm_head.weight)


def test_a_copy_elsewhere_is_taken_for_the_weight() -> None:
    weights: dict[str, Any] = {"w": torch.randn(8, 5), "new": torch.zeros(3)}
    base = {name: tensor.clone() for name, tensor in weights.items()}
    switcher = Switcher(weights)
    switcher.load(Adapter([sparse("w", weights["w"])], dense=[whole("new", weights["new"])]))
    weights["w"] = weights["w"].t().contiguous().t()  # other memory and strides, the same elements
    weights["new"] = weights["new"].clone()
    switcher.revert()
    assert all(same_bits(as_array(base[name]), as_array(tensor)) for name, tensor in weights.items())


def test_a_new_weight_at_the_address_of_the_old_one() -> None:
    weights = {"w": torch.randn(300, 300)}
    switcher = Switcher(weights)
    switcher.load(Adapter([sparse("w", weights["w"])]))
    address = weights.pop("w").data_ptr()
    others: list[torch.Tensor] = []
    while not others or (others[-1].data_ptr() != address and len(others) < 20):
        others.append(torch.ones(300, 300))
    weights["w"] = others[-1]
    with pytest.raises(BaseMismatch, match="was replaced by one with other values"):
        switcher.revert()
    assert (weights["w"] == 1).all()


BASE = np.arange(40, dtype=np.float32).reshape(8, 5)


def _masked(order: Any) -> Any:
    # To numpy, what is written to masked elements of a hard mask is lost.
    return np.ma.array(np.array(BASE, order=order), mask=BASE % 2 == 0, hard_mask=True)


@pytest.mark.parametrize("weight", [np.matrix(BASE), _masked("C"), _masked("F"), np.rec.array(BASE)], ids=type)
@pytest.mark.parametrize("kind", ["entries", "whole"])
def test_arrays_of_other_classes_are_plain_memory(weight: Any, kind: str) -> None:
    base = torch.from_numpy(BASE)
    adapter = Adapter([sparse("w", base)]) if kind == "entries" else Adapter(dense=[whole("w", base)])
    switcher = Switcher({"w": weight})
    switcher.load(adapter)
    expected = BASE + (np.arange(40).reshape(8, 5) % 3 == 0 if kind == "entries" else 1)
    assert np.array_equal(expected, np.asarray(weight))
    switcher.revert()
    assert np.array_equal(BASE, np.asarray(weight))


def test_a_negated_view() -> None:
    numbers = torch.complex(torch.zeros(8, 5), torch.ones(8, 5))
    view = numbers.conj().imag  # its memory holds the elements with the other sign
    with pytest.raises(BaseMismatch, match="tensor 'w': the weight is a negated view"):
        Switcher({"w": view}).load(Adapter([sparse("w", -torch.ones(8, 5))]))
    assert (numbers.imag == 1).all()
