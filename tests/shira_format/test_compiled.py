"""Inner loops: machine code and numpy give the same."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shira_format._core import compiled
from shira_format._core.arrays import Array, as_bytes
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch, FormatError
from shira_format.live import Switcher
from shira_format.live.weights import ArrayWeight, DeviceWeight
from shira_format.tensors import SparseTensor

RISING = st.sets(st.integers(0, 60), max_size=30).map(lambda some: np.array(sorted(some), np.int64))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lists=st.lists(RISING, min_size=1, max_size=5))
def test_a_union_is_every_number_once(kernels: str, lists: list[np.ndarray]) -> None:
    every, places = compiled.union(lists)
    assert every.dtype == np.int64
    assert every.tolist() == sorted(set().union(*map(np.ndarray.tolist, lists)))
    assert len(places) == len(lists)
    for one, at in zip(lists, places, strict=True):
        assert np.array_equal(every[at], one)


def test_a_union_of_long_lists(kernels: str) -> None:
    random = np.random.default_rng(0)
    lists = [np.sort(random.choice(1 << 20, 30000, replace=False)).astype(np.int64) for _ in range(3)]
    every, places = compiled.union(lists)
    assert np.array_equal(every, np.unique(np.concatenate(lists)))
    assert all(np.array_equal(every[at], one) for one, at in zip(lists, places, strict=True))


DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16, "float64": np.float64}


def _any_bits(random: np.random.Generator, dtype: str, size: int) -> Array:
    """Values of every kind, infinities, NaN and zeros of both signs among them."""
    kind = np.dtype(DTYPES[dtype])
    usual = random.standard_normal(size).astype(kind)
    wild = random.integers(0, 256, size * kind.itemsize, np.uint8).view(kind)
    odd = np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1.0, -1.0]).astype(kind)
    return np.where(
        random.random(size) < 0.3, wild, np.where(random.random(size) < 0.3, np.resize(odd, size), usual)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.7, 1.0, -3.0, None])
def test_mixed_is_what_an_adapter_makes_of_its_entries(kernels: str, dtype: str, factor: float | None) -> None:
    random = np.random.default_rng(1)
    target, own = (_any_bits(random, dtype, 5000) for _ in range(2))
    work = np.float64 if dtype == "float64" else np.float32
    factors = np.full(1, factor, work) if factor is not None else random.choice(np.array([0.5, 1, 2], work), 5000)
    found = compiled.mixed(target, own, factors)
    indices = np.arange(5000)
    for one in {1.0, 0.5, 2.0} if factor is None else {factor}:
        at = indices if factor is not None else np.flatnonzero(factors == one)
        tensor = SparseTensor("w", (at.size,), np.arange(at.size), target[at], base=own[at])
        expected = tensor.applied(own[at], one)
        assert as_bytes(found[at]).tobytes() == as_bytes(expected).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("several", [False, True])
def test_laying(kernels: str, dtype: str, several: bool) -> None:
    random = np.random.default_rng(2)
    size, count = 3000, 1000
    truth = _any_bits(random, dtype, size)
    values, base = np.zeros(size, truth.dtype), np.zeros(size, truth.dtype)
    known, times = np.zeros(size, bool), np.zeros(size, np.int32)
    expected, counted, seen = np.zeros(size, truth.dtype), np.zeros(size, np.int32), np.zeros(size, bool)
    for _ in range(3):
        at = np.sort(random.choice(size, count, replace=False)).astype(np.int64)
        new = _any_bits(random, dtype, count)
        factors = random.choice([0.0, 0.5], count).astype(np.float32) if several else np.full(1, 0.5, np.float32)
        assert compiled.scatter(at, new, truth[at], factors, values, base, known, times) == -1
        laid = np.flatnonzero(np.broadcast_to(factors, count))
        expected[at[laid]], seen[at] = new[laid], True
        counted[at[laid]] += 1
    assert as_bytes(values).tobytes() == as_bytes(expected).tobytes()
    assert as_bytes(base[seen]).tobytes() == as_bytes(truth[seen]).tobytes()
    assert np.array_equal(known, seen)
    assert np.array_equal(times, counted)
    other = truth[at].copy()
    other.view(np.uint8)[:1] ^= 1
    assert compiled.scatter(at, new, other, factors, values, base, known, times) == 0


OUTSIDE = {"before": [-1, 3], "at the end": [3, 20], "far": [0, 2**40], "only one": [25]}


@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_outside_an_array(kernels: str, case: str, dtype: str) -> None:
    """The array lies between canaries, which a write to these indices, or to some of them, would hit."""
    memory = np.ones(60, DTYPES[dtype])
    flat, before = memory[20:40], memory.copy()
    bad, good = np.array(OUTSIDE[case], np.int64), np.array([1, 4], np.int64)
    values, some = np.zeros(bad.size, flat.dtype), np.zeros(2, flat.dtype)
    known, count = np.zeros(20, bool), np.zeros(20, np.int32)
    factor = np.ones(1, np.float32)
    for write in (
        lambda: compiled.put(flat, bad, values),
        lambda: compiled.take(flat, bad),
        lambda: compiled.exchange(flat, bad, values, good, some),
        lambda: compiled.exchange(flat, good, some, bad, values),
        lambda: compiled.scatter(bad, values, values, factor, flat, flat.copy(), known, count),
    ):
        with pytest.raises(FormatError, match="for 20 elements") as caught:
            write()
        assert caught.value.rule == "out-of-range"
    assert as_bytes(memory).tobytes() == as_bytes(before).tobytes()
    assert not known.any()


def test_the_number_of_values_is_that_of_the_indices(kernels: str) -> None:
    flat, at, none = np.ones(20, np.float32), np.array([1, 4], np.int64), np.empty(0, np.int64)
    short, two = np.zeros(1, np.float32), np.zeros(2, np.float32)
    known, count, factor = np.zeros(20, bool), np.zeros(20, np.int32), np.ones(1, np.float32)
    for write in (
        lambda: compiled.put(flat, at, short),
        lambda: compiled.exchange(flat, at, short, none, short[:0]),
        lambda: compiled.exchange(flat, at, two, at, short),
        lambda: compiled.overlay(short, at, at, two),
        lambda: compiled.overlay(two, at, at, short),
        lambda: compiled.mixed(two, short, np.float32([0.5])),
        lambda: compiled.mixed(two, two, np.float32([0.5, 1, 2])),
        lambda: compiled.scatter(at, two, short, factor, flat, flat.copy(), known, count),
        lambda: compiled.scatter(at, two, two, factor, flat, flat[:9].copy(), known, count),
    ):
        with pytest.raises(FormatError, match="values for") as caught:
            write()
        assert caught.value.rule == "count-mismatch"
    assert (flat == 1).all()


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_indices_that_change_after_their_check(kernels: str, make: Any) -> None:
    indices, guarded = make([1, 4, 7]), np.zeros(60, np.float32)
    weight = guarded[20:30]
    tensor = SparseTensor("w", (10,), indices, np.ones(3, np.float32), base=weight[[1, 4, 7]])
    indices[:] = make([-15, 4, 35])
    assert tensor.indices.tolist() == [1, 4, 7]
    with pytest.raises(ValueError, match="read-only"):
        tensor.indices[0] = 3
    switcher = Switcher({"w": weight})
    switcher.load(Adapter([tensor]))
    assert np.flatnonzero(guarded).tolist() == [21, 24, 27]
    switcher.revert()
    assert not guarded.any()


@pytest.mark.parametrize("weight", [np.ones((4, 5), np.float32), np.ones((5, 4), np.float32).T])
def test_a_live_weight_is_not_written_outside(kernels: str, weight: Array) -> None:
    for live in (ArrayWeight(weight), DeviceWeight(torch.from_numpy(weight))):
        for bad in OUTSIDE.values():
            with pytest.raises(FormatError, match="for 20 elements"):
                live.put(np.array(bad), np.zeros(len(bad), np.float32))
            with pytest.raises(FormatError, match="for 20 elements"):
                live.get(np.array(bad))
        with pytest.raises(FormatError, match="1 values for 2 entries"):
            live.put(np.array([0, 2]), np.zeros(1, np.float32))
        with pytest.raises(BaseMismatch, match=r"values of shape \[5\] for a weight of \[4, 5\]"):
            live.fill(np.zeros(5, np.float32))
    assert (weight == 1).all()
