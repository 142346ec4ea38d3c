"""One run: an adapter for each task, alone, and both fused."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shira_format.adapter import Adapter
from shira_format.training.sparse import sparse_parameters
from studies import mask_runs
from studies.bank.encoder import Encoder, Head, LoraEncoder, base_model, features, head_of, margins
from studies.choice.plan import HEAD, HELD, LORAS, TASKS, ChoiceRun
from studies.fusion.fuse import merged, showing_loras
from studies.fusion.plan import MERGES, PEFT
from studies.learning import BATCH, Tokens, train
from studies.loras import add_lora, lora_parameters
from studies.masks import METHODS

FUSED = ("sum", "average")


@dataclass
class _Place:
    base: Path = Path()


_place = _Place()


def start(texts: Path, base: Path) -> None:
    """Before the first run: where the texts and the model are."""
    mask_runs.start(texts, base)
    _place.base = base


@dataclass(frozen=True)
class Part:
    """What was trained for a task.

    Attributes:
        adapter: in memory; of a LoRA PEFT's folder; None: the head alone was trained.
        head: that was trained with it.
        entries: of the adapter.
        loss: of the last steps.
        margins: on held-out texts, see :func:`studies.bank.encoder.margins`.
    """

    adapter: Adapter | Path | None
    head: Head
    entries: int
    loss: float
    margins: list[float]


@lru_cache
def _encoder() -> Encoder:
    return Encoder(_place.base)


def _held(task: str) -> Tokens:
    return mask_runs.tokens_of(task)["test"][slice(0, HELD)]


@lru_cache(maxsize=len(TASKS))
def _base_features(task: str) -> Tensor:
    return features(base_model(_place.base), _held(task))


def work(run: ChoiceRun) -> dict[str, Any]:
    """Do one run."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shira-studies-") as scratch:
        parts = {task: _trained(run, task, Path(scratch) / task) for task in TASKS}
        trained = time.perf_counter()
        fused = {name: _fused(parts, name) for name in FUSED} if run.method != HEAD else {}
    return {
        "margins": {task: part.margins for task, part in parts.items()},
        "base": {task: margins(_base_features(task), parts[task].head, _held(task).labels) for task in TASKS},
        **fused,
        "entries": {task: part.entries for task, part in parts.items()},
        "loss": {task: part.loss for task, part in parts.items()},
        "train_seconds": round(trained - begin, 2), "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def _trained(run: ChoiceRun, task: str, folder: Path) -> Part:
    model = copy.deepcopy(mask_runs.started(task, run.seed))
    texts = mask_runs.tokens_of(task)
    wrapped = training = None
    parameters: list[Any] = []
    if run.method == "lora":
        rank, where, ranks = LORAS[run.density]
        wrapped = add_lora(model, rank, where, run.seed, ranks)
        parameters = lora_parameters(model)
    elif run.method != HEAD:
        # What is drawn, a random mask say, is another for each task.
        drawn = 100 * run.seed + TASKS.index(task)
        mask = mask_runs.mask_of(model, METHODS[run.method], run.mask_options, texts["train"], drawn)
        training = sparse_parameters(model, mask)
        parameters = training.parameters()
    course = train(
        model, parameters, texts["train"], texts["validation"][slice(0, BATCH)],
        steps=run.steps, rate=run.rate, seed=run.seed + mask_runs.ORDER,
    )  # fmt: skip
    head, held = head_of(model), _held(task)
    alone = margins(features(model, held), head, held.labels)
    adapter: Adapter | Path | None = None
    if wrapped is not None:
        wrapped.save_pretrained(str(folder))
        adapter = folder
    elif training is not None:
        adapter = training.adapter(self_contained=True)
        training.detach()
    return Part(adapter, head, sum(one.numel() for one in parameters), course.train[-1], alone)


def _fused(parts: dict[str, Part], merge: str) -> dict[str, list[float]]:
    """Margins of both tasks, each under its own head."""
    with _showing(parts, merge) as model:
        return {
            task: margins(features(model, _held(task)), part.head, _held(task).labels)
            for task, part in parts.items()
        }


@contextmanager
def _showing(parts: dict[str, Part], merge: str) -> Iterator[nn.Module]:
    folders = {task: part.adapter for task, part in parts.items() if isinstance(part.adapter, Path)}
    if folders:
        with showing_loras(LoraEncoder(_place.base, folders), list(folders), PEFT[merge]) as model:
            yield model
    else:
        adapters = [part.adapter for part in parts.values() if isinstance(part.adapter, Adapter)]
        with _encoder().showing(merged(adapters, MERGES[merge])) as model:
            yield model
