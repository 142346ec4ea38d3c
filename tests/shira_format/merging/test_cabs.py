"""CABS against a plain loop over dense weights, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_format.entries.aligned import AlignedEntries, Contribution, Floats
from shira_format.errors import SourceError
from shira_format.merging.methods import METHODS
from tests.shira_format.merging.cases import DENSITIES, adapters, dense, joined, part


def looped(parts: list[Contribution], density: float, block: int) -> Floats:
    """The paper's algorithm on dense weights: magnitudes of what is free, n of each m."""
    total = np.zeros(parts[0].tensor.numel)
    free = np.ones(total.size, bool)
    for one in parts:
        if not one.weight:
            continue
        values = dense(one).reshape(-1)
        for start in range(0, values.size, block):
            here = np.arange(start, min(start + block, values.size))
            candidates = sorted(
                (at for at in here if free[at] and values[at]), key=lambda at: (-abs(np.float32(values[at])), at)
            )
            for at in candidates[: int(density * here.size)]:
                total[at] += one.weight * values[at]
                free[at] = False
    return total.reshape(parts[0].tensor.shape)


@given(parts=adapters(), density=st.sampled_from(DENSITIES), block=st.sampled_from([1, 2, 5, 256]))
def test_equals_the_loop(parts: list[Contribution], density: float, block: int) -> None:
    assert np.array_equal(looped(parts, density, block), joined("cabs", parts, density=density, block=block))


@given(parts=adapters(), density=st.sampled_from(DENSITIES), of=st.sampled_from(["elements", "entries"]))
def test_no_entry_is_of_two_adapters(parts: list[Contribution], density: float, of: str) -> None:
    together = AlignedEntries.of(parts)
    options = METHODS["cabs"].settings({"density": density, "of": of, "block": 4})
    factors = METHODS["cabs"].factors(together, options)
    counts = together.sum([np.asarray(one != 0, float) for one in factors])
    assert counts.max(initial=0) <= 1


def test_all_entries_of_the_first_win_at_density_1() -> None:
    rng = np.random.default_rng(0)
    parts = [part(rng.standard_normal((6, 8)) * (rng.random((6, 8)) < 0.5)) for _ in range(3)]
    assert np.array_equal(joined("overwrite", parts, priority="first"), joined("cabs", parts))


def test_two_adapters_of_one_mask_share_it() -> None:
    """Half of the entries each: the first has its largest, the second what is left."""
    first, second = np.arange(1.0, 9.0), -np.arange(8.0, 0.0, -1)
    found = joined("cabs", [part(first), part(second)], density=0.5, of="entries")
    assert np.array_equal([-8, -7, -6, -5, 5, 6, 7, 8], found)


def test_each_adapter_has_a_density_of_its_own() -> None:
    values = np.arange(1.0, 5.0)
    found = joined("cabs", [part(values), part(10 * values)], density="0.5,0.25")
    assert np.array_equal([0, 20, 3, 4], found)


def test_blocks_of_nothing_are_refused() -> None:
    with pytest.raises(SourceError, match="block=0: not from 1"):
        METHODS["cabs"].settings({"block": 0})
