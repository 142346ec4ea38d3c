"""Weights that are resized or replaced while they are under training: refused, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shira_format.errors import BaseMismatch, SourceError
from shira_format.training.hook import attach
from shira_format.training.sparse import resume, sparse_parameters
from tests import models

WAYS: dict[str, Callable[..., Any]] = {"sparse_parameters": sparse_parameters, "attach": attach}


def started(way: str) -> tuple[nn.Module, nn.Parameter, Any, Callable[[], None]]:
    """A model after a step; its weight under training; the training; another step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 5), nn.Linear(5, 5))
    weight = model[0].weight
    training = WAYS[way](model, {"0.weight": np.arange(0, 40, 3)})
    optimizer = torch.optim.AdamW(training.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.tensor([1, 2, 3])).sum().backward()
        optimizer.step()

    step()
    return model, weight, training, step


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fewer rows": lambda data: data[:2],
    "more rows": lambda data: torch.cat([data, data[:2]]),
    "fewer columns": lambda data: data[:, :4],
    "more columns": lambda data: torch.cat([data, data], 1),
    "transposed": lambda data: data.t(),
    "transposed and copied": lambda data: data.t().contiguous(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_resized_is_not_written(way: str, change: str) -> None:
    _, weight, training, step = started(way)
    weight.data = CHANGES[change](weight.data)
    before = weight.detach().clone()
    for use in (
        training.show_base,
        training.show_trained,
        training.adapter,
        lambda: training.detach(restore=True),
        step,
    ):
        if way == "attach" and use in (step, training.show_trained):
            continue  # the module's own error comes first; the weight has the trained values
        with pytest.raises(BaseMismatch, match=r"'0.weight': the weight of \[8, 5\] became .* under training"):
            use()
        assert torch.equal(before, weight)


def test_an_embedding_of_transformers_that_is_resized() -> None:
    model = models.gpt2()
    name = "transformer.wte.weight"
    size = model.transformer.wte.weight.numel()
    training = attach(model, {name: np.arange(0, size, 7)})
    model.resize_token_embeddings(model.config.vocab_size - 3)
    with pytest.raises(BaseMismatch, match=rf"{name}': the (weight of .* became|module .* was replaced)"):
        training.adapter()


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_whose_memory_was_released(way: str) -> None:
    """As sharding and offloading do."""
    _, weight, training, _ = started(way)
    weight.untyped_storage().resize_(0)
    for use in (
        training.show_base,
        training.show_trained,
        training.adapter,
        lambda: training.detach(restore=True),
    ):
        if way == "attach" and use == training.show_trained:
            continue  # the weight has the trained values
        if way == "sparse_parameters" and use == training.adapter:
            continue  # the values have memory of their own
        with pytest.raises(BaseMismatch, match="'0.weight': the memory of the weight was released"):
            use()
    model = nn.Sequential(nn.Embedding(8, 5), nn.Linear(5, 5))
    model[0].weight.untyped_storage().resize_(0)
    with pytest.raises(BaseMismatch, match="'0.weight': the memory of the weight was released"):
        WAYS[way](model, {"0.weight": np.arange(0, 40, 3)})


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_is_replaced(way: str) -> None:
    """What is trained on is not in the model any more."""
    model, _, training, _ = started(way)
    model[0] = nn.Embedding(8, 5)
    with pytest.raises(BaseMismatch, match="'0.weight': the module under training was replaced"):
        training.adapter()


class _Failing(torch.optim.SGD):
    def step(self, *_: Any) -> None:  # type: ignore[override]
        raise ZeroDivisionError


def test_a_step_that_fails_half_way() -> None:
    model, weight, training, _ = started("attach")
    optimizer = _Failing(training.parameters(), lr=0.1)
    model(torch.tensor([1])).sum().backward()
    before = weight.detach().clone()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert (14,) == tuple(weight.shape)  # the entries alone, as the optimizer sees it
    assert 14 == training.adapter()["0.weight"].nnz
    assert torch.equal(before, weight)


def test_a_state_of_other_sizes(tmp_path: Path) -> None:
    model, _, training, _ = started("sparse_parameters")
    path = tmp_path / "a.st"
    training.save_state(path)
    training.detach(restore=True)
    state = torch.load(f"{path}.state", weights_only=True)
    state["weights"]["0.weight"]["parts"]["values"] = torch.ones(1)  # a copy would repeat it
    torch.save(state, f"{path}.state")
    with pytest.raises(SourceError, match=r"the state has \[1\] values for \[14\] of 0.weight"):
        resume(model, path)
