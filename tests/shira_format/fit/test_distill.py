"""Distillation: exact budgets, better than the start, the same each time, and the model as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shira_format.convert.fit import distill as distillation
from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.support import RULES
from shira_format.convert.fit.task import Task
from shira_format.errors import SourceError
from tests import fits

QUICK = Distillation(steps=40, learning_rate=0.02)


def plain(task: Task, budget: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The largest changes of all."""
    options = Distillation(steps=0, rule="magnitude", wide=1)
    return distill(task, budget, options=options)


@pytest.mark.parametrize("kind", ["net", "bert", "llama", "gpt2"])
def test_it_is_nearer_than_the_largest_changes(kind: str) -> None:
    task = fits.net_task() if kind == "net" else fits.model_task(kind)
    before = fits.state(task.model)
    needed = {name: parameter.requires_grad for name, parameter in task.model.named_parameters()}
    budget = task.numel // 10
    steps = []
    found = distill(task, budget, seed=1, options=QUICK, on_step=lambda *step: steps.append(step))
    assert sum(len(at) for at, _ in found.values()) == budget
    for name, (at, values) in found.items():
        assert at.dtype == torch.int64 and (at.diff() > 0).all() and len(at) == len(values)
        assert at[-1] < task.source[name].numel()
    assert effect(task, found).r2 > max(0.0, effect(task, plain(task, budget)).r2) + 0.1
    assert [step for _, step, _ in steps] == list(range(1, 41)) and {count for count, _, _ in steps} == {40}
    assert fits.same_state(task.model, before)
    assert needed == {name: parameter.requires_grad for name, parameter in task.model.named_parameters()}
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again = (distill(fits.net_task(), 300, seed=5, options=QUICK) for _ in range(2))
    assert first.keys() == again.keys()
    for name, (at, values) in first.items():
        assert torch.equal(at, again[name][0]) and torch.equal(values, again[name][1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("run", [1, 16])
def test_every_rule_and_runs(rule: str, run: int) -> None:
    task = fits.net_task()
    found = distill(task, 200, options=replace(QUICK, steps=12, rule=rule, run=run, wide=3.0, stages=3))
    assert sum(len(at) for at, _ in found.values()) == 200


def test_entries_are_exchanged_for_better_ones() -> None:
    task = fits.net_task()
    before = fits.state(task.model)
    start = distill(task, 200, options=replace(QUICK, steps=0, rule="random", wide=1))
    options = replace(QUICK, wide=1, rule="random")
    stays = distill(task, 200, options=options)
    found = distill(task, 200, options=replace(options, rule="product", start=start, regrow=0.2, regrowths=3))
    again = distill(task, 200, options=replace(options, rule="product", start=start, regrow=0.2, regrowths=3))
    for name, (at, values) in found.items():
        assert (at.diff() > 0).all() and torch.equal(at, again[name][0]) and torch.equal(values, again[name][1])
    assert sum(len(at) for at, _ in found.values()) == 200
    left = sum(len(set(at.tolist()) & set(found[name][0].tolist())) for name, (at, _) in start.items())
    assert 200 - 3 * 40 <= left < 200 - 40
    assert effect(task, found).r2 > effect(task, stays).r2
    assert fits.same_state(task.model, before)


def test_it_goes_on_from_other_entries() -> None:
    task = fits.net_task()
    start = plain(task, 250)
    found = distill(task, 250, options=replace(QUICK, start=start))
    assert all(torch.equal(at, start[name][0]) for name, (at, _) in found.items())
    assert effect(task, found).r2 > effect(task, start).r2


def test_fewer_entries_to_start_from_are_filled_up() -> None:
    task = fits.net_task()
    start = plain(task, 50)
    found = distill(task, 250, options=replace(QUICK, start=start))
    assert sum(len(at) for at, _ in found.values()) == 250
    for name, (at, _) in start.items():
        assert set(at.tolist()) <= set(found[name][0].tolist())
    still = distill(
        task,
        250,
        options=replace(QUICK, steps=0, start={"square.weight": (torch.tensor([5]), torch.tensor([9.0]))}),
    )
    at, values = still["square.weight"]
    assert float(values[at == 5]) == 9


def test_more_entries_to_start_from_are_dropped() -> None:
    task = fits.net_task()
    start = plain(task, 500)
    found = distill(task, 250, options=replace(QUICK, start=start))
    assert sum(len(at) for at, _ in found.values()) == 250
    for name, (at, _) in found.items():
        assert set(at.tolist()) <= set(start[name][0].tolist())


def test_sources_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = distill(fits.model_task("bert"), 300, options=QUICK)
    monkeypatch.setattr(distillation, "KEPT", 0)
    again = distill(fits.model_task("bert"), 300, options=QUICK)
    for name, (at, values) in kept.items():
        assert torch.equal(at, again[name][0]) and torch.equal(values, again[name][1])


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    task = fits.net_task()
    before = fits.state(task.model)

    def stop(_: int, step: int, __: float) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(task, 200, options=QUICK, on_step=stop)
    assert fits.same_state(task.model, before)
    assert type(task.model.get_submodule("square")) is torch.nn.Linear


def test_a_loss_that_is_no_number_is_told() -> None:
    with pytest.raises(SourceError, match="the loss is .* at step"):
        distill(fits.net_task(), 200, options=replace(QUICK, learning_rate=1e30, steps=60))


def test_a_source_that_does_nothing_is_told() -> None:
    task = fits.net_task()
    task.source = {name: task.parameter(name).detach().clone() for name in task.source}
    with pytest.raises(SourceError, match="nothing to fit"):
        distill(task, 10, options=QUICK)
