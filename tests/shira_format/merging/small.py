"""Models of a few small weights, and adapters of them in any dtype, form and strength, for the laws of merges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from shira_format._core.arrays import Array
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint
from shira_format.live import apply
from shira_format.tensors import DenseTensor, SparseTensor
from tests.strategies import any_bits

Weights = dict[str, Array]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
SHAPES = {"a.weight": (6, 9), "b.weight": (40,), "c.weight": (3, 4, 5)}
STRENGTHS = [1.0, 1.0, 0.8, -0.5, 2.0, 0.0]
FORMS = ["values", "digest", "deltas"]  # what is stored: targets with the base's values or their digest, or deltas


class Held(Checkpoint):
    """A checkpoint that is in memory."""

    def __init__(self, weights: Weights) -> None:
        self.path, self.files, self._weights = Path("base"), [], weights

    def __getitem__(self, name: str) -> Array:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._weights[name].dtype


def make_base(seed: int, dtype: Any = np.float32) -> Weights:
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    for weight in weights.values():
        weight.reshape(-1)[rng.random(weight.size) < 0.05] = -0.0
    return weights | {"bias": rng.standard_normal(7).astype(dtype)}


def entries(weight: Array, name: str, indices: Any, values: Any, form: str = "values") -> SparseTensor:
    """Entries of a weight that become ``values``."""
    indices = np.asarray(indices, np.int64)
    base = weight.reshape(-1)[indices]
    values = np.asarray(values, weight.dtype)
    if form == "deltas":
        with np.errstate(over="ignore", invalid="ignore"):
            deltas = (values.astype(np.float64) - base.astype(np.float64)).astype(np.float32)
        return SparseTensor(name, weight.shape, indices, deltas, value_kind="delta")
    found = SparseTensor(name, weight.shape, indices, values, base=base)
    if form == "values":
        return found
    return SparseTensor(name, weight.shape, indices, values, base_digest=found.base_digest)


def make_adapter(
    base: Weights, seed: int, form: str = "values", alpha: float = 1.0, density: float = 0.25
) -> Adapter:
    """Random targets at random entries of some weights, one at least, a few of them at both entries of -0.0 and 0.0."""
    rng = np.random.default_rng(seed)
    tensors = []
    for name in SHAPES:
        if rng.random() < 0.8 or (name == list(SHAPES)[-1] and not tensors):
            indices = np.flatnonzero(rng.random(base[name].size) < density)
            values = base[name].reshape(-1)[indices].astype(np.float64) + rng.standard_normal(indices.size)
            values[rng.random(indices.size) < 0.1] = rng.choice([0.0, -0.0])
            tensors.append(entries(base[name], name, indices, values.astype(base[name].dtype), form))
    return Adapter(tensors, manifest={"alpha": alpha} if alpha != 1 else {})


@st.composite
def models(
    draw: st.DrawFn,
    count: int = 2,
    *,
    dtypes: Sequence[Any] = DTYPES,
    forms: Sequence[str] = FORMS,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[Weights, list[Adapter]]:
    """A base, and adapters of it."""
    seed = draw(st.integers(0, 2**31))
    base = make_base(seed, draw(st.sampled_from(dtypes)))
    return base, [
        make_adapter(
            base, seed + 1 + number, draw(st.sampled_from(forms)), draw(st.sampled_from(strengths)),
            draw(st.sampled_from([0.1, 0.4, 0.9])),
        )
        for number in range(count)
    ]  # fmt: skip


@st.composite
def tuned(draw: st.DrawFn, before: Weights, *, forms: Sequence[str] = FORMS, whole: bool = True) -> Adapter:
    """Any adapter that fits ``before``: entries of any bits, and whole tensors in place of old ones or new."""
    tensors, replaced = [], []
    for name, weight in before.items():
        kind = draw(st.sampled_from(["none", "sparse", "sparse", "whole"] if whole else ["none", "sparse"]))
        if kind == "sparse":
            indices = np.array(sorted(draw(st.sets(st.integers(0, weight.size - 1), max_size=9))), np.int64)
            values = draw(any_bits(weight.dtype, indices.shape))
            tensors.append(entries(weight, name, indices, values, draw(st.sampled_from(forms))))
        elif kind == "whole":
            known = draw(st.sampled_from(forms)) == "values"
            tensor = DenseTensor(name, draw(any_bits(weight.dtype, weight.shape)), base=weight.copy())
            replaced.append(tensor if known else DenseTensor(name, tensor.values, base_digest=tensor.base_digest))
    if whole and draw(st.booleans()):
        replaced += [DenseTensor("head", np.arange(3, dtype=np.float32))] if "head" not in before else []
    return Adapter(tensors, dense=replaced, manifest={"alpha": draw(st.sampled_from([1.0, 1.0, 0.5, -2.0]))})


def applied(base: Weights, *adapters: Adapter) -> Weights:
    """The weights with adapters on them, one after the other, each at its own strength."""
    weights = {name: weight.copy() for name, weight in base.items()}
    for adapter in adapters:
        apply(adapter, weights)
    return weights


def same(first: Weights, second: Weights) -> bool:
    """Bit for bit; one NaN is like another, since arithmetic does not say which comes out."""
    return first.keys() == second.keys() and all(_same(weight, second[name]) for name, weight in first.items())


def _same(first: Array, second: Array) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    bits = np.dtype(f"u{first.dtype.itemsize}")
    a, b = first.reshape(-1), second.reshape(-1)
    with np.errstate(invalid="ignore"):  # what ml_dtypes says of signalling NaNs
        either_way = np.isnan(a) & np.isnan(b)
    return bool(((a.view(bits) == b.view(bits)) | either_way).all())
