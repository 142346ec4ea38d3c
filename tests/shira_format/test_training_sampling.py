"""Entries of a product: by our compiled loops and by torch, in every dtype."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_format.training import sampling
from shira_format.training.sampling import is_compiled, multiplied, sampled_product

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def case(tokens: int, m: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    draws = torch.Generator().manual_seed(seed)
    outer = torch.randn(tokens, m, generator=draws).to(dtype)
    inner = torch.randn(tokens, n, generator=draws).to(dtype)
    chosen = torch.rand(m, n, generator=draws) < 0.2
    starts = torch.zeros(m + 1, dtype=torch.int32)
    starts[1:] = chosen.sum(1).cumsum(0)
    places = chosen.nonzero()[:, 1].to(torch.int32)
    expected = (outer.double().t() @ inner.double())[chosen]
    return outer, inner, starts, places, expected


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With our compiled loops, and as if numba were not installed."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "_kernel", False)
    assert (request.param == "compiled") == is_compiled(torch.device("cpu"), torch.float32)
    return str(request.param)


def close(found: torch.Tensor, expected: torch.Tensor, tokens: int, dtype: torch.dtype) -> bool:
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = {torch.float64: 1e-13}.get(dtype, 2e-6) * max(tokens, 1)
    return len(expected) == len(found) and bool((found.double() - expected).abs().max() <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "m", "n"), [(1, 1, 40), (128, 16, 16), (300, 17, 33), (257, 300, 5), (20, 3, 700)]
)
def test_it_is_the_dense_one_at_the_entries(way: str, tokens: int, m: int, n: int, dtype: torch.dtype) -> None:
    outer, inner, starts, places, expected = case(tokens, m, n, dtype)
    assert close(sampled_product(outer, inner, starts, places), expected, tokens, dtype)
    # Views, and indices of 64 bits.
    wide = torch.randn(tokens, 2 * m).to(dtype)
    wide[:, ::2] = outer
    strided = inner.t().contiguous().t()
    assert close(sampled_product(wide[:, ::2], strided, starts.long(), places.long()), expected, tokens, dtype)


@given(st.integers(1, 280), st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 9))
@settings(max_examples=60)
def test_any_size(tokens: int, m: int, n: int, dtype: torch.dtype, seed: int) -> None:
    outer, inner, starts, places, expected = case(tokens, m, n, dtype, seed)
    if len(places):
        assert close(sampled_product(outer, inner, starts, places), expected, tokens, dtype)


def test_threads_change_nothing() -> None:
    outer, inner, starts, places, _ = case(1000, 40, 50, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(sampled_product(outer, inner, starts, places))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def _in_a_fork(queue: Any) -> None:
    torch.set_num_threads(1)
    outer, inner, starts, places, expected = case(400, 8, 8, torch.float32)
    with sampling._loading:  # noqa: SLF001 - the lock is free
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        queue.put(close(sampled_product(outer, inner, starts, places), expected, 400, torch.float32))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_after_a_fork() -> None:
    """The pool of threads is made anew: that of the parent does not run."""
    assert is_compiled(torch.device("cpu"), torch.float32)
    sampling._pool().submit(int).result()  # noqa: SLF001
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=60)
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_without_instructions_are_multiplied_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    monkeypatch.setattr(sampling, "_IN_FLOAT32", (torch.bfloat16, torch.float16))
    found = multiplied(one, other)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = one.double() @ other.double()
    np.testing.assert_allclose(found.double().numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sampling, "_IN_FLOAT32", ())
    assert multiplied(one, other).dtype == dtype
