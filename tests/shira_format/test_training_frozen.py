"""A law: whatever trains the entries, all others have the base's bits."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shira_format._core.arrays import Array
from shira_format.training.hook import attach
from shira_format.training.sparse import SparseParameters, sparse_parameters
from shira_format.training.trained import Training
from tests.training import KINDS, copied, frozen_bits_are_kept, mask, raw

WAYS = ("sparse", "float32 values", "stochastic", "dora", "regrow", "hook")
# Of the weights; and under autocast, with a loss scaler if that is to float16.
PRECISIONS = ("float32", "bfloat16", "float16", "float32 as bfloat16", "float32 as float16")


class Net(nn.Module):
    """An embedding, linear layers and a convolution; of tokens and labels ``[b, t]`` and ``[b]`` it gives a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.inner = nn.Linear(12, 16)
        self.line = nn.Conv1d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.inner(self.embed(input_ids)))
        logits = self.head(self.line(x.transpose(1, 2)).mean(-1))
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


@dataclass(frozen=True)
class Case:
    """One training."""

    way: str
    precision: str
    kind: str
    optimizer: str
    decay: float
    momentum: float
    clip: float
    accumulate: int
    steps: int
    rate: float
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.precision.split()[0])
        return found

    @property
    def autocast(self) -> torch.dtype | None:
        words = self.precision.split()
        return getattr(torch, words[2]) if len(words) == 3 else None

    def started(self) -> tuple[Net, dict[str, Tensor], dict[str, Array], Training]:
        """The model, a copy of its parameters, the mask, and the training."""
        torch.manual_seed(self.seed)
        model = Net().to(self.dtype).train()
        before, masked = copied(model), mask(model, self.kind)
        if self.way == "hook":
            return model, before, masked, attach(model, masked)
        more: dict[str, Any] = {
            "float32 values": {"dtype": torch.float32},
            "stochastic": {"dtype": torch.float32, "rounding": "stochastic", "seed": self.seed},
            "dora": {"dora": True},
        }.get(self.way, {})
        trained = sparse_parameters(model, masked, **more)
        if self.way == "regrow":
            trained.regrow(self.steps, every=2, summed=1, rate=0.5)
        return model, before, masked, trained

    def optimizer_of(self, trained: Training) -> torch.optim.Optimizer:
        parameters = trained.parameters()
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.rate, momentum=self.momentum, weight_decay=self.decay)
        return torch.optim.AdamW(
            parameters, self.rate, betas=(self.momentum, 0.99), weight_decay=self.decay, eps=1e-4
        )

    def rows(self) -> list[dict[str, Tensor]]:
        """Two texts for each part of each step."""
        draws = torch.Generator().manual_seed(self.seed)
        count = 2 * self.accumulate * self.steps
        ids = torch.randint(0, 20, (count, 5), generator=draws)
        return [{"input_ids": one, "labels": one[0] % 3} for one in ids]

    def holds(
        self, model: nn.Module, before: dict[str, Tensor], masked: dict[str, Array], trained: Training
    ) -> None:
        """The law, during the training and after it."""
        if isinstance(trained, SparseParameters):
            entries = {name: weight.indices for name, weight in trained.weights.items()}
            assert {name: len(one) for name, one in masked.items()} == {name: len(one) for name, one in entries.items()}  # fmt: skip
        else:
            entries = masked
        moved = (
            self.precision == "float32" and self.way != "regrow"
        )  # elsewhere a step may be too small, skipped or dropped
        assert frozen_bits_are_kept(model, before, entries, moved_too=moved)
        with trained.base():
            assert frozen_bits_are_kept(model, before, {}, moved_too=False)
        trained.detach()
        assert frozen_bits_are_kept(model, before, entries, moved_too=False)
        assert before.keys() == dict(raw(model)).keys() == dict(model.named_parameters()).keys()


def cases(**fixed: Any) -> st.SearchStrategy[Case]:
    """Trainings; ``fixed``: strategies for some of the settings."""
    return st.builds(
        Case,
        **{
            "way": st.sampled_from(WAYS), "precision": st.sampled_from(PRECISIONS), "kind": st.sampled_from(KINDS),
            "optimizer": st.sampled_from(["adamw", "sgd"]), "decay": st.sampled_from([0.0, 0.1, 3.0]),
            "momentum": st.sampled_from([0.0, 0.9]), "clip": st.sampled_from([0.0, 0.01, 1.0]), "accumulate": st.integers(1, 3),
            "steps": st.integers(1, 6), "rate": st.sampled_from([1e-3, 1e-2]), "seed": st.integers(0, 5),
        } | fixed,
    )  # fmt: skip


@given(cases())
@settings(max_examples=100)
def test_in_a_bare_loop(case: Case) -> None:
    model, before, masked, trained = case.started()
    optimizer = case.optimizer_of(trained)
    # A scaler takes no float16 gradients: these come with weights or values of that dtype.
    scaler = torch.amp.GradScaler("cpu", 256.0, enabled=case.autocast == torch.float16 or (case.dtype == torch.float16 and case.way in ("float32 values", "stochastic")))  # fmt: skip
    rows = case.rows()
    for step in range(case.steps):
        for part in range(case.accumulate):
            at = 2 * (step * case.accumulate + part)
            batch = {key: torch.stack([row[key] for row in rows[at : at + 2]]) for key in rows[0]}
            with torch.autocast("cpu", case.autocast or torch.bfloat16, enabled=case.autocast is not None):
                loss = model(**batch)["loss"] / case.accumulate
            scaler.scale(loss).backward()
        if case.clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    case.holds(model, before, masked, trained)


@given(cases(precision=st.sampled_from(["float32", "bfloat16", "float32 as bfloat16"])))
@settings(max_examples=12)
def test_with_accelerate(case: Case) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - one in a process, which refuses other options
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if case.autocast else "no",
        gradient_accumulation_steps=case.accumulate,
    )
    model, before, masked, trained = case.started()
    loader = torch.utils.data.DataLoader(case.rows(), batch_size=2)  # type: ignore[arg-type]
    ready, optimizer, loader = accelerator.prepare(model, case.optimizer_of(trained), loader)
    for batch in loader:
        with accelerator.accumulate(ready):
            accelerator.backward(ready(**batch)["loss"])
            if accelerator.sync_gradients and case.clip:
                accelerator.clip_grad_norm_(ready.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()
    case.holds(model, before, masked, trained)


@given(cases(precision=st.sampled_from(["float32", "bfloat16", "float32 as bfloat16"])))
@settings(max_examples=8)
def test_with_the_trainer_of_transformers(case: Case) -> None:
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    model, before, masked, trained = case.started()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=case.steps, per_device_train_batch_size=2, gradient_accumulation_steps=case.accumulate,
            learning_rate=case.rate, weight_decay=case.decay, max_grad_norm=case.clip, bf16=case.autocast is not None, use_cpu=True,
            optim="adamw_torch" if case.optimizer == "adamw" else "sgd", report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no", seed=case.seed,
        )  # fmt: skip
        found = Trainer(model, arguments, train_dataset=case.rows()).train()  # type: ignore[arg-type]
    assert case.steps == found.global_step
    assert math.isfinite(found.training_loss)
    case.holds(model, before, masked, trained)
