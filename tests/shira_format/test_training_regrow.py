"""Entries that are dropped and grown during a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import Switcher
from shira_format.masks.spiel import Schedule
from shira_format.training.sparse import SparseParameters, resume, sparse_parameters
from shira_format.training.weight import SparseWeight
from tests import models
from tests.training import bare, copied, layers, loss_of, mask, raw, tokens

SCHEDULE: dict[str, Any] = {"every": 4, "summed": 2, "rate": 0.5}


def started(model: nn.Module, steps: int = 12, **options: Any) -> SparseParameters:
    trained = sparse_parameters(model, mask(model), **options)
    trained.regrow(steps, **SCHEDULE)
    return trained


class Plain:
    """The same with dense weights and dense gradients, by sets of positions."""

    def __init__(self, model: nn.Module, masked: dict[str, Any], optimizer: Any, steps: int) -> None:
        self.model, self.steps = model, steps
        self.weights = {name: model.get_parameter(name) for name in masked}
        self.base = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.entries = {name: set(indices.tolist()) for name, indices in masked.items()}
        self.optimizer = optimizer(list(self.weights.values()))
        self.schedule = Schedule(steps, **SCHEDULE)
        self.step, self.sums = 0, dict[str, dict[int, float]]()

    def keep(self, name: str, tensor: torch.Tensor, other: Any) -> None:
        chosen = torch.zeros(tensor.numel(), dtype=torch.bool)
        chosen[sorted(self.entries[name])] = True
        tensor.copy_(torch.where(chosen.view(tensor.shape), tensor, other))

    def run(self, ids: torch.Tensor, parts: int) -> None:
        self.step += 1
        self.optimizer.zero_grad()
        summing, total = self.schedule.sums(self.step), dict[str, torch.Tensor]()
        for _ in range(parts):
            found = torch.autograd.grad(loss_of(self.model, ids) / parts, list(self.weights.values()))
            for name, gradient in zip(self.weights, found, strict=True):
                total[name] = total.get(name, 0) + gradient
                flat = gradient.reshape(-1).tolist()
                if summing and name not in self.sums:
                    order = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))  # noqa: B023
                    self.sums[name] = dict.fromkeys(order[: len(self.entries[name])], 0.0)
                if summing:
                    for place in self.sums[name]:
                        self.sums[name][place] += flat[place]
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.grad = total[name]
                self.keep(name, weight.grad, 0)
            self.optimizer.step()
            for name in self.weights:
                self.cut(name)
                if self.schedule.changes(self.step):
                    self.change(name)
                    self.cut(name)
        if self.schedule.changes(self.step):
            self.sums.clear()

    def cut(self, name: str) -> None:
        """Frozen entries and their states: an optimizer's weight decay moves them."""
        self.keep(name, self.weights[name], self.base[name])
        for state in self.optimizer.state[self.weights[name]].values():
            if state.shape == self.base[name].shape:
                self.keep(name, state, 0)

    def change(self, name: str) -> None:
        weight, entries = self.weights[name], self.entries[name]
        delta = (weight - self.base[name]).reshape(-1).abs().tolist()
        count = self.schedule.count(self.step, len(entries))
        going = set(sorted(entries, key=lambda i: (delta[i], -i))[:count])
        free = [i for i in self.sums[name] if i not in entries - going]
        grown = set(sorted(free, key=lambda i: (-abs(self.sums[name][i]), i))[:count])
        leaving = sorted(going - grown, key=lambda i: (delta[i], -i))[: len(grown - going)]
        self.entries[name] = entries - set(leaving) | (grown - going)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize(
    ("name", "optimizer", "parts"), [("layers", "adamw", 1), ("layers", "sgd", 2), ("gpt2", "adamw", 2)]
)
def test_it_is_that_of_a_plain_dense_training(name: str, optimizer: str, parts: int) -> None:
    """Every layer: embeddings, tied weights, convolutions, attention, experts, Conv1D."""
    make = {"layers": layers, "gpt2": models.gpt2}[name]
    model, dense = make().eval().double(), make().eval().double()
    before = copied(model)
    trained = started(model)
    counts = {name: len(weight.indices) for name, weight in trained.weights.items()}
    plain = Plain(dense, mask(dense), OPTIMIZERS[optimizer], 12)
    mine = OPTIMIZERS[optimizer](trained.parameters())
    assert trained.regrowth is not None
    changes = []
    for step in range(1, 13):
        ids = torch.roll(tokens(), step, 1)
        mine.zero_grad()
        for _ in range(parts):
            (loss_of(model, ids) / parts).backward()
        mine.step()
        plain.run(ids, parts)
        for path, weight in trained.weights.items():
            assert counts[path] == len(weight.indices) == len(np.unique(weight.indices))
            assert plain.entries[path] == set(weight.indices.tolist()), (path, step)
            torch.testing.assert_close(weight.weight.detach(), plain.weights[path].detach(), rtol=1e-7, atol=1e-9)
        if trained.regrowth.changed != (changes[-1][1] if changes else 0):
            changes.append((step, trained.regrowth.changed))
        frozen(model, before, trained)
    assert [2, 6, 10] == [step for step, _ in changes]
    assert changes[0][1] > 0.5 * trained.nnz  # nearly all, the first time


def frozen(model: nn.Module, before: dict[str, torch.Tensor], trained: SparseParameters) -> None:
    entries = {id(weight.weight): weight.indices for weight in trained.weights.values()}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for name, now in raw(model):
        same = (before[name] == now).reshape(-1).numpy().copy()
        same[entries.get(id(by_name[name]), np.empty(0, np.int64))] = True
        assert same.all(), name


def test_the_optimizer_forgets_dropped_entries() -> None:
    model = models.net()
    trained = started(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    bare(model, optimizer, torch.randn(4, 24), steps=5)
    before = {name: weight.indices for name, weight in trained.weights.items()}

    def moments(weight: SparseWeight) -> torch.Tensor:
        found: torch.Tensor = optimizer.state[weight.parameter("values")]["exp_avg_sq"]
        return found

    stepped = dict[str, torch.Tensor]()  # after the step, before the change
    optimizer.register_step_post_hook(
        lambda *_: stepped.update({name: moments(weight).clone() for name, weight in trained.weights.items()})
    )
    bare(model, optimizer, torch.randn(4, 24), steps=1)
    grown = 0
    for name, weight in trained.weights.items():
        indices, state = before[name], moments(weight)
        new = ~np.isin(weight.indices, indices)
        grown += int(new.sum())
        assert (state[torch.from_numpy(new)] == 0).all()
        assert torch.equal(
            state[torch.from_numpy(~new)], stepped[name][torch.from_numpy(np.isin(indices, weight.indices))]
        )
        assert np.array_equal(weight.base[new], weight.read().numpy()[new])
        dropped = np.setdiff1d(indices, weight.indices)
        fresh = models.net().get_parameter(weight.path).detach().reshape(-1).numpy()
        assert np.array_equal(fresh[dropped], weight.weight.detach().reshape(-1).numpy()[dropped])
    assert 0 < grown < trained.nnz


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32, "rounding": "stochastic", "seed": 3}])
def test_a_run_that_stops_goes_on_to_the_bit(options: dict[str, Any], stop: int, tmp_path: Path) -> None:
    """Stopped before, within and after the steps whose gradients are summed."""
    ends = []
    for stops in (False, True):
        model = models.bert().bfloat16().eval()
        trained = started(model, **options)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        bare(model, optimizer, tokens(), steps=stop)
        if stops:
            trained.save_state(tmp_path / "a.st", optimizer)
            model = models.bert().bfloat16().eval()
            trained = resume(model, tmp_path / "a.st")
            optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
            trained.restore_optimizer(optimizer)
        bare(model, optimizer, tokens(), steps=8)
        assert trained.regrowth is not None
        ends.append((trained.adapter(), trained.state(), optimizer.state_dict(), trained.regrowth.changed))
    one, other = ends
    assert one[0] == other[0]
    torch.testing.assert_close(one[1]["weights"], other[1]["weights"], rtol=0, atol=0)
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=0)
    assert one[3] == other[3]


def test_a_copy_of_the_model_is_trained_alike() -> None:
    model = models.bert().eval()
    trained = started(model)
    bare(model, torch.optim.SGD(trained.parameters(), lr=0.1), tokens(), steps=1)
    twin = copy.deepcopy(model)
    twins = twin.__dict__["_shira_training"]
    for one, of in ((model, trained), (twin, twins)):
        bare(one, torch.optim.SGD(of.parameters(), lr=0.1), tokens(), steps=6)
    assert trained.adapter() == twins.adapter()
    assert trained.regrowth is not twins.regrowth


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    found = []
    for compiling in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(20, 24), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 20))
        trained = started(net)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        model: Any = torch.compile(net, backend="aot_eager") if compiling else net
        losses = bare(model, optimizer, tokens(), steps=11)
        found.append((losses, {name: weight.indices for name, weight in trained.weights.items()}))
        torch._dynamo.reset()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(np.array_equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_a_loss_that_overflows_is_no_candidate() -> None:
    """A loss scaler skips such steps; the gradients of the next one are taken."""
    model = models.net()
    trained = started(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    x = torch.randn(4, 24)
    (loss_of(model, x) * float("inf")).backward()
    optimizer.zero_grad()
    bare(model, optimizer, x, steps=2)
    assert trained.regrowth is not None
    assert 2 == trained.regrowth.step
    assert trained.regrowth.changed > 0


def test_the_file(tmp_path: Path) -> None:
    model = models.bert().eval()
    trained = started(model)
    bare(model, torch.optim.SGD(trained.parameters(), lr=0.1), tokens(), steps=7)
    trained.save(tmp_path / "a.st")
    found = load(tmp_path / "a.st")
    assert {"rule": "spiel", **SCHEDULE} == found.manifest["mask"]
    logits = model(tokens()).logits
    trained.detach(restore=True)
    with Switcher(model).applied(tmp_path / "a.st"):
        assert torch.equal(logits, model(tokens()).logits)
    assert all(torch.equal(old, now) for old, now in zip(copied(models.bert()).values(), copied(model).values(), strict=True))  # fmt: skip


def test_refusals(tmp_path: Path) -> None:
    model = models.net()
    trained = sparse_parameters(model, mask(model))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained.save_state(tmp_path / "fixed.st", optimizer)
    with pytest.raises(ValueError, match="not a schedule"):
        trained.regrow(10, every=2, summed=3)
    trained.regrow(10, **SCHEDULE)
    with pytest.raises(SourceError, match="regrown already"):
        trained.regrow(10)
    part = torch.optim.SGD(trained.parameters()[:1], lr=0.1)
    with pytest.raises(SourceError, match="one optimizer for all entries"):
        part.step()
    trained.detach(restore=True)
    part.step()  # of no training any more
    dora = sparse_parameters(model, mask(model), dora=True)
    with pytest.raises(SourceError, match="SHiRA-DoRA"):
        dora.regrow(10)
    dora.detach()
    diverged = started(models.net())
    optimizer = torch.optim.SGD(diverged.parameters(), lr=0.1)
    bare(diverged.model, optimizer, torch.randn(4, 24), steps=1)
    diverged.parameters()[1].grad = torch.full_like(diverged.parameters()[1], float("nan"))
    with pytest.raises(SourceError, match="values that are no finite numbers"):
        optimizer.step()
    factored = started(models.net())
    strange = torch.optim.SGD(factored.parameters(), lr=0.1)
    strange.state[factored.parameters()[0]]["blocks"] = torch.zeros(2)
    with pytest.raises(SourceError, match="blocks of .* is neither one number nor one for each entry"):
        bare(factored.model, strange, torch.randn(4, 24))
