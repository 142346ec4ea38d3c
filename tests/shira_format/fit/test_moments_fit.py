"""Fits from moments: exact budgets, the model as it was, and as good as theory says."""

from __future__ import annotations

import pytest
import torch

from shira_format.convert.fit import moments as fit
from shira_format.convert.fit.moments import moments
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.support import largest, update_of
from shira_format.convert.fit.task import Task
from tests import fits


def plain(task: Task, budget: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The largest changes at one density."""
    found = {}
    for name, count in fit.shares_of(task, budget).items():
        at = largest({name: update_of(task, name).abs_()}, count)[name]
        found[name] = (at, task.source[name].reshape(-1)[at])
    return found


@pytest.mark.parametrize("kind", ["net", "bert", "llama", "gpt2"])
def test_it_is_nearer_than_the_largest_changes(kind: str) -> None:
    task = fits.net_task() if kind == "net" else fits.model_task(kind)
    before = fits.state(task.model)
    budget = task.numel // 10
    steps = []
    found = moments(task, budget, on_step=lambda *step: steps.append(step))
    assert sum(len(at) for at, _ in found.values()) == budget
    for name, (at, values) in found.items():
        assert at.dtype == torch.int64 and (at.diff() > 0).all() and len(at) == len(values)
        assert at[-1] < task.source[name].numel()
    assert effect(task, found).r2 > effect(task, plain(task, budget)).r2 + 0.1
    assert [step for _, step, _ in steps] == list(range(1, len(steps) + 1)) and {one for one, _, _ in steps} == {
        len(steps)
    }
    assert fits.same_state(task.model, before)
