"""One training on a number of examples."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shira_format.masks import make_mask
from shira_format.training.sparse import sparse_parameters
from studies.bank.encoder import base_model, features, head_of, margins, tokens_of
from studies.data.plan import ENTRIES, HEADS, HELD, LOOKS, SIZES, TOKENS, DataRun, rate_of
from studies.learning import BATCH, Tokens, quiet, train, with_head
from studies.loras import add_lora, lora_parameters
from studies.masks import ALL, MATRICES

ORDER = 1000  # added to a run's seed for the order of texts


@dataclass
class _Place:
    texts: Path = Path()
    base: Path = Path()


_place = _Place()


def start(texts: Path, base: Path) -> None:
    """Before the first run: where the texts and the model are."""
    quiet()
    torch.set_num_threads(1)
    _place.texts, _place.base = texts, base


def _tokens(task: str) -> dict[str, Tokens]:
    return tokens_of(_place.texts, _place.base, task, TOKENS)


def balanced(tokens: Tokens, count: int, seed: int) -> Tokens:
    """Examples drawn by the seed, half of each class, in a mixed order; all if there are no more."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=draws)
    half = [order[tokens.labels[order] == label][: count // 2] for label in (0, 1)]
    chosen = torch.cat(half)
    return tokens[chosen[torch.randperm(len(chosen), generator=draws)]]


@lru_cache(maxsize=1)
def _started(task: str, count: int, seed: int) -> tuple[nn.Module, Tokens, list[float]]:
    """The encoder with its head, the examples, and the margins on held-out texts of the head alone."""
    examples = balanced(_tokens(task)["train"], count, seed)
    model = with_head(base_model(_place.base), examples[slice(0, HEADS)], seed)
    held = _tokens(task)["test"][slice(0, HELD)]
    return model, examples, margins(features(model, held), head_of(model), held.labels)


def work(run: DataRun) -> dict[str, Any]:
    """Do one run; ``during`` has the margins by the step after which they were taken, but for the last."""
    begin = time.perf_counter()
    known, examples, alone = _started(run.task, run.count, run.seed)
    model = copy.deepcopy(known)
    parameters = _lora(model, run) if run.method == "lora" else _sparse(model, run)
    parts = _tokens(run.task)
    held = parts["test"][slice(0, HELD)]
    seen: dict[str, list[float]] = {}

    def look(step: int) -> None:
        if step in LOOKS or step == run.steps:
            seen[str(step)] = margins(features(model, held), head_of(model), held.labels)

    course = train(
        model, parameters, examples, parts["validation"][slice(0, BATCH)],
        steps=run.steps, rate=rate_of(run.method, run.size), seed=run.seed + ORDER, after=look,
    )  # fmt: skip
    return {
        "margins": seen.pop(str(run.steps)), "start": alone, "during": seen,
        "examples": len(examples), "entries": sum(one.numel() for one in parameters), "loss": course.train[-1],
        "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def _lora(model: nn.Module, run: DataRun) -> list[Any]:
    add_lora(model, *SIZES[run.size], run.seed)
    return lora_parameters(model)


def _sparse(model: nn.Module, run: DataRun) -> list[Any]:
    mask = make_mask(model, "wm", density=ENTRIES[run.size] / ALL, include=[MATRICES], threads=1)
    return list(sparse_parameters(model, mask).parameters())
