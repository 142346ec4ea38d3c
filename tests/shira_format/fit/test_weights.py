"""Sources whose weights are computed when they are asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from shira_format.convert.fit import weights
from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.moments import moments
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.task import SourceOutputs, Task, showing_source
from tests import fits


def computed(task: Task) -> weights.ComputedWeights:
    found = weights.ComputedWeights()
    for name, weight in task.source.items():
        found.add(name, weight, weight.clone)
    return found


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_they_show_the_same_source(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = fits.model_task(kind)
    kept, measured = SourceOutputs(task, task.train, 1 << 30), effect(task, {})
    monkeypatch.setattr(weights, "KEPT", 0)
    lazy = replace(task, source=computed(task), reference=None)
    again = SourceOutputs(lazy, lazy.train, 1 << 30)
    before = fits.state(task.model)
    for number in range(len(task.train)):
        assert torch.equal(kept[number].outputs, again[number].outputs)
        for one, other in zip(kept[number].hidden, again[number].hidden, strict=True):
            assert torch.equal(one, other)
    assert effect(lazy, {}) == measured
    for fit in (moments, partial(distill, options=Distillation(steps=3))):
        first, second = (fit(one, 100) for one in (task, lazy))
        assert first.keys() == second.keys()
        for name, (at, values) in first.items():
            assert torch.equal(at, second[name][0]) and torch.equal(values, second[name][1])
    assert fits.same_state(task.model, before)


def test_only_the_block_that_runs_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    task = fits.model_task("llama")
    monkeypatch.setattr(weights, "KEPT", 0)
    lazy = replace(task, source=computed(task))
    before = fits.state(task.model)
    assert len(task.layers) > 1
    names = [f"{block}.self_attn.q_proj.weight" for block in task.layers]
    shown: list[list[bool]] = []

    def look(*_: object) -> None:
        shown.append([torch.equal(task.parameter(name), lazy.source[name]) for name in names])

    handles = [task.model.get_submodule(block).self_attn.register_forward_hook(look) for block in task.layers]
    with torch.no_grad(), showing_source(lazy):
        task.model(**task.train[0])
    for handle in handles:
        handle.remove()
    assert shown == [[here == there for there in range(len(names))] for here in range(len(names))]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = task.model.get_submodule(task.layers[0]).self_attn.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt), showing_source(lazy):
        task.model(**task.train[0])
    handle.remove()
    assert fits.same_state(task.model, before)


def test_the_first_that_fit_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    task = fits.net_task()
    sizes = {name: weight.nbytes for name, weight in task.source.items()}
    monkeypatch.setattr(weights, "KEPT", next(iter(sizes.values())))
    found = computed(task)
    first, *others = sizes
    assert found[first] is task.source[first]
    assert all(found[name] is not task.source[name] for name in others)
    assert list(found) == list(sizes) and len(found) == len(sizes) and first in found and "x" not in found
    assert not found.are_kept
