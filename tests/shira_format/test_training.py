"""Sparse parameters: gradients equal those of dense training, and nothing else moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shira_format.errors import BaseMismatch, FormatError, SourceError
from shira_format.training.pattern import MatrixPattern, gradient, gradient_at
from shira_format.training.rounding import generator, rounded
from shira_format.training.sparse import sparse_parameters
from tests import models, training
from tests.training import KINDS, copied, frozen_bits_are_kept, layers, loss_of, mask, tokens

MODELS: dict[str, Callable[[], nn.Module]] = {"layers": layers, "bert": models.bert, "llama": models.llama, "gpt2": models.gpt2}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4, 5], [7, 7, 7, 2, 0], [9, 19, 11, 12, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["auto", "sampled", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_product(kind: str, method: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    outer, inner = torch.randn(33, 20, dtype=dtype), torch.randn(33, 28, dtype=dtype)
    indices = training.pattern(kind, (20, 28), 0.1, np.random.default_rng(1))
    pattern = MatrixPattern((20, 28), indices, method)
    kept = pattern.kept_inputs(inner)
    assert (kept.shape[1] < 28) == (kind in {"columns", "few_columns"})
    expected = (outer.double().t() @ inner.double()).reshape(-1)[torch.from_numpy(indices)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for found in (gradient(outer, kept, pattern), gradient_at(outer, kept, pattern)):
        assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_a_pattern_is_taken_apart() -> None:
    found = np.zeros((6, 8), bool)
    found[2] = found[:, 5] = found[0, 0] = True
    pattern = MatrixPattern((6, 8), np.flatnonzero(found))
    assert ([2], [5], 1) == (pattern.rows.tolist(), pattern.columns.tolist(), pattern.rest_size)
    assert "1 rows, 1 columns, 1 entries" == pattern.describe()
    assert pattern is copy.deepcopy(pattern)
    with pytest.raises(ValueError, match="method 'fast' is none of"):
        MatrixPattern((2, 2), np.arange(2), "fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["rand", "struct", "columns"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_dense_training(name: str, kind: str) -> None:
    model, dense = MODELS[name]().eval(), MODELS[name]().eval()
    ids = tokens() if name == "layers" else IDS
    trained = sparse_parameters(model, mask(model, kind))
    expected, found = loss_of(dense, ids), loss_of(model, ids)
    assert torch.equal(expected, found)
    expected.backward()
    found.backward()
    assert set(trained.weights) == {name for name, parameter in dense.named_parameters() if parameter.ndim >= 2}
    for path, weight in trained.weights.items():
        whole = dense.get_parameter(path).grad
        assert whole is not None
        torch.testing.assert_close(weight.parameter("values").grad, whole.reshape(-1)[torch.from_numpy(weight.indices)], rtol=1e-4, atol=1e-6)  # fmt: skip
    # Nothing else has a gradient, and no weight has a dense one.
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in trained.parameters()}


def test_what_is_kept_for_the_backward_pass() -> None:
    """A layer without entries keeps no input, one with a few columns keeps these, and one with rows keeps all."""
    sizes: dict[str, int] = {}
    for kind in ("none", "columns", "rows"):
        model = nn.Sequential(nn.Linear(36, 8, bias=False), nn.Linear(8, 40, bias=False))
        if kind != "none":
            sparse_parameters(model, {"0.weight": training.pattern(kind, (8, 36), 1, np.random.default_rng())})
        else:
            sparse_parameters(model, {"1.weight": np.array([3])})
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):  # type: ignore[misc]
            model(torch.randn(5, 36))
        sizes[kind] = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in weights and t.shape[-1] != 8)  # fmt: skip
    assert {"none": 5 * 1 * 0 + 5, "columns": 5 * 4, "rows": 5 * 36} == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["layers", "gpt2"])
def test_frozen_entries_have_the_bits_of_the_base(name: str, dora: bool, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype).train()
    before, masked = copied(model), mask(model)
    ids = tokens() if name == "layers" else IDS
    optional: Any = {"dora": True} if dora else {}
    trained = sparse_parameters(model, masked, dtype=torch.float32, **optional)
    assert all(
        torch.equal(before[name], now) for name, now in training.raw(model)
    )  # DoRA starts from the base, too
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert frozen_bits_are_kept(model, before, with_ties(masked, name))
    entries = {one.name: one for one in trained.entries()}
    assert entries.keys() == masked.keys()
    with trained.base():
        assert all(torch.equal(before[name], now) for name, now in training.raw(model))
    trained.detach()
    assert frozen_bits_are_kept(model, before, with_ties(masked, name))
    assert before.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert not any("Sparse" in type(module).__name__ for module in model.modules())


def with_ties(masked: dict[str, Any], name: str) -> dict[str, Any]:
    if name == "layers":
        return masked | {"head.weight": masked["embed.weight"]}
    return masked | {"lm_head.weight": masked["transformer.wte.weight"]}


def test_it_trains_as_the_dense_one_does() -> None:
    """The same steps as dense SGD with all other gradients set to zero."""
    model, dense = models.bert().eval(), models.bert().eval()
    masked = mask(model, only="layer")
    trained = sparse_parameters(model, masked)
    mine = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([dense.get_parameter(name) for name in masked], lr=0.1, momentum=0.9)
    for step in range(4):
        ids = torch.roll(IDS, step, 1)
        loss_of(model, ids).backward()
        loss_of(dense, ids).backward()
        for name, indices in masked.items():
            grad = dense.get_parameter(name).grad
            assert grad is not None
            kept = grad.reshape(-1)[torch.from_numpy(indices)]
            grad.zero_().view(-1)[torch.from_numpy(indices)] = kept
        mine.step()
        theirs.step()
        mine.zero_grad()
        theirs.zero_grad()
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-6)


def test_values_that_change_without_an_optimizer_are_seen() -> None:
    model = models.net()
    trained = sparse_parameters(model, {"wide.weight": [0, 5, 100]})
    x = torch.randn(2, 24)
    before = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        trained.weights["wide.weight"].parameter("values").add_(1)
    after = model(x)
    assert not torch.equal(before, after)
    with torch.no_grad():
        assert 3 == int((model.wide.weight != state["wide.weight"]).sum())
    model.load_state_dict(state)
    assert torch.equal(before, model(x))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.wide.weight_values.add_(1)
    assert torch.equal(after, twin(x))
    assert torch.equal(before, model(x))


def test_rounding_at_random_is_right_on_average_and_can_be_repeated() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.tensor([1.001, -1.001, 3e-8, -3e-8, 0.0, 1.0, 65519.0, float("inf")])
        drawn = torch.stack([rounded(values, dtype, generator(0, "w", step, values.device)).float() for step in range(4000)])  # fmt: skip
        near = values.to(dtype).float()
        other = torch.nextafter(values.to(dtype), torch.tensor(float("inf"), dtype=dtype)).float() if dtype == torch.bfloat16 else None  # fmt: skip
        finite = slice(0, 6)
        gap = (drawn[:, finite].amax(0) - drawn[:, finite].amin(0)).clamp(min=1e-12)
        assert ((drawn[:, finite].mean(0) - values[finite]).abs() < 0.05 * gap + 1e-12).all()
        assert all(len(column.unique()) == 2 for column in drawn[:, :2].T)
        assert torch.equal(drawn[:, 4:6], near[4:6].expand(4000, 2))
        assert float("inf") == float(drawn[0, 7])
        assert other is None or float(drawn[:, 0].max()) in {float(near[0]), float(other[0])}
        assert torch.equal(drawn[3], rounded(values, dtype, generator(0, "w", 3, values.device)).float())


def test_small_updates_of_a_bf16_weight() -> None:
    """Lost in bf16 values, kept in float32 ones, and seen at once by some entries under stochastic rounding."""
    moved = {}
    for name, options in {"bf16": {}, "master": {"dtype": torch.float32}, "random": {"dtype": torch.float32, "rounding": "stochastic"}}.items():  # fmt: skip
        model = nn.Linear(64, 64, bias=False).bfloat16()
        nn.init.ones_(model.weight)
        trained = sparse_parameters(model, {"weight": np.arange(2000)}, **options)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        first = None
        for _ in range(10):
            for parameter in trained.parameters():
                parameter.grad = torch.full_like(parameter, -1e-3)
            optimizer.step()
            values = trained.weights["weight"].read().float()
            first = values if first is None else first
        assert first is not None
        moved[name] = (float((first > 1).float().mean()), float(values.mean()) - 1)
    assert (0, 0) == moved["bf16"]
    assert 0 == moved["master"][0]
    assert moved["master"][1] == pytest.approx(0.0078125)
    assert 0.05 < moved["random"][0] < 0.25
    assert moved["random"][1] == pytest.approx(0.01, rel=0.1)


def test_refusals() -> None:
    model = models.net()
    with pytest.raises(SourceError, match="are not in the base"):
        sparse_parameters(model, {"nothing.weight": [0]})
    with pytest.raises(FormatError, match="out-of-range"):
        sparse_parameters(model, {"head.weight": [10**6]})
    with pytest.raises(BaseMismatch, match="a mask of"):
        sparse_parameters(model, {"head.weight": np.ones((2, 2), bool)})
    with pytest.raises(SourceError, match="has no entries to train"):
        sparse_parameters(model, {"head.weight": np.zeros((6, 40), bool)})
    with pytest.raises(SourceError, match="no parameter of the model has a name"):
        sparse_parameters(model, {"head.weight": [0]}, whole=["nothing"])
    with pytest.raises(SourceError, match="cannot be trained whole too"):
        sparse_parameters(model, {"head.weight": [0]}, whole=["head"])
    with pytest.raises(ValueError, match="rounding 'up' is none of"):
        sparse_parameters(model, {"head.weight": [0]}, rounding="up")  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="are one weight of the model, tied"):
        sparse_parameters(layers(), {"embed.weight": [0], "head.weight": [0]})
    with pytest.raises(SourceError, match="max_norm"):
        sparse_parameters(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), {"0.weight": [0]})
    with pytest.raises(BaseMismatch, match="meta device"):
        sparse_parameters(nn.Linear(2, 2, device="meta"), {"weight": [0]})
    # What was refused has changed nothing.
    trained = sparse_parameters(model, {"head.weight": [0]})
    with pytest.raises(SourceError, match="under training already"):
        sparse_parameters(model, {"head.weight": [0]})
    with pytest.raises(TypeError, match="cannot assign"):
        model.head.weight = torch.zeros(6, 40)  # type: ignore[assignment]
    trained.detach()
    sparse_parameters(model, {"head.weight": [0]})
