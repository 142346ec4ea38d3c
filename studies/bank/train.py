"""One adapter of the bank, in a process that keeps texts and models between runs."""

from __future__ import annotations

import copy
import os
import shutil
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.support import largest
from shira_format.convert.fit.task import Task, blocks_of
from shira_format.format import load, save
from shira_format.tensors import SparseTensor
from shira_format.training.sparse import sparse_parameters
from studies.bank.encoder import (
    LoraEncoder,
    base_model,
    features,
    head_of,
    margins,
    read_head,
    set_head,
    some,
    tokens_of,
    write_head,
)
from studies.bank.forms import CUT, FORMS, RANK, TASKS, mask_of
from studies.bank.plan import Bank, BankRun, Settings
from studies.learning import BATCH, Tokens, quiet, train, with_head
from studies.loras import add_lora, lora_parameters
from studies.masks import MATRICES

ORDER = 1000  # added to a run's seed for the order of texts


@dataclass
class _Place:
    bank: Bank = field(default_factory=lambda: Bank(Path()))
    base: Path = Path()
    settings: Settings = field(default_factory=Settings)


_place = _Place()


def start(folder: Path, base: Path) -> None:
    """Before the first run: where the bank and the model are."""
    quiet()
    torch.set_num_threads(1)
    _place.bank, _place.base = Bank(folder), base
    _place.settings = _place.bank.settings()


def tokens(task: str) -> dict[str, Tokens]:
    """The texts of a task; the held-out ones cut to as many as the bank has."""
    found = tokens_of(_place.bank.texts, _place.base, task, _place.settings.tokens)
    return found | {"test": found["test"][slice(0, _place.settings.held)]}


@lru_cache(maxsize=2)
def _started(task: str, seed: int) -> nn.Module:
    """The encoder with the head that was fitted to it."""
    chosen = some(tokens(task)["train"], _place.settings.heads, seed)
    model = with_head(base_model(_place.base), chosen, seed)
    write_head(head_of(model), _place.bank.start(task, seed))
    return model


@lru_cache(maxsize=16)
def base_features(task: str) -> Tensor:
    """Of the held-out texts in the unchanged encoder."""
    return features(base_model(_place.base), tokens(task)["test"])


def work(run: BankRun) -> dict[str, Any]:
    """Do one run."""
    begin = time.perf_counter()
    model = copy.deepcopy(_started(run.task, run.seed))
    kind = FORMS[run.form].kind
    prepared = time.perf_counter()
    entries = {"lora": _lora, "mask": _masked, "fitted": _fitted, "cut": _cut}[kind](model, run)
    trained = time.perf_counter()
    path = _place.bank.adapter(run)
    head = head_of(model)
    write_head(head, _place.bank.head(run))
    held = tokens(run.task)["test"]
    return {
        "margins": margins(features(model, held), head, held.labels),
        "base": margins(base_features(run.task), head, held.labels),
        "start": margins(
            base_features(run.task), read_head(_place.bank.start(run.task, run.seed)), held.labels
        ),
        "entries": entries, "bytes": sum(one.stat().st_size for one in [path, *path.rglob("*.safetensors")] if one.is_file()),
        "train_seconds": round(trained - prepared, 2), "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def _trained(model: nn.Module, parameters: list[Any], run: BankRun) -> None:
    parts = tokens(run.task)
    watched = parts["validation"][slice(0, BATCH)]
    train(
        model, parameters, parts["train"], watched,
        steps=_place.settings.steps, rate=FORMS[run.form].rate, seed=run.seed + ORDER,
    )  # fmt: skip


def _lora(model: nn.Module, run: BankRun) -> int:
    wrapped = add_lora(model, RANK, MATRICES, run.seed)
    parameters = lora_parameters(model)
    _trained(model, parameters, run)
    path = _place.bank.adapter(run)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    wrapped.save_pretrained(str(new))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)
    return sum(one.numel() for one in parameters)


def _masked(model: nn.Module, run: BankRun) -> int:
    mask = mask_of(base_model(_place.base), FORMS[run.form], list(TASKS).index(run.task), run.seed)
    training = sparse_parameters(model, mask)
    _trained(model, training.parameters(), run)
    save(training.adapter(self_contained=True), _place.bank.adapter(run))
    training.detach()
    return training_size(_place.bank.adapter(run))


def training_size(path: Path) -> int:
    """Entries of an adapter's file."""
    return sum(one.nnz for one in load(path).values())


def _source(model: nn.Module, run: BankRun) -> dict[str, Tensor]:
    """The weights with the LoRA of the run's task and seed; the model gets its head."""
    of = BankRun(run.task, "lora", run.seed)
    set_head(model, read_head(_place.bank.head(of)))
    encoder = LoraEncoder(_place.base, {run.task: _place.bank.adapter(of)})
    with torch.no_grad():
        return {name: model.get_parameter(name) + update for name, update in encoder.updates(run.task).items()}


def _fitted(model: nn.Module, run: BankRun) -> int:
    """Distilled without labels, on as many texts as a training sees."""
    settings = _place.settings
    source = _source(model, run)
    seen = some(tokens(run.task)["train"], settings.steps * BATCH, run.seed + ORDER)
    task = Task(
        model, source, {}, [{"input_ids": one.ids, "attention_mask": one.mask} for one in seen.batches(BATCH)], [],
        lambda output, _: output.logits, is_logits=True, layers=blocks_of(model),
    )  # fmt: skip
    budget = sum(RANK * sum(one.shape) for one in source.values())
    found = distill(task, budget, seed=run.seed, options=Distillation(steps=settings.steps))
    return _written(model, run, {name: (at, task.rounded(name, values)) for name, (at, values) in found.items()})


def _cut(model: nn.Module, run: BankRun) -> int:
    found = {}
    for name, one in _source(model, run).items():
        size = (one - model.get_parameter(name).detach()).abs().reshape(-1)
        at = largest({name: size}, round(CUT * size.numel()))[name]
        found[name] = at, one.reshape(-1)[at]
    return _written(model, run, found)


def _written(model: nn.Module, run: BankRun, entries: dict[str, tuple[Tensor, Tensor]]) -> int:
    """Write entries as an adapter, and leave them in the model."""
    tensors = []
    for name, (at, values) in entries.items():
        weight = model.get_parameter(name).detach()
        flat = weight.view(-1)
        base = as_array(flat[at]).copy()
        tensors.append(SparseTensor(name, tuple(weight.shape), as_array(at), as_array(values), base=base))
        flat[at] = values
    save(Adapter(tensors), _place.bank.adapter(run))
    return sum(one.nnz for one in tensors)
