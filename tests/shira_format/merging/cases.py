"""Adapters of one weight for the tests of the methods: small ones, as sparse tensors and as dense arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shira_format.entries.aligned import AlignedEntries, Contribution, Floats
from shira_format.entries.mixing import mix
from shira_format.merging.methods import METHODS
from shira_format.tensors import SparseTensor

SHAPES = [(1,), (13,), (6, 8), (1, 9), (30, 2), (2, 5, 3), (3, 4, 2, 2)]
# Sums of these are exact, so that what cancels does so in any order.
WEIGHTS = [0.0, 1.0, 1.0, -1.0, 0.5, -0.5, 0.75, -0.25, 2.0]
DENSITIES = [0.0, 1e-4, 0.03, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]


def part(dense: Floats, weight: float = 1.0) -> Contribution:
    """The elements that are not zero, as deltas."""
    indices = np.flatnonzero(dense)
    tensor = SparseTensor("w", dense.shape, indices, dense.reshape(-1)[indices], value_kind="delta")
    return Contribution(tensor, weight, "an adapter")


def dense(part: Contribution) -> Floats:
    """What an adapter adds at strength 1."""
    found = np.zeros(part.tensor.numel)
    found[part.tensor.indices] = part.delta
    return found.reshape(part.tensor.shape)


def joined(method: str, parts: list[Contribution], **options: Any) -> Floats:
    """The dense result of a method."""
    together, chosen = AlignedEntries.of(parts), METHODS[method]
    result = mix(together, chosen.factors(together, chosen.settings(options)), self_contained=False)
    return np.zeros(together.shape) if result is None else dense(Contribution(result))


@st.composite
def adapters(draw: st.DrawFn, shapes: list[tuple[int, ...]] = SHAPES) -> list[Contribution]:
    """One to four: masks that are equal, disjoint, empty or any; values that are equal, opposite or any; never two alike in one."""
    shape = draw(st.sampled_from(shapes))
    size = math.prod(shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found: list[Floats] = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = ["any", "full", "empty"] + (["same mask", "equal", "opposite", "disjoint"] if found else [])
        kind = draw(st.sampled_from(kinds))
        values = rng.standard_normal(size).astype(np.float32).astype(np.float64)  # mergekit sorts in float32
        values *= 10.0 ** draw(st.sampled_from([0, 0, -4]))
        values[rng.random(size) > draw(st.sampled_from([0.1, 0.4, 0.8]))] *= kind in (
            "full",
            "same mask",
            "equal",
            "opposite",
        )
        if kind == "empty":
            values[:] = 0
        elif kind == "same mask":
            values *= found[-1] != 0
        elif kind in ("equal", "opposite"):
            values = found[-1] * (1 if kind == "equal" else -1)
        elif kind == "disjoint":
            values *= np.all([one == 0 for one in found], axis=0)
        found.append(values + 0.0)
    weights = draw(st.lists(st.sampled_from(WEIGHTS), min_size=len(found), max_size=len(found)))
    return [part(one.reshape(shape), weight) for one, weight in zip(found, weights, strict=True)]
