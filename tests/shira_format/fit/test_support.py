"""Supports: exactly the largest scores of all tensors together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira_format.convert.fit.support import RULES, largest, scores
from shira_format.convert.fit.task import showing_base, showing_source
from shira_format.errors import SourceError
from tests import fits

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def drawn(sizes: list[int], levels: int, seed: int) -> dict[str, torch.Tensor]:
    """Scores with ties."""
    random = np.random.default_rng(seed)
    return {
        str(n): torch.from_numpy(random.integers(levels, size=size).astype(np.float32))
        for n, size in enumerate(sizes)
    }


@given(SIZES, st.integers(1, 50), st.integers(0, 99), st.data())
def test_the_largest_of_all(sizes: list[int], levels: int, seed: int, data: st.DataObject) -> None:
    found = drawn(sizes, levels, seed)
    budget = data.draw(st.integers(1, sum(sizes)))
    chosen = largest(found, budget)
    flat = np.concatenate([one.numpy() for one in found.values()])
    starts = dict(zip(found, np.cumsum([0, *sizes]), strict=False))
    places = np.concatenate([at.numpy() + starts[name] for name, at in chosen.items()])
    expected = np.sort(np.argsort(-flat, kind="stable")[:budget])
    assert np.array_equal(np.sort(places), expected)


@given(SIZES, st.integers(1, 50), st.integers(2, 16), st.integers(0, 99), st.data())
def test_runs_are_whole_but_for_the_last(
    sizes: list[int], levels: int, run: int, seed: int, data: st.DataObject
) -> None:
    found = drawn(sizes, levels, seed)
    budget = data.draw(st.integers(1, sum(sizes)))
    chosen = largest(found, budget, run=run)
    assert sum(len(at) for at in chosen.values()) == budget
    cut = 0
    for name, at in chosen.items():
        assert (at.diff() > 0).all() and at[-1] < len(found[name])
        for number in (at // run).unique().tolist():
            whole = min(run, len(found[name]) - number * run)
            here = at[at // run == number]
            cut += len(here) < whole
            assert here.tolist() == list(range(number * run, number * run + len(here)))
    assert cut <= 1


def test_a_budget_beyond_the_weights_is_refused() -> None:
    with pytest.raises(SourceError, match="budget of 5 entries; the weights have 4"):
        largest({"a": torch.ones(4)}, 5)


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    task = fits.net_task()
    with showing_source(task), torch.no_grad():
        want = [task.model(x) for x in task.train]

    def loss(model: torch.nn.Module, number: int) -> torch.Tensor:
        return (model(task.train[number]) - want[number]).square().mean()

    before = fits.state(task.model)
    found = scores(task, rule, [0, 1, 2], loss, seed=4)
    assert fits.same_state(task.model, before)
    assert found.keys() == task.source.keys()
    with showing_base(task):
        gradients = []
        for number in range(3):
            task.model.zero_grad()
            loss(task.model, number).backward()
            gradients.append({name: task.parameter(name).grad.clone().reshape(-1) for name in task.source})
        task.model.zero_grad()
    for name, weight in task.source.items():
        update = (weight - before[name]).reshape(-1)
        total = sum(one[name] for one in gradients)
        expected = {
            "gradient": total.abs(),
            "product": (total * update).abs(),
            "fisher": sum(one[name].square() for one in gradients),
            "magnitude": update.abs(),
            "wm": before[name].reshape(-1).abs(),
        }
        if rule == "random":
            assert ((found[name] >= 0) & (found[name] < 1)).all()
        else:
            assert torch.allclose(found[name], expected[rule], rtol=1e-4, atol=1e-9)


def test_random_is_drawn_by_the_seed() -> None:
    task = fits.net_task()
    first, again, other = (scores(task, "random", [], lambda *_: None, seed=s)["square.weight"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="no rule is named 'best'"):
        scores(task, "best", [], lambda *_: None, seed=0)
