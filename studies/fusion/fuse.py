"""One fused adapter, in a process that keeps texts, adapters and models between runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from shira_cli.shipped import DATA
from shira_format.adapter import Adapter
from shira_format.convert.fit.support import largest
from shira_format.format import load
from shira_format.merging.run import open_merge
from shira_format.tensors import SparseTensor
from studies.bank import train
from studies.bank.encoder import Encoder, Head, LoraEncoder, base_model, features, margins, read_head, some
from studies.bank.forms import CUT, FORMS, TASKS
from studies.bank.plan import Bank, BankRun
from studies.fusion.distilled import Part, distilled
from studies.fusion.plan import SHIPPED, FusionRun, Merge, is_lora, merges_of
from studies.learning import BATCH

TEXTS = 0.5  # of the texts that a training sees, as many for each part of a distilled merge


@dataclass
class _Place:
    bank: Bank = field(default_factory=lambda: Bank(Path()))
    base: Path = Path()


_place = _Place()


def start(folder: Path, base: Path) -> None:
    """Before the first run: where the bank and the model are."""
    train.start(folder, base)
    _place.bank, _place.base = Bank(folder), base


def place() -> _Place:
    """What :func:`start` was told."""
    return _place


@lru_cache(maxsize=24)
def adapter(run: BankRun) -> Adapter:
    """A sparse adapter of the bank, or cut from a LoRA that ships, in memory."""
    if run.form == SHIPPED:
        return _shipped(run.task)
    return Adapter(list(load(_place.bank.adapter(run)).values()))


@lru_cache
def encoder() -> Encoder:
    """For sparse adapters."""
    return Encoder(_place.base)


def loras(seed: int) -> LoraEncoder:
    """All LoRAs of a seed that are there, by task."""
    done = _place.bank.store()
    return _loras(seed, tuple(task for task in TASKS if BankRun(task, "lora", seed) in done))


@lru_cache(maxsize=2)
def _loras(seed: int, tasks: tuple[str, ...]) -> LoraEncoder:
    return LoraEncoder(_place.base, {task: _place.bank.adapter(BankRun(task, "lora", seed)) for task in tasks})


def head(run: BankRun) -> Head:
    """The head that was trained with an adapter."""
    if run.form == SHIPPED:
        found = load_file(DATA / "loras" / run.task / "adapter_model.safetensors")
        return found["base_model.model.classifier.weight"], found["base_model.model.classifier.bias"]
    return read_head(_place.bank.head(run))


def _shipped(task: str) -> Adapter:
    updates = LoraEncoder(_place.base, {task: DATA / "loras" / task}).updates(task)
    model = base_model(_place.base)
    tensors = []
    for name, update in updates.items():
        weight = model.get_parameter(name).detach()
        size = update.abs().reshape(-1)
        at = largest({name: size}, round(CUT * size.numel()))[name]
        base = weight.reshape(-1)[at]
        values = base + update.reshape(-1)[at]
        tensors.append(SparseTensor(name, tuple(weight.shape), at.numpy(), values.numpy(), base=base.numpy()))
    return Adapter(tensors)


def margins_of(model: nn.Module, task: str, under: Head) -> list[float]:
    """On the held-out texts of a task, with the model as it is; see :func:`studies.bank.encoder.margins`."""
    held = train.tokens(task)["test"]
    return margins(features(model, held), under, held.labels)


def work(run: FusionRun) -> dict[str, Any]:
    """Do one run; a merge that is the same as one before, as many are of disjoint masks, is not tried again."""
    begin = time.perf_counter()
    with showing_fused(run) as model:
        merged = time.perf_counter()
        state = _state(model)
        if (run.members, run.form, run.seed, state) not in _known:
            _known[run.members, run.form, run.seed, state] = margins_of_all(model, run)
        found = _known[run.members, run.form, run.seed, state]
    more = {} if run.form != SHIPPED else {"alone": _alone(run), "base": _without(run)}
    return more | {
        "margins": found, "merge_seconds": round(merged - begin, 2), "seconds": round(time.perf_counter() - begin, 2)
    }  # fmt: skip


def _alone(run: FusionRun) -> dict[str, list[float]]:
    """Margins with each part alone, for parts that the bank does not have."""
    found = {}
    for task in run.tasks:
        part = BankRun(task, run.form, run.seed)
        with encoder().showing(adapter(part)) as model:
            found[task] = margins_of(model, task, head(part))
    return found


def _without(run: FusionRun) -> dict[str, list[float]]:
    """Margins of the unchanged encoder under the heads of the parts."""
    return {
        task: margins(
            train.base_features(task), head(BankRun(task, run.form, run.seed)), train.tokens(task)["test"].labels
        )
        for task in run.tasks
    }


_known: dict[tuple[str, str, int, str], dict[str, list[float]]] = {}


def _state(model: nn.Module) -> str:
    """A digest of all parameters."""
    digest = hashlib.sha256()
    for name, one in model.named_parameters():
        digest.update(name.encode())
        digest.update(one.detach().numpy().tobytes())
    return digest.hexdigest()


def margins_of_all(model: nn.Module, run: FusionRun) -> dict[str, list[float]]:
    """On the held-out texts of each part's task under the head of that part."""
    return {task: margins_of(model, task, head(BankRun(task, run.form, run.seed))) for task in run.tasks}


@contextmanager
def showing(run: BankRun, alpha: float = 1.0) -> Iterator[nn.Module]:
    """The encoder with one adapter of the bank at a strength."""
    if FORMS[run.form].kind == "lora":
        with loras(run.seed).showing([run.task], [alpha]) as model:
            yield model
    else:
        with encoder().showing(adapter(run), alpha) as model:
            yield model


@contextmanager
def showing_fused(run: FusionRun, alpha: float = 1.0) -> Iterator[nn.Module]:
    """The encoder with several adapters of the bank, fused, at a strength."""
    merge = merges_of(run.form)[run.merge]
    if is_lora(run.form):
        with showing_loras(loras(run.seed), run.tasks, merge, alpha) as model:
            yield model
    else:
        with encoder().showing(fused(run, merge), alpha) as model:
            yield model


@contextmanager
def showing_loras(of: LoraEncoder, names: list[str], merge: Merge, alpha: float = 1.0) -> Iterator[nn.Module]:
    """The encoder with several LoRAs, fused by PEFT, at a strength."""
    weights = [alpha / len(names) if merge.halved else alpha] * len(names)
    with of.showing(names, weights, merge.method, **merge.options) as model:
        yield model


def merged(adapters: Sequence[Adapter], merge: Merge) -> Adapter:
    """Sparse adapters, fused without training."""
    options = dict(merge.options) | ({"density": 1 / len(adapters)} if merge.share else {})
    return open_merge(adapters, method=merge.method, options=options).adapter()


def fused(run: FusionRun, merge: Merge) -> Adapter:
    """The fused adapter of a sparse form."""
    parts = [BankRun(task, run.form, run.seed) for task in run.tasks]
    adapters = [adapter(part) for part in parts]
    if merge.method != "distilled":
        return merged(adapters, merge)
    settings = _place.bank.settings()
    count = max(1, round(TEXTS * settings.steps)) * BATCH
    teachers = [
        Part(
            one,
            head(part),
            list(some(train.tokens(part.task)["train"], count, run.seed + 2 * train.ORDER).batches(BATCH)),
        )
        for part, one in zip(parts, adapters, strict=True)
    ]
    torch.manual_seed(run.seed)
    return distilled(_place.base, open_merge(adapters, method="linear").adapter(), teachers, run.seed)
