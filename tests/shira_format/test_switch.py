"""Applying adapters in place: what is touched, what is refused, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch
from shira_format.live import apply
from shira_format.tensors import DenseTensor, SparseTensor, same_bits

F32 = np.float32


def target(name: str, base: np.ndarray[Any, Any], indices: list[int], values: Any) -> SparseTensor:
    flat = base.reshape(-1)
    return SparseTensor(
        name, base.shape, indices, np.asarray(values, base.dtype), base=flat[np.array(indices, int)]
    )


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.floats(-4, 4).filter(lambda alpha: alpha not in (0, 1)),
    st.integers(0, 2**32),
)
def test_torch_tensors_change_in_place_by_the_formula(dtype: torch.dtype, alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator).to(dtype)
    tuned = torch.randn(5, 7, generator=generator).to(dtype)
    mask = torch.rand(5, 7, generator=generator) < 0.3
    indices = mask.flatten().nonzero().flatten()
    tensor = SparseTensor("w", (5, 7), indices, tuned[mask], base=weight[mask])
    work = torch.float64 if dtype == torch.float64 else torch.float32
    # Two roundings, as in section 4.1 of the specification; torch rounds each product and each sum.
    step = torch.tensor(alpha, dtype=work) * (tuned.to(work) - weight.to(work))
    expected = torch.where(mask, (weight.to(work) + step).to(dtype), weight)
    model, before, address = {"w": weight}, weight.clone(), weight.data_ptr()
    applied = apply(Adapter([tensor]), model, alpha)
    assert torch.equal(expected, model["w"])
    assert address == model["w"].data_ptr()
    applied.revert()
    assert same_bits(as_array(before), as_array(model["w"]))


def test_parameters_of_a_model_change() -> None:
    model = torch.nn.Linear(4, 3)
    base = model.weight.detach().numpy().copy()
    applied = apply(Adapter([target("weight", base, [2, 11], [5, 6])]), dict(model.named_parameters()))
    assert [5, 6] == model.weight.detach().flatten()[[2, 11]].tolist()
    applied.revert()
    assert np.array_equal(base, model.weight.detach().numpy())


def test_special_values_keep_their_bits() -> None:
    base = np.array([0.0, -0.0, np.nan, np.inf], F32)
    base.view(np.uint32)[2] = 0xFFC0_1234  # a NaN with a payload
    new = np.array([-0.0, np.nan, 1, -np.inf], F32)
    tensor, weight = target("w", base, [0, 1, 2, 3], new), base.copy()
    applied = apply(Adapter([tensor]), {"w": weight})
    assert same_bits(new, weight)
    applied.revert()
    assert same_bits(base, weight)


def test_an_adapters_own_strength_is_the_default() -> None:
    base = np.zeros(2, F32)
    adapter = Adapter([target("w", base, [0], [2])], manifest={"alpha": 0.25})
    weights = {"w": base.copy()}
    apply(adapter, weights)
    assert [0.5, 0] == weights["w"].tolist()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_strength_must_be_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha {alpha} is not a finite number"):
        apply(Adapter(), {}, alpha)


def test_overflow_has_a_defined_result() -> None:
    base = np.zeros(1, F32)
    weights = {"w": base.copy()}
    with pytest.raises(ValueError, match="the strength 1e\\+300 is infinite in float32"):
        apply(Adapter([target("w", base, [0], [1])]), weights, 1e300)
    assert 0 == weights["w"][0]
    apply(Adapter([target("w", base, [0], [1e38])]), weights, 1e3)
    assert np.isposinf(weights["w"][0])
    half = {"w": np.zeros(1, np.float16)}
    apply(Adapter([target("w", half["w"].copy(), [0], [60_000])]), half, 2)
    assert np.isposinf(half["w"][0])


def test_names_can_be_mapped() -> None:
    base = np.zeros(2, F32)
    adapter = Adapter([target("w", base, [1], [3])], dense=[DenseTensor("new", base)])
    weights = {"model.w": base.copy()}
    applied = apply(adapter, weights, rename="model.{}".format)
    assert {"model.w", "model.new"} == weights.keys()
    assert 3 == weights["model.w"][1]
    applied.revert()
    assert {"model.w"} == weights.keys()


def test_deltas_fit_any_float_base() -> None:
    delta = SparseTensor("w", (3,), [1], np.array([0.5], F32), value_kind="delta")
    for dtype in (np.float16, F32, np.float64, ml_dtypes.bfloat16):
        weights = {"w": np.ones(3, dtype)}
        applied = apply(Adapter([delta]), weights, 2)
        assert [1, 2, 1] == weights["w"].astype(F32).tolist()
        applied.revert()
        assert [1, 1, 1] == weights["w"].astype(F32).tolist()
    with pytest.raises(BaseMismatch, match="tensor 'w': the adapter is for float32, the weight has int8"):
        apply(Adapter([delta]), {"w": np.ones(3, np.int8)})


BASE = np.zeros((2, 3), F32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "tensor 'b': the model has no 'b'"),
    "shape": (
        {"b": np.zeros((3, 2), F32)},
        r"tensor 'b': the adapter is for shape \[2, 3\], the weight has \[3, 2\]",
    ),
    "dtype": ({"b": BASE.astype(np.float16)}, "tensor 'b': the adapter is for float32, the weight has float16"),
    "values": (
        {"b": BASE + 1},
        r"tensor 'b': the base holds other values at the adapter's entries \(digest differs\)",
    ),
    "negative zero": ({"b": -BASE}, r"tensor 'b': .* \(digest differs\)"),
    "read-only": ({"b": np.broadcast_to(F32(0), (2, 3))}, "tensor 'b': the weight is read-only"),
    "device": (
        {"b": torch.zeros(2, 3, device="meta")},
        "tensor 'b': the weight is on the meta device, without data: load the model first",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_changes_no_weight(case: str) -> None:
    weights, reason = REFUSED[case]
    adapter = Adapter(
        [target("a", BASE, [0, 1], [1, 2]), target("b", BASE, [2, 5], [1, 2])],
        dense=[DenseTensor("new", BASE), DenseTensor("old", BASE + 1, base=BASE)],
    )
    weights = {"a": BASE.copy(), "old": BASE.copy()} | weights
    before = {name: np.array(value) for name, value in weights.items() if not torch.is_tensor(value)}
    with pytest.raises(BaseMismatch, match=f"^{reason}$"):
        apply(adapter, weights)
    assert all(same_bits(value, weights[name]) for name, value in before.items())
    assert "new" not in weights


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({}, "tensor 'old': the model has no 'old'"),
        ({"old": BASE + 2}, "tensor 'old': the base holds another tensor"),
        ({"old": BASE.T.copy()}, r"tensor 'old': the adapter is for shape \[2, 3\], the weight has \[3, 2\]"),
    ],
)
def test_whole_tensors_are_checked_before_a_weight_changes(weights: dict[str, Any], reason: str) -> None:
    adapter = Adapter([target("a", BASE, [0], [1])], dense=[DenseTensor("old", BASE + 1, base=BASE)])
    weights = {"a": BASE.copy()} | weights
    with pytest.raises(BaseMismatch, match=reason):
        apply(adapter, weights)
    assert same_bits(BASE, weights["a"])


def test_a_mask_cannot_be_applied() -> None:
    with pytest.raises(BaseMismatch, match="tensor 'm' is a mask, without values to apply"):
        apply(Adapter([SparseTensor("m", (3,), [1], value_kind="none")]), {"m": np.zeros(3, F32)})


PATCHES: dict[str, tuple[Adapter, str]] = {
    "rows": (
        Adapter([SparseTensor("b", (2, 3), np.empty(0, int), F32([]), base=F32([]), rows=1)]),
        "tensor 'b': the adapter renames or resizes it",
    ),
    "name": (
        Adapter([SparseTensor("b", (2, 3), np.empty(0, int), F32([]), base=F32([]), base_name="a")]),
        "tensor 'b': the adapter renames or resizes it",
    ),
    "removed": (Adapter(manifest={"removed": ["b", "c"]}), "the adapter removes tensors, for example 'b'"),
}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("case", PATCHES)
def test_live_weights_take_no_patch(case: str, alpha: float) -> None:
    patch, reason = PATCHES[case]
    tensors = [target("a", BASE, [0], [1]), *patch.values()]
    weights = {name: BASE.copy() for name in "abc"}
    with pytest.raises(BaseMismatch, match=rf"^{reason}: a patch of a full checkpoint, .* \(shira_to_full "):
        apply(Adapter(tensors, manifest=patch.manifest), weights, alpha)
    assert all(same_bits(BASE, weight) for weight in weights.values())


def test_a_digest_of_the_result_makes_no_patch() -> None:
    tensor = SparseTensor("w", (2, 3), [1], F32([5]), base=F32([0]), result_digest="0" * 64)
    weights = {"w": BASE.copy()}
    apply(Adapter([tensor]), weights)
    assert 5 == weights["w"][0, 1]


def test_at_strength_zero_whole_tensors_stay() -> None:
    adapter = Adapter(
        [target("a", BASE, [0], [1])], dense=[DenseTensor("old", BASE + 1, base=BASE), DenseTensor("new", BASE)]
    )
    weights = {"a": BASE.copy(), "old": BASE.copy()}
    apply(adapter, weights, 0)
    assert {"a", "old"} == weights.keys()
    assert all(same_bits(BASE, value) for value in weights.values())


@pytest.mark.parametrize(
    "make", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2], lambda a: a[::-1, ::-1][::-1, ::-1]]
)
def test_strided_weights(make: Any) -> None:
    base = np.arange(24, dtype=F32).reshape(4, 6)
    weight = make(base.copy())
    assert same_bits(base, np.ascontiguousarray(weight))
    expected = base.copy()
    expected.flat[[1, 8, 23]] = [-1, -2, -3]
    applied = apply(Adapter([target("w", base, [1, 8, 23], [-1, -2, -3])], dense=[]), {"w": weight})
    assert np.array_equal(expected, weight)
    applied.revert()
    assert np.array_equal(base, weight)
    transposed = torch.from_numpy(base.T.copy()).t()
    assert not transposed.is_contiguous()
    apply(Adapter([target("w", base, [1, 8, 23], [-1, -2, -3])]), {"w": transposed})
    assert np.array_equal(expected, transposed.numpy())


def test_adapters_come_off_in_reverse_order() -> None:
    base = np.zeros(4, F32)
    first, second = (
        target("w", base, [0, 1], [1, 1]),
        SparseTensor("w", (4,), [1, 2], F32([5, 5]), value_kind="delta"),
    )
    weights = {"w": base.copy()}
    one = apply(Adapter([first]), weights)
    two = apply(Adapter([second]), weights)
    assert [1, 6, 5, 0] == weights["w"].tolist()
    two.revert()
    one.revert()
    assert same_bits(base, weights["w"])
