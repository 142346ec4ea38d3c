"""One run of the study of masks, in a process that keeps texts and models between runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shira_format.adapter import Adapter
from shira_format.masks import Rule, Struct, make_mask
from shira_format.training.sparse import sparse_parameters
from shira_format.training.trained import TrainedEntries
from studies import texts
from studies.learning import (
    Score,
    Tokens,
    drawn_loss,
    load_model,
    loss_of,
    quiet,
    score,
    tokenize,
    train,
    with_head,
)
from studies.loras import add_lora, lora_parameters
from studies.masks import (
    ALPHAS,
    CALIBRATION,
    CHANGES,
    LENGTH,
    LORAS,
    MATRICES,
    METHODS,
    SCALED,
    SUMMED,
    MaskRun,
    Method,
)

HEAD_TEXTS = 512
WATCHED = 32  # validation texts
SCALED_TEXTS = 150  # held-out texts on which the strengths are compared
# What is added to a run's seed, so that the texts for gradients and the first steps are not those that the head was fitted to.
ORDER, GRADIENTS = 1000, 2000
GRADIENT_BATCH = 16


@dataclass
class _Place:
    folder: Path = Path()
    base: Path = Path()


_place = _Place()


def start(folder: Path, base: Path) -> None:
    """Before the first run: where the texts and the model are."""
    quiet()
    torch.set_num_threads(1)
    _place.folder, _place.base = folder, base


@lru_cache
def _base() -> nn.Module:
    return load_model(_place.base)


@lru_cache
def tokens_of(task: str) -> dict[str, Tokens]:
    """The texts of a task by part."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_place.base)
    parts = texts.read(_place.folder / f"{task}.json")
    return {part: tokenize(tokenizer, pairs, LENGTH) for part, pairs in parts.items()}


def _some(tokens: Tokens, count: int, seed: int) -> Tokens:
    """Texts drawn by the seed."""
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:count]]


@lru_cache(maxsize=3)
def started(task: str, seed: int) -> nn.Module:
    """The encoder with its fitted head."""
    return with_head(_base(), _some(tokens_of(task)["train"], HEAD_TEXTS, seed), seed)


@dataclass(frozen=True)
class Attached:
    """A model with what a method trains in it.

    Attributes:
        parameters: for the optimizer.
        entries: of the mask, of the LoRA's factors, or of the weights.
        scale: set the strength of what was trained, once it is.
    """

    parameters: list[Any]
    entries: int
    scale: Callable[[float], None] | None = None


def work(run: MaskRun) -> dict[str, Any]:
    """Do one run."""
    import copy

    begin = time.perf_counter()
    tokens = tokens_of(run.task)
    model = copy.deepcopy(started(run.task, run.seed))
    attached = attach(model, run)
    prepared = time.perf_counter()
    watched = tokens["validation"][slice(0, WATCHED)]
    course = train(
        model, attached.parameters, tokens["train"], watched, steps=run.steps, rate=run.rate, seed=run.seed + ORDER
    )
    trained = time.perf_counter()
    result = _result(score(model, tokens[run.part]))
    if run.method in SCALED and run.size == "large" and run.part == "test":
        assert attached.scale is not None
        result["alphas"] = {}
        some = tokens[run.part][slice(0, SCALED_TEXTS)]
        for alpha in ALPHAS:
            attached.scale(alpha)
            result["alphas"][str(alpha)] = round(score(model, some).accuracy, 5)
    return result | {
        "trained": sum(one.numel() for one in attached.parameters), "entries": attached.entries,
        "course": course.train, "watched": course.watched, "mask_seconds": round(prepared - begin, 2),
        "train_seconds": round(trained - prepared, 2), "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def _result(found: Score) -> dict[str, Any]:
    packed = np.packbits(np.array(found.right)).tobytes().hex()
    return {"accuracy": round(found.accuracy, 5), "loss": found.loss, "texts": len(found.right), "right": packed}


def attach(model: nn.Module, run: MaskRun) -> Attached:
    """Make what a method trains trainable."""
    if run.method == "head":
        return Attached([], 0)
    if run.method == "lora":
        return _lora(model, run)
    if run.method.startswith("full"):
        import re

        found = [one for name, one in model.named_parameters() if re.search(MATRICES, name)]
        for one in found:
            one.requires_grad_(True)
        return Attached(found, sum(one.numel() for one in found))
    return _sparse(model, run)


def _lora(model: nn.Module, run: MaskRun) -> Attached:
    from peft.tuners.lora import LoraLayer

    add_lora(model, *LORAS[run.size], run.seed)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    parameters = lora_parameters(model)

    def scale(alpha: float) -> None:
        for layer in layers:
            layer.set_scale("default", alpha)

    return Attached(parameters, sum(one.numel() for one in parameters), scale)


def _sparse(model: nn.Module, run: MaskRun) -> Attached:
    method = METHODS[run.method]
    mask = mask_of(model, method, method.mask_options(run.size), tokens_of(run.task)["train"], run.seed)
    training = sparse_parameters(model, mask, dora=method.dora)
    if method.regrown:
        every = max(run.steps // CHANGES, 1)
        training.regrow(run.steps, every=every, summed=min(every, SUMMED))
    nnz, entries = training.nnz, list[TrainedEntries]()

    trained = training.parameters()

    def scale(alpha: float) -> None:
        # Weights under training are written anew before each forward pass.
        if not entries:
            entries.extend(training.entries())
            training.detach()
        for one in entries:
            start, end = torch.from_numpy(one.base), torch.from_numpy(one.values)
            weight = model.get_parameter(one.name).data
            weight.view(-1)[torch.from_numpy(one.indices)] = start + alpha * (end - start)

    return Attached(trained, nnz, scale)


def mask_of(model: nn.Module, method: Method, size: Mapping[str, Any], texts: Tokens, seed: int) -> Adapter:
    """The mask of a method: gradients are those of training texts, with the head as it is.

    Args:
        model: with a head that was fitted.
        method: with a rule.
        size: what ``make_mask`` takes of size and place.
        texts: to train on, of which some are drawn.
        seed: of these, and of what the method draws.
    """
    rule: str | Rule = method.rule
    if method.rule in ("struct", "rows"):
        rule = Struct("rows", diagonal=0 if method.rule == "struct" else None, exact=True)
    options = dict(size) | {"threads": 1}
    if method.rule in ("grad", "snip", "gallop", "talos"):
        chosen = _some(texts, CALIBRATION, seed + GRADIENTS)
        own = method.rule == "talos"  # the Fisher information: text by text, labels of the model's own
        options |= {
            "batches": list(chosen.batches(1 if own else GRADIENT_BATCH)),
            "loss": drawn_loss(seed) if own else loss_of,
        }
    return make_mask(model, rule, seed=seed if rule == "rand" else 0, **options)
