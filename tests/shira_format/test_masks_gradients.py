"""Masks that need gradients against plain autograd, and masks inside PEFT's own training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import ShiraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

import shira_format as shira
from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.masks import (
    Gallop,
    GradUpdate,
    Struct,
    make_mask,
    peft_mask_fn,
    spiel,
    sum_gradients,
    weights_of,
)
from tests import models
from tests.shira_format.test_masks import ranked

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

BATCHES = 3


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, labels = batch
    found = model(inputs)
    logits = found if isinstance(found, torch.Tensor) else found.logits
    return cross_entropy(logits.reshape(len(labels), -1, logits.shape[-1])[:, -1].float(), labels)


def batches(model: nn.Module, size: int = 4) -> list[Any]:
    torch.manual_seed(5)
    if isinstance(model, models.Net):
        return [(torch.randn(size, 24), torch.randint(0, 6, (size,))) for _ in range(BATCHES)]
    return [(torch.randint(0, 50, (size, 7)), torch.randint(0, 3, (size,))) for _ in range(BATCHES)]


def plain(model: nn.Module, data: list[Any], *, squares: bool = False) -> dict[str, Array]:
    """The sums in float64 of what autograd gives for each batch."""
    names = [weight.name for weight in weights_of(model)]
    found: dict[str, Array] = {name: np.zeros(tuple(model.get_parameter(name).shape)) for name in names}
    for batch in data:
        gradients = torch.autograd.grad(
            loss(model, batch), [model.get_parameter(name) for name in names], allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                values = gradient.double().numpy()
                found[name] += values**2 if squares else values
    return found


SCORES: dict[str, Callable[[Array, Array], Array]] = {
    "grad": lambda g, _: np.abs(g),
    "snip": lambda g, w: np.abs(g * w),
    "gallop": lambda g, w: np.abs(g) / (np.abs(w) + 1e-8),
    "talos": lambda g, _: -g,
}


@pytest.mark.parametrize("rule", SCORES)
@pytest.mark.parametrize("make", [models.net, models.gpt2, models.llama])
def test_rules_are_those_of_plain_autograd(rule: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    data = batches(model)
    sums = plain(model, data, squares=rule == "talos")
    for scope in ("tensor", "global"):
        mask = make_mask(model, rule, density=0.02, scope=scope, batches=data, loss=loss)
        scores = {
            name: SCORES[rule](sum_, model.get_parameter(name).detach().numpy()) for name, sum_ in sums.items()
        }
        if scope == "tensor":
            for name, score in scores.items():
                agree(score, mask[name].indices, max(1, int(0.02 * score.size + 0.5)))
        else:
            every = np.concatenate([score.reshape(-1) for score in scores.values()])
            starts = dict(zip(scores, np.cumsum([0, *(score.size for score in scores.values())]), strict=False))
            chosen = np.concatenate([tensor.indices + starts[name] for name, tensor in mask.items()])
            agree(every, chosen, int(0.02 * every.size + 0.5))


def agree(scores: Array, chosen: Array, count: int) -> None:
    """The chosen are as many, and none that is left out is better by more than float32 rounds."""
    assert count == len(chosen) == len(set(chosen.tolist()))
    flat = scores.reshape(-1)
    left = np.delete(flat, chosen)
    if left.size:
        assert left.max() <= flat[chosen].min() + 1e-5 * abs(flat[chosen].min()) + 1e-12


@pytest.mark.parametrize("make", [models.net, models.llama])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_a_few_at_a_time_are_all_at_once(make: Callable[[], nn.Module], at_once: int) -> None:
    model = make()
    data, weights = batches(model), weights_of(make())
    weights = weights_of(model)
    seen: list[int] = []
    with (
        sum_gradients(model, weights, data, loss) as whole,
        sum_gradients(model, weights, data, loss, at_once=at_once, progress=seen.append) as parts,
    ):
        assert -(-len(weights) // at_once) * BATCHES == len(seen)
        for weight in weights:
            ends = (0, weight.size)
            assert whole(weight.name)(*ends).tobytes() == parts(weight.name)(*ends).tobytes()
            some = parts(weight.name)(3, 9)
            assert whole(weight.name)(3, 9).tolist() == some.tolist()
    for scope in ("tensor", "global"):
        settings: dict[str, Any] = {"density": 0.05, "scope": scope, "batches": data, "loss": loss}
        assert make_mask(model, "snip", **settings) == make_mask(model, "snip", at_once=at_once, **settings)


def test_accumulation_is_that_of_one_large_batch() -> None:
    model = models.net()
    data = batches(model)
    joined = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    for rule in ("grad", "snip"):
        settings: dict[str, Any] = {"density": 0.05, "loss": loss}
        several = make_mask(model, rule, batches=data, **settings)
        single = make_mask(model, rule, batches=joined, **settings)
        for name in several:  # the mean over a batch is a third of the sum of the means
            assert len(np.intersect1d(several[name].indices, single[name].indices)) >= 0.97 * several[name].nnz


def test_bf16_gradients_are_summed_in_float32() -> None:
    model = models.net().bfloat16()
    many = batches(models.net(), 2) * 40
    data = [(inputs.bfloat16(), labels) for inputs, labels in many]
    weights = weights_of(model)
    sums = plain(model, data)
    with sum_gradients(model, weights, data, loss) as found:
        for weight in weights:
            gradient = found(weight.name)(0, weight.size)
            assert np.float32 == gradient.dtype
            wanted = sums[weight.name].reshape(-1)
            assert np.abs(gradient - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_the_model_is_as_before() -> None:
    model = models.bert().train()
    model.classifier.weight.requires_grad_(False)
    model.bert.pooler.dense.weight.grad = torch.ones_like(model.bert.pooler.dense.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    make_mask(model, "grad", batches=batches(model), loss=loss)
    assert model.training
    assert model.bert.encoder.training
    assert needed == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert ("pooler.dense.weight" in name) == (parameter.grad is not None)
        assert torch.equal(before[name], parameter)
        assert not parameter._post_accumulate_grad_hooks
    # In training mode dropout would make two runs differ.
    masks = [make_mask(model, "snip", batches=batches(model), loss=loss) for _ in range(2)]
    assert masks[0] == masks[1]


def test_what_cannot_be_meant() -> None:
    model = models.net()
    data = batches(model)

    def needs(pattern: str, error: type[Exception], batches: Any = data, loss_: Any = loss, **more: Any) -> None:
        with pytest.raises(error, match=pattern):
            make_mask(model, "grad", batches=batches, loss=loss_, **more)

    needs("read only once", ValueError, iter(data), at_once=1)
    needs("0 weights at once", ValueError, at_once=0)
    needs("no batches", SourceError, [])
    needs("batch 1: the loss is nan", SourceError, loss_=lambda m, b: loss(m, b) * float("nan"))
    needs("not a tensor of one element", SourceError, loss_=lambda m, b: m(b[0]))
    needs("depends on none of the weights", SourceError, loss_=lambda m, b: torch.ones(()))
    needs(
        r"does not depend on 2 weights, such as 'square.weight'",
        SourceError,
        loss_=lambda m, b: m.wide(b[0]).sum(),
    )
    needs("needs gradients", ValueError, None)
    with pytest.raises(ValueError, match="needs no gradients"):
        make_mask(model, "wm", batches=data)
    with pytest.raises(ValueError, match="epsilon"):
        Gallop(0)
    assert 1 == len(make_mask(model, "grad", batches=iter(data), loss=loss, include=["wide"]))


def test_gradient_times_update_over_all_weights() -> None:
    model = models.net()
    data = batches(model)
    torch.manual_seed(3)
    updates = {weight.name: torch.randn(weight.shape) for weight in weights_of(model)}
    mask = make_mask(model, GradUpdate(updates), top_k=100, scope="global", batches=data, loss=loss)
    sums = plain(model, data)
    every = np.concatenate([np.abs(sums[name] * updates[name].numpy()).reshape(-1) for name in sums])
    starts = dict(zip(sums, np.cumsum([0, *(value.size for value in sums.values())]), strict=False))
    agree(every, np.concatenate([tensor.indices + starts[name] for name, tensor in mask.items()]), 100)
    assert {"rule": "grad-update"} == mask.manifest["mask"]


def test_conv1d_embeddings_and_experts_have_gradients() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 6, sparse=True)
            self.experts = nn.Module()
            self.experts.up_proj = nn.Parameter(torch.randn(3, 5, 6))
            self.conv = nn.Conv1d(5, 3, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = torch.einsum("bti,eoi->bto", self.embedding(ids), self.experts.up_proj)
            return self.conv(hidden.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    model = Mixture()
    data = batches(model)
    mask = make_mask(model, "grad", top_k=9, batches=data, loss=loss)
    assert ["embedding.weight", "experts.up_proj", "conv.weight"] == list(mask)
    model.embedding.sparse = False
    sums = plain(model, data)
    for name, tensor in mask.items():
        agree(np.abs(sums[name]), tensor.indices, 9)


# --- PEFT ---


def targets(model: nn.Module) -> list[str]:
    return ["wide", "square"] if isinstance(model, models.Net) else ["query", "value"]


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("wm", {}), ("wm", {"band": 1}), ("wm", {"runs": 8}), ("wm", {"scope": "row"}), ("rand", {}), ("rand", {"seed": 3}),
        ("snip", {}), ("grad", {"at_once": 1}), ("gallop", {}), ("talos", {}), ("lift", {}), ("struct", {}),
        (Struct("columns", offset=1), {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [models.net, models.bert])
def test_peft_trains_and_its_adapter_converts(
    tmp_path: Path, rule: Any, settings: dict[str, Any], make: Callable[[], nn.Module]
) -> None:
    model = make()
    if settings.get("scope") == "row" and isinstance(model, models.Net):
        pytest.skip("r (m + n) is no multiple of the rows")
    base = models.save_base(model, tmp_path / "base")
    data = batches(model)
    named = rule if isinstance(rule, str) else rule.name
    if named in ("rand", "snip", "grad", "gallop", "talos"):
        settings = settings | {"model": model}
    if named in ("snip", "grad", "gallop", "talos"):
        settings |= {"batches": data, "loss": loss}
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in targets(model)]
    expected = {
        name: make_mask(
            make(), rule, rank=2, include=[rf"{name.replace('.', '[.]')}[.]weight"],
            **{key: value for key, value in settings.items() if key != "model"},
        )
        for name in names
        if named != "struct" and not {"snip", "grad", "gallop", "talos"} & {named}
    }  # fmt: skip
    config = config_of(peft_mask_fn(rule, **settings), targets(model))
    trained = train(get_peft_model(model, config), data)
    trained.save_pretrained(tmp_path / "peft")
    shira.peft_to_shira(tmp_path / "peft", base, tmp_path / "a.st")
    adapter = shira.load(tmp_path / "a.st")
    assert {f"{name}.weight" for name in names} == set(adapter)
    for name in names:
        tensor = adapter[f"{name}.weight"]
        assert 2 * sum(tensor.shape) == tensor.nnz
        if name in expected:
            assert expected[name][f"{name}.weight"].indices.tolist() == tensor.indices.tolist()
        base_weight = make().get_parameter(f"{name}.weight").detach().numpy()
        assert np.abs(tensor.delta(base_weight)).max() > 0


def config_of(mask_fn: Any, modules: list[str], r: int = 2) -> ShiraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the type, which PEFT does not know
        config = ShiraConfig(r=r, mask_type="ours", target_modules=modules)
    config.mask_fn = mask_fn
    return config


def train(model: Any, data: list[Any]) -> Any:
    """Two steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for batch in data[:2]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


def test_a_mask_file_in_peft(tmp_path: Path) -> None:
    model = models.net()
    base = models.save_base(model, tmp_path / "base")
    mask = make_mask(tmp_path / "base", "rand", rank=2, include=["wide"], runs=16)
    shira.save(mask, tmp_path / "mask.st")
    made = shira.load(tmp_path / "mask.st")
    config = config_of(peft_mask_fn(made, model=model), ["wide"])
    train(get_peft_model(model, config), batches(model)).save_pretrained(tmp_path / "peft")
    shira.peft_to_shira(tmp_path / "peft", base, tmp_path / "a.st")
    assert mask["wide.weight"].indices.tolist() == shira.load(tmp_path / "a.st")["wide.weight"].indices.tolist()
    for r, modules, why in (
        (3, ["wide"], "the mask has 128 entries, and PEFT asks for"),
        (2, ["square"], "is not in the mask"),
    ):
        fresh = models.net()
        with pytest.raises(SourceError, match=why):
            get_peft_model(fresh, config_of(peft_mask_fn(made, model=fresh), modules, r))
    with pytest.raises(SourceError, match="not in the model that was given"):
        get_peft_model(models.net(), config_of(peft_mask_fn(made, model=model), ["wide"]))


def test_what_peft_cannot_have() -> None:
    model = models.net()
    for arguments, why in (
        ({"scope": "global"}, "global"), ({"rule": "rand"}, "give the model"), ({"rule": "grad"}, "give the model"),
        ({"rule": "grad", "model": model}, "give batches"), ({"rule": {}}, "give the model"), ({"runs": 3}, "runs of 3"),
        ({"rule": "none"}, "no rule is named"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            peft_mask_fn(**arguments)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"the mask has 120 entries, and PEFT asks for r \(m \+ n\) = 128"):
        get_peft_model(model, config_of(peft_mask_fn("neuroada"), ["wide"]))


# --- SpIEL ---


def test_the_schedule_of_spiel() -> None:
    """That of the authors' trainer: changes after steps 5, 105, 205, ..., all entries the first time, then fewer and fewer."""
    schedule = spiel.Schedule(1000)
    assert [5, 105, 205, 305, 405, 505, 605, 705, 805, 905] == [s for s in range(1, 1001) if schedule.changes(s)]
    assert [*range(1, 6), *range(101, 106)] == [s for s in range(1, 151) if schedule.sums(s)]
    assert [100, int(20 * (1 - 0.105)), int(20 * (1 - 0.905))] == [schedule.count(s, 100) for s in (5, 105, 905)]
    for bad in ({"steps": 0}, {"summed": 0}, {"summed": 101}, {"rate": 0}, {"rate": 1.5}):
        with pytest.raises(ValueError, match="."):
            spiel.Schedule(**({"steps": 10} | bad))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_regrowth_is_that_of_a_plain_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, nnz, count = 60, 20, int(rng.integers(0, 21))
    indices = np.sort(rng.choice(size, nnz, replace=False))
    deltas = rng.integers(-3, 4, nnz).astype(np.float32)
    candidates = np.sort(rng.choice(size, int(rng.integers(0, 40)), replace=False))
    gradients = rng.standard_normal(candidates.size)
    found = spiel.regrow(indices, deltas, candidates, gradients, count)
    order = np.argsort(-np.abs(deltas), kind="stable")
    going = set(indices[order[nnz - count :]].tolist())
    staying = set(indices.tolist()) - going
    free = [i for i in range(candidates.size) if candidates[i] not in staying]
    best = {int(candidates[i]) for i in sorted(free, key=lambda i: -abs(gradients[i]))[:count]}
    new = best - going
    assert sorted(new) == found.grown.tolist()
    dropped = set(indices[found.dropped].tolist())
    assert len(new) == len(dropped)
    assert dropped <= going - best
    after, values = spiel.regrown(indices, deltas, found)
    assert nnz == after.size == values.size
    assert after.tolist() == sorted((set(indices.tolist()) - dropped) | new)
    kept = dict(zip(indices.tolist(), deltas.tolist(), strict=True))
    assert [0.0 if i in new else kept[i] for i in after.tolist()] == values.tolist()


def test_ranked_is_stable() -> None:
    assert [1, 0, 2] == ranked(np.array([1.0, 2.0, 1.0])).tolist()
