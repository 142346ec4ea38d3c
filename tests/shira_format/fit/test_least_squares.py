"""Sparse least squares: exact on a support, as good as the best where that is known, and of the asked size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira_format.convert.fit.least_squares import Problem, Solution, grow, solve


def problem(
    groups: int, rows: int, width: int, seed: int, inputs: int = 200
) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """A problem in float64, with its inputs ``[inputs, groups, width]`` and targets ``[inputs, groups, rows]``."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, width, width, generator=draw, dtype=torch.float64)
    x = torch.einsum("ngw,gwv->ngv", torch.randn(inputs, groups, width, generator=draw, dtype=torch.float64), mix)
    t = torch.randn(inputs, groups, rows, generator=draw, dtype=torch.float64)
    return Problem(torch.einsum("ngw,ngv->gwv", x, x), torch.einsum("ngr,ngw->grw", t, x)), x, t


def error(found: Solution, x: torch.Tensor, t: torch.Tensor) -> float:
    return float((torch.einsum("ngw,grw->ngr", x, found.change) - t).square().sum())


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 100), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_values_are_numpys_least_squares(groups: int, rows: int, width: int, seed: int, share: float) -> None:
    given, x, t = problem(groups, rows, width, seed)
    support = torch.rand(groups, rows, width, generator=torch.Generator().manual_seed(seed)) < share
    found = solve(given, support)
    assert not found.change[~support].any()
    for g in range(groups):
        for r in range(rows):
            at = support[g, r].nonzero()[:, 0]
            if len(at):
                best = np.linalg.lstsq(x[:, g, at].numpy(), t[:, g, r].numpy(), rcond=None)[0]
                np.testing.assert_allclose(found.change[g, r, at].numpy(), best, rtol=1e-6, atol=1e-9)
    gained = float(t.square().sum()) - error(found, x, t)
    assert given.gained(found.change) == pytest.approx(gained, rel=1e-6, abs=1e-6)


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_as_many_entries_as_asked_for(
    groups: int, rows: int, width: int, rounds: int, share: float, seed: int
) -> None:
    given, x, t = problem(groups, rows, width, seed)
    budget = max(1, round(share * groups * rows * width))
    found = grow(given, budget, rounds=rounds)
    assert int(found.support.sum()) == budget
    assert error(found, x, t) <= float(t.square().sum()) * (1 + 1e-9)
    again = solve(given, found.support)
    torch.testing.assert_close(again.change, found.change)


def test_a_change_that_is_sparse_is_found() -> None:
    given, x, _ = problem(1, 8, 30, 3)
    draw = torch.Generator().manual_seed(4)
    true = torch.randn(1, 8, 30, generator=draw, dtype=torch.float64)
    true *= torch.rand(1, 8, 30, generator=draw) < 0.1
    exact = Problem(given.gram, true @ given.gram)
    found = grow(exact, int((true != 0).sum()), rounds=int((true != 0).sum()))
    torch.testing.assert_close(found.change, true)


def test_uncorrelated_inputs_give_the_largest_gains() -> None:
    scales = torch.tensor([1.0, 5.0, 2.0, 0.5])
    update = torch.tensor([[[3.0, 0.5, -1.0, 4.0], [0.1, -1.0, 2.0, 1.0]]])
    gram = torch.diag(scales**2)[None]
    found = grow(Problem(gram, update @ gram), 3, rounds=3)
    gains = (update * scales).square().view(-1)
    assert set(found.support.view(-1).nonzero()[:, 0].tolist()) == set(gains.topk(3).indices.tolist())
    torch.testing.assert_close(found.change, update * found.support)


def test_the_second_entry_is_the_best_beside_the_first() -> None:
    given, x, t = problem(1, 1, 10, 5)
    first = grow(given, 1, rounds=1).support
    beside = []
    for at in range(10):
        support = first.clone()
        support[0, 0, at] = True
        beside.append(error(solve(given, support), x, t))
    assert error(grow(given, 2, rounds=2), x, t) == pytest.approx(min(beside))
    alone = [error(solve(given, torch.eye(10, dtype=torch.bool)[None, None, at]), x, t) for at in range(10)]
    assert error(grow(given, 1, rounds=1), x, t) == pytest.approx(min(alone))


def test_rows_of_different_sizes_are_solved_alike() -> None:
    given, x, t = problem(2, 5, 40, 6)
    support = torch.zeros(2, 5, 40, dtype=torch.bool)
    for number in range(5):
        support[0, number, : 1 + 9 * number] = True
    support[1, 3] = True
    found = solve(given, support)
    for g, r in support.any(2).nonzero().tolist():
        at = support[g, r].nonzero()[:, 0]
        best = np.linalg.lstsq(x[:, g, at].numpy(), t[:, g, r].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found.change[g, r, at].numpy(), best, rtol=1e-6, atol=1e-9)
