"""Fits from moments: exact budgets, the model as it was, and as good as theory says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shira_format.convert.fit import moments as fit
from shira_format.convert.fit.moments import Reconstruction, moments
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.support import largest, update_of
from shira_format.convert.fit.task import Task, blocks_of, showing_base
from shira_format.convert.fit.walk import find_path, layers_of, without_cache
from shira_format.errors import SourceError
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


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_blocks_that_run_alone_give_what_the_whole_model_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = fits.model_task(kind)
    with torch.no_grad(), without_cache(task.model):
        found = find_path(task, layers_of(task))
    assert [segment.block is not None for segment in found.segments] == [True, True]
    assert getattr(task.model.config, "use_cache", None) == getattr(
        fits.model_task(kind).model.config, "use_cache", None
    )
    blocks = moments(task, 500)
    monkeypatch.setattr(fit, "KEPT", 1)  # a group of layers at a time
    parts = moments(task, 500)
    task.layers = ()
    whole = moments(task, 500)
    for name, (at, values) in blocks.items():
        assert torch.equal(at, parts[name][0]) and torch.equal(values, parts[name][1])
        assert torch.equal(at, whole[name][0])
        torch.testing.assert_close(values, whole[name][1])


def test_it_is_the_same_each_time() -> None:
    first, again = (moments(fits.model_task("bert"), 300, seed=seed) for seed in (0, 1))
    assert first.keys() == again.keys()
    for name, (at, values) in first.items():
        assert torch.equal(at, again[name][0]) and torch.equal(values, again[name][1])


def one_layer(layer: nn.Module, inputs: torch.Tensor, scale: float = 0.1, seed: int = 0) -> Task:
    """A model of one layer, all of whose weight changes."""
    model = nn.Sequential(layer).eval()
    draw = torch.Generator().manual_seed(seed)
    weight = model.get_parameter("0.weight").detach()
    source = {"0.weight": weight + scale * torch.randn(weight.shape, generator=draw)}
    return Task(model, source, {}, list(inputs.split(16)), list(inputs.split(16)), lambda z, _: z.flatten(1))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (12,)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, padding=2, groups=8), (8, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_all_entries_of_a_layer_are_the_source(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    task = one_layer(make(), torch.randn(48, *shape))
    found = moments(task, task.numel, options=Reconstruction(ridge=1e-7))
    torch.testing.assert_close(found["0.weight"][1], task.source["0.weight"].reshape(-1), rtol=1e-3, atol=1e-4)
    half = effect(task, moments(task, task.numel // 2, options=Reconstruction(ridge=1e-7)))
    assert effect(task, plain(task, task.numel // 2)).r2 <= half.r2 < 1


@given(st.integers(0, 1000), st.floats(0.02, 0.9), st.sampled_from([1e-6, 1e-2]))
@settings(deadline=None, max_examples=25)
def test_never_worse_than_the_plain_cut_of_a_layer(seed: int, density: float, ridge: float) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(48, 12) @ torch.randn(12, 12)
    task = one_layer(nn.Linear(12, 7), inputs, seed=seed)
    budget = max(1, int(density * task.numel))
    asked = inputs @ update_of(task, "0.weight").view(7, 12).T

    def missed(found: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
        at, values = found["0.weight"]
        change = torch.zeros(84).index_put((at,), values - task.parameter("0.weight").detach().view(-1)[at])
        error = (inputs @ change.view(7, 12).T - asked).square().sum()
        return float(error + ridge * inputs.square().sum() / 12 * change.square().sum())

    assert (
        missed(moments(task, budget, options=Reconstruction(ridge=ridge)))
        <= missed(plain(task, budget)) * 1.001 + 1e-4
    )


def test_least_squares_of_one_output() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 6) @ torch.randn(6, 6)
    task = one_layer(nn.Linear(6, 1), inputs)
    at, values = moments(task, 3, options=Reconstruction(ridge=1e-7, rounds=3))["0.weight"]
    asked = inputs.double() @ update_of(task, "0.weight").double()
    best = np.linalg.lstsq(inputs[:, at].double().numpy(), asked.numpy(), rcond=None)[0]
    change = values - task.parameter("0.weight").detach()[0, at]
    np.testing.assert_allclose(change.numpy(), best, rtol=1e-3)


def test_errors_of_a_layer_are_made_up_for_in_the_next() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 4)).eval()
    source = {f"{n}.weight": model[n].weight.detach() + 0.2 * torch.randn_like(model[n].weight) for n in (0, 1)}
    inputs = torch.randn(64, 10)
    task = Task(model, source, {}, [inputs], [inputs], lambda z, _: z)
    found = moments(task, 60)
    alone = dict(found)
    with showing_base(task):  # the last layer, fitted to the source's own inputs
        hidden = inputs @ source["0.weight"].T + model[0].bias.detach()
        last = Task(nn.Sequential(model[1]), {"0.weight": source["1.weight"]}, {}, [hidden], [], lambda z, _: z)
        alone["1.weight"] = moments(last, len(found["1.weight"][0]))["0.weight"]
    assert effect(task, found).r2 > effect(task, alone).r2 + 0.02


class Mixed(nn.Module):
    """Layers of all kinds that a fit meets: an embedding, experts that inputs choose, one that is called twice, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.twice = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n]`` to ``[n, 8]``."""
        x = self.embedding(ids)
        chosen, y = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = torch.tanh(expert(x[chosen == number]))
        return torch.tanh(self.twice(torch.tanh(self.twice(y))))


def mixed_task(scale: float = 0.3) -> Task:
    torch.manual_seed(5)
    model = Mixed().eval()
    source = {
        name: parameter.detach() + scale * torch.randn_like(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }
    ids = torch.randint(0, 20, (96,))
    return Task(
        model,
        source,
        {},
        list(ids[:64].split(16)),
        list(ids[64:].split(16)),
        lambda z, _: z,
        layers=blocks_of(model),
    )


def test_embeddings_experts_and_layers_that_are_called_twice_or_never() -> None:
    task = mixed_task()
    before = fits.state(task.model)
    budget = task.numel // 2
    found, cut = moments(task, budget), plain(task, budget)
    assert sum(len(at) for at, _ in found.values()) == budget and found.keys() == task.source.keys()
    for name in ("embedding.weight", "unused.weight"):
        assert torch.equal(found[name][0], cut[name][0]) and torch.equal(found[name][1], cut[name][1])
    task.layers = ()  # the experts' outputs cannot be compared, since the inputs that choose them change
    assert effect(task, found).r2 > effect(task, cut).r2
    assert fits.same_state(task.model, before)


def test_wide_layers_are_fitted_in_the_columns_that_gain_most() -> None:
    task = fits.net_task()
    found = moments(task, 400, options=Reconstruction(widest=20))
    assert sum(len(at) for at, _ in found.values()) == 400
    for name in ("wide.weight", "square.weight", "head.weight"):
        width = task.source[name].shape[1]
        assert len((found[name][0] % width).unique()) <= 20
    assert effect(task, found).r2 > effect(task, plain(task, 400)).r2
    many = moments(task, task.numel * 9 // 10, options=Reconstruction(widest=20))
    assert sum(len(at) for at, _ in many.values()) == task.numel * 9 // 10


def test_the_model_is_as_before_after_an_interrupt_and_in_its_mode() -> None:
    task = fits.model_task("llama")
    task.model.train()
    before = fits.state(task.model)

    def stop(_: int, step: int, __: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moments(task, 200, on_step=stop)
    assert fits.same_state(task.model, before) and task.model.training and task.model.config.use_cache
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.model.modules())


def test_what_cannot_be_fitted_is_told() -> None:
    task = fits.net_task()
    for budget in (0, task.numel + 1):
        with pytest.raises(SourceError, match=f"a budget of {budget} entries"):
            moments(task, budget)
    task.train[0][0, 0] = float("nan")
    with pytest.raises(SourceError, match="NaN or infinite"):
        moments(task, 100)


def test_weights_of_half_precision_see_the_values_that_a_file_gives_back() -> None:
    task = fits.model_task("llama")
    task.model.to(torch.bfloat16)
    task.source = {name: weight.bfloat16() for name, weight in task.source.items()}
    budget = task.numel // 10
    assert effect(task, moments(task, budget)).r2 > effect(task, plain(task, budget)).r2
