"""Every way to run a training: precision, checkpointing, compiling, accumulation, several processes, trainers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shira_format.errors import SourceError
from shira_format.training.hook import attach
from shira_format.training.sparse import sparse_parameters
from shira_format.training.trained import Training, training_of
from tests import models, training
from tests.training import bare, copied, frozen_bits_are_kept, layers, loss_of, mask, tokens, word_tokenizer

WAYS: dict[str, Callable[..., Training]] = {"sparse": sparse_parameters, "hook": attach}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_frozen_bits_with_every_optimizer(way: str, name: str, dtype: torch.dtype) -> None:
    model = models.bert().to(dtype).train()
    before, masked = copied(model), mask(model)
    trained = WAYS[way](model, masked)
    optimizer = OPTIMIZERS[name](trained.parameters())
    losses = bare(model, optimizer, tokens(), accumulate=2)
    assert dtype == torch.float16 or np.isfinite(losses).all()  # eps of Adam is 0 in float16
    assert frozen_bits_are_kept(model, before, masked)
    states = sum(v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim)  # fmt: skip
    assert states <= 3 * trained.nnz
    trained.detach(restore=True)
    assert all(torch.equal(before[name], now) for name, now in copied(model).items())


@pytest.mark.parametrize("autocast", [False, True])
def test_both_ways_do_the_same(autocast: bool) -> None:
    found = []
    for way in WAYS.values():
        model = models.bert().eval()
        trained = way(model, mask(model))
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.01)
        bare(model, optimizer, tokens(), autocast=autocast)
        found.append({one.name: one.values for one in trained.entries()})
    one, other = found
    for name in one:
        # Adam turns rounding of a gradient near zero into a step of its own; most are not.
        close = np.isclose(one[name], other[name], rtol=0, atol=1e-5)
        assert close.mean() > (0.6 if autocast else 0.98), name
        assert np.abs(one[name] - other[name]).max() < 4e-3 * 2


def test_the_norm_for_clipping_counts_entries_alone() -> None:
    norms = []
    for way in WAYS.values():
        model = models.bert().eval()
        way(model, mask(model), whole=["classifier.bias"])
        loss_of(model, tokens()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    dense = models.bert().eval()
    loss_of(dense, tokens()).backward()
    assert norms[0] < 0.8 * float(torch.nn.utils.clip_grad_norm_(dense.parameters(), 1.0))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_autocast_are_close(way: str) -> None:
    model, dense = layers().eval(), layers().eval()
    trained = WAYS[way](model, mask(model))
    for one in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(one, tokens())
        loss.backward()
    for path, weight in trained.weights.items():  # type: ignore[attr-defined]
        whole = dense.get_parameter(path).grad
        assert whole is not None
        found = weight.parameter("values").grad if way == "sparse" else model.get_parameter(path).grad
        entries = torch.from_numpy(np.asarray(mask(dense)[path]))
        expected = whole.reshape(-1)[entries]
        found = found.reshape(-1) if way == "sparse" else found.reshape(-1)[entries]
        assert (found - expected).abs().max() <= 0.05 * whole.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        trained = sparse_parameters(model, mask(model, only="layers"))
        loss_of(model, tokens()).backward()
        gradients.append(
            [parameter.grad.clone() for parameter in trained.parameters() if parameter.grad is not None]
        )
    assert len(gradients[0]) == len(gradients[1]) == 14
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["rand", "struct", "columns"])
def test_compiled(kind: str) -> None:
    """The model is traced whole, and trains like the one that is not compiled."""
    found = []
    for compiling in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(20, 24), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 20))
        trained = sparse_parameters(net, mask(net, kind))
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        model: Any = torch.compile(net, backend="aot_eager", fullgraph=True) if compiling else net
        assert training_of(model) is trained
        found.append(bare(model, optimizer, tokens()))
        torch._dynamo.reset()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][0] > found[0][-1]


def test_a_closure_and_an_optimizer_that_came_first() -> None:
    for way in WAYS.values():
        model = models.net()
        before, masked = copied(model), mask(model)
        trained = way(model, masked)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)

        def closure(model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 24)).square().mean()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
        assert frozen_bits_are_kept(model, before, masked)
    model = models.net()
    early = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 24)).sum().backward()
    early.step()
    moment = early.state[model.wide.weight]["exp_avg"].clone()
    before, masked = copied(model), mask(model)
    attach(model, masked)
    early.zero_grad()
    model(torch.ones(2, 24)).square().sum().backward()
    early.step()
    assert frozen_bits_are_kept(model, before, masked)
    assert moment.shape == (40, 24)
    assert early.state[model.wide.weight]["exp_avg"].shape == masked["wide.weight"].shape
    factored = models.net()
    early = torch.optim.Adafactor(factored.parameters())
    factored(torch.ones(2, 24)).sum().backward()
    early.step()
    attach(factored, masked)
    factored(torch.ones(2, 24)).sum().backward()
    with pytest.raises(SourceError, match="attach before its first step"):
        early.step()
    assert factored.wide.weight.shape == (40, 24)

    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("failed half-way")
            return super().step(closure)

    model = models.net()
    before = copied(model)
    attach(model, masked)
    failing = Failing(model.parameters(), lr=0.1)
    model(torch.ones(2, 24)).square().sum().backward()
    with pytest.raises(RuntimeError, match="half-way"):
        failing.step()
    failing.fails = False
    failing.step()
    assert frozen_bits_are_kept(model, before, masked)
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(SourceError, match="LBFGS"):
        lbfgs.step(lambda: torch.zeros(()))


def test_two_processes_are_one_on_the_joint_batch(tmp_path: Path) -> None:
    from shira_format.format import load

    torch.multiprocessing.spawn(training.in_two_processes, (str(tmp_path),), nprocs=2)
    for way, start in WAYS.items():
        model = layers(by_frequency=False).eval()
        trained = start(model, mask(model))
        training.bare(model, torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9), tokens())
        joint, ddp = trained.adapter(), load(tmp_path / f"{way}.st")
        assert joint.keys() == ddp.keys()
        for name in joint:
            np.testing.assert_allclose(ddp[name].values, joint[name].values, rtol=1e-4, atol=1e-6)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokens and labels."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> dict[str, Any]:
        ids = (torch.arange(6) * 7 + place) % 50
        return {"input_ids": ids, "labels": torch.tensor(place % 3)}


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_of_transformers(way: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = models.bert().train()
    before, masked = copied(model), mask(model, only="layer")
    trained = WAYS[way](model, masked, whole=["classifier"])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        weight_decay=0.1, use_cpu=True, report_to=[], save_strategy="no", bf16=True, disable_tqdm=True, logging_strategy="no",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows()).train()
    whole = {name: np.arange(before[name].numel()) for name in before if "classifier" in name}
    assert frozen_bits_are_kept(model, before, masked | whole)
    adapter = trained.adapter()
    assert {"classifier.weight", "classifier.bias"} == set(adapter.dense)
    assert masked.keys() == adapter.keys()


@pytest.mark.parametrize("way", WAYS)
def test_accelerate(way: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # There is one in a process, which refuses other options; a Trainer in an earlier test makes one, too.
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = models.bert().train()
    before, masked = copied(model), mask(model)
    trained = WAYS[way](model, masked)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    ready, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(ready):
            accelerator.backward(ready(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(ready.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert frozen_bits_are_kept(model, before, masked)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_of_trl(way: str, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    model = models.llama().train()
    before, masked = copied(model), mask(model, only="layers")
    WAYS[way](model, masked)
    data = Dataset.from_list([{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 8)
    arguments = trl.SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True})  # fmt: skip
    trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=word_tokenizer(32)).train()
    assert frozen_bits_are_kept(model, before, masked)
