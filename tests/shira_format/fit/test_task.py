"""The live model of a fit: what it shows, and that nothing stays behind; and the measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira_format.convert.fit.outputs import embeddings, logits, states
from shira_format.convert.fit.quality import effect
from shira_format.convert.fit.task import (
    SourceOutputs,
    Task,
    blocks_of,
    inputs_of,
    see,
    showing,
    showing_base,
    showing_source,
)
from shira_format.errors import BaseMismatch, SourceError
from tests import fits, models


def some(task: Task, share: float = 0.2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    found = {}
    for name, weight in task.source.items():
        at = (torch.rand(weight.numel(), generator=draw) < share).nonzero().flatten()
        found[name] = at, weight.reshape(-1)[at]
    return found


@pytest.mark.parametrize("kind", ["net", "bert", "llama", "gpt2"])
def test_the_model_is_restored_bit_for_bit(kind: str) -> None:
    task = fits.net_task() if kind == "net" else fits.model_task(kind)
    before = fits.state(task.model)
    places = {name: parameter.data_ptr() for name, parameter in task.model.named_parameters()}
    entries = some(task)
    with showing_source(task):
        assert torch.equal(task.parameter(next(iter(task.source))), next(iter(task.source.values())))
        with showing(task, entries):
            name, (at, values) = next(iter(entries.items()))
            assert torch.equal(task.parameter(name).detach().reshape(-1)[at], values)
    assert fits.same_state(task.model, before)
    assert places == {name: parameter.data_ptr() for name, parameter in task.model.named_parameters()}


def test_an_exception_restores_the_model_too() -> None:
    task = fits.net_task()
    before = fits.state(task.model)
    with pytest.raises(KeyError), showing(task, some(task)):
        raise KeyError
    assert fits.same_state(task.model, before)


def test_a_weight_that_is_moved_or_resized_as_the_model_runs() -> None:
    task = fits.net_task()
    before = fits.state(task.model)
    name = next(iter(task.source))
    weight = task.parameter(name)
    with showing(task, some(task)):
        weight.data = weight.data.clone()  # as offloading does
    assert fits.same_state(task.model, before)
    with pytest.raises(BaseMismatch, match=rf"{name}': the weight of .* became"), showing(task, some(task)):
        weight.data = weight.data.t().contiguous()[:, :-1]
    assert weight.shape == (weight.shape[0], before[name].shape[0] - 1)


def test_a_weight_that_is_not_contiguous_is_restored() -> None:
    task = fits.net_task()
    weight = task.parameter("square.weight")
    weight.data = weight.data.t().contiguous().t()
    before = weight.detach().clone()
    at = torch.tensor([1, 40, 77])
    with showing(task, {"square.weight": (at, torch.tensor([5.0, 6, 7]))}):
        assert weight.detach().reshape(-1)[at].tolist() == [5, 6, 7]
    assert torch.equal(weight, before)


def test_values_are_rounded_as_they_are_stored() -> None:
    task = fits.net_task()
    task.dtypes = {"square.weight": torch.bfloat16}
    at = torch.tensor([3])
    with showing(task, {"square.weight": (at, torch.tensor([0.1234567]))}):
        assert float(task.parameter("square.weight").detach().reshape(-1)[3]) == float(
            torch.tensor(0.1234567).bfloat16()
        )


def test_whole_tensors_are_in_all_comparisons() -> None:
    task = fits.net_task()
    with showing_base(task):
        assert torch.equal(task.parameter("wide.bias"), task.whole["wide.bias"])
        assert not torch.equal(task.parameter("wide.weight"), task.source["wide.weight"])


def test_r2_is_what_it_says() -> None:
    task = fits.net_task()
    entries = some(task)
    x = torch.cat(list(task.held))
    found = []
    for shown in (showing_base(task), showing_source(task), showing(task, entries)):
        with shown, torch.no_grad():
            found.append(task.model(x))
    base, source, fit = found
    expected = 1 - float((fit - source).square().sum() / (base - source).square().sum())
    measured = effect(task, entries)
    assert measured.r2 == pytest.approx(expected, rel=1e-5)
    assert measured.low <= measured.r2 <= measured.high
    assert measured.inputs == len(x)
    assert measured.cosine == pytest.approx(float(torch.cosine_similarity(fit, source).mean()), rel=1e-5)
    assert effect(task, {}).r2 == pytest.approx(0, abs=1e-6)
    everything = {name: (torch.arange(w.numel()), w.reshape(-1)) for name, w in task.source.items()}
    assert effect(task, everything).r2 == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_language_models_are_measured_without_padding(kind: str) -> None:
    task = fits.model_task(kind)
    entries = some(task)
    measured = effect(task, entries)
    texts = sum(len(batch["input_ids"]) for batch in task.held)
    assert measured.inputs == texts
    assert measured.kl is not None and measured.kl > 0
    assert measured.agreement is not None and 0 <= measured.agreement <= 1
    assert measured.cosine is None
    assert list(measured.layers) == list(task.layers)
    assert all(0 < error < 5 for error in measured.layers.values())
    batch = task.held[0]
    seen = see(task, batch)
    rows = len(batch["input_ids"]) if kind == "bert" else int(batch["attention_mask"].sum())
    assert len(seen.outputs) == rows
    assert len(seen.hidden[0]) == int(batch["attention_mask"].sum())
    # Padding has no part in it: without the padded columns of one text its rows are the same.
    if kind != "bert":
        alone = {key: value[:1, :5] for key, value in batch.items()}
        assert torch.allclose(see(task, alone).outputs, seen.outputs[:5], atol=1e-5)
        assert inputs_of(batch, rows)[:6].tolist() == [0, 0, 0, 0, 0, 1]


def test_the_source_is_kept_as_far_as_memory_allows() -> None:
    task = fits.net_task()
    seen = SourceOutputs(task, task.held, limit=2 * 8 * 6 * 4)
    first = [seen[number] for number in range(4)]
    again = [seen[number] for number in range(4)]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, True, False, False]
    assert all(torch.equal(one.outputs, other.outputs) for one, other in zip(first, again, strict=True))


def test_json_has_no_nan() -> None:
    task = fits.net_task()
    task.whole, task.source = {}, {name: task.parameter(name).detach().clone() for name in task.source}
    found = effect(task, {}).as_dict()
    assert found["r2"] is None  # the source does nothing


@given(st.integers(1, 5), st.integers(1, 6))
def test_rows_belong_to_inputs(count: int, each: int) -> None:
    batch = {"x": torch.zeros(count, 3)}
    assert inputs_of(batch, count * each).tolist() == np.repeat(np.arange(count), each).tolist()


def test_pooling_is_that_of_sentence_transformers() -> None:
    batch = fits.tokens(1)[0]
    model = models.bert().bert
    with torch.no_grad():
        output = model(**batch)
    pooled = embeddings(output, batch)
    state = output.last_hidden_state
    assert torch.allclose(pooled[2], state[2, :3].mean(0), atol=1e-6)
    assert len(states(output, batch)) == int(batch["attention_mask"].sum())
    with pytest.raises(SourceError, match="no logits"):
        logits(output, batch)


def test_blocks() -> None:
    assert blocks_of(models.bert()) == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert blocks_of(models.net()) == ()
