"""One small model: pretrained, tuned whole, or tuned in some of its entries."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shira_format.convert.fit.distill import Distillation, distill
from shira_format.convert.fit.task import Task, blocks_of, showing
from shira_format.masks import make_mask
from shira_format.training.sparse import sparse_parameters
from studies import texts
from studies.learning import quiet
from studies.scale.plan import BATCH, CORPUS, HELD, LENGTH, PRETRAINING, TARGET, TUNING, ScaleRun

MATRICES = r"layers\.\d+\..*_proj\.weight$"
RATE, TUNED_RATE = 0.64, 0.13  # over the hidden size: the wider, the smaller
# Of the trained entries: as in the study of masks, where 0.78 % did best at 0.01 and the rate fell with the root of the size.
SPARSE_RATE, AT = 1e-2, 0.0078


@dataclass
class _Place:
    texts: Path = Path()
    models: Path = Path()


_place = _Place()


def start(folder: Path, models: Path) -> None:
    """Before the first run: where the texts are, and where models are kept."""
    quiet()
    torch.set_num_threads(1)
    _place.texts, _place.models = folder, models


def _passages(parts: Iterable[str]) -> Tensor:
    """Texts one after the other as bytes, cut into passages: ``[passages, LENGTH]``, int64."""
    data = "\n".join(parts).encode()
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int64)
    return whole[: len(whole) // LENGTH * LENGTH].view(-1, LENGTH)


@lru_cache
def _texts(task: str, part: str) -> Tensor:
    return _passages(text for text, _ in texts.read(_place.texts / f"{task}.json")[part])


@lru_cache
def _corpus() -> Tensor:
    return torch.cat([_texts(task, "train") for task in CORPUS if (_place.texts / f"{task}.json").exists()])


def _held() -> Tensor:
    return _texts(TARGET, "test")[:HELD]


def new_model(hidden: int, layers: int, seed: int) -> nn.Module:
    """A causal language model of bytes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def _path(run: ScaleRun) -> Path:
    return _place.models / f"{run.hidden}-{run.layers}-{run.method}-{run.seed}-{run.steps}.safetensors"


def _keep(model: nn.Module, run: ScaleRun) -> None:
    from safetensors.torch import save_file

    path = _path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: one.detach().clone() for name, one in model.named_parameters()}, new)
    os.replace(new, path)


def _load(run: ScaleRun) -> nn.Module:
    from safetensors.torch import load_file

    model = new_model(run.hidden, run.layers, run.seed)
    model.load_state_dict(load_file(_path(run)), strict=False)
    return model.requires_grad_(False)


def _each(model: nn.Module, passages: Tensor) -> Tensor:
    """Cross-entropy of the next byte, nats, for each passage."""
    logits = model(input_ids=passages).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), passages[:, 1:], reduction="none")
    return losses.mean(1)


@torch.no_grad()
def losses_of(model: nn.Module, passages: Tensor) -> list[float]:
    """Of each passage, nats a byte."""
    found = torch.cat([_each(model, some) for some in torch.split(passages, BATCH)])
    return [round(one, 4) for one in found.tolist()]


def _order(count: int, steps: int, seed: int) -> Iterable[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (BATCH,), generator=draws)


def _train(model: nn.Module, parameters: list[Any], passages: Tensor, steps: int, rate: float, seed: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for at in _order(len(passages), steps, seed):
        _each(model, passages[at]).mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    import re

    return {name: one for name, one in model.named_parameters() if re.search(MATRICES, name)}


def work(run: ScaleRun) -> dict[str, Any]:
    """Do one run."""
    begin = time.perf_counter()
    made = {"base": _base, "full": _full, "trained": _trained, "fitted": _fitted}[run.method](run)
    return made | {"seconds": round(time.perf_counter() - begin, 2)}


def _tuning(run: ScaleRun) -> int:
    return max(1, run.steps * TUNING // PRETRAINING)


def _base(run: ScaleRun) -> dict[str, Any]:
    model = new_model(run.hidden, run.layers, run.seed)
    _train(model, list(model.parameters()), _corpus(), run.steps, RATE / run.hidden, run.seed)
    _keep(model, run)
    sizes = {"parameters": sum(one.numel() for one in model.parameters())}
    return {"losses": losses_of(model, _held()), "entries": 0, **sizes}


def _full(run: ScaleRun) -> dict[str, Any]:
    model = _load(run.base)
    chosen = _matrices(model)
    for one in chosen.values():
        one.requires_grad_(True)
    _train(
        model, list(chosen.values()), _texts(TARGET, "train"), _tuning(run), TUNED_RATE / run.hidden, run.seed + 1
    )
    _keep(model, run)
    return {"losses": losses_of(model, _held()), "entries": sum(one.numel() for one in chosen.values())}


def _trained(run: ScaleRun) -> dict[str, Any]:
    model = _load(run.base)
    training = sparse_parameters(model, make_mask(model, "wm", density=run.density, include=[MATRICES], threads=1))
    rate = SPARSE_RATE * math.sqrt(AT / run.density)
    _train(model, list(training.parameters()), _texts(TARGET, "train"), _tuning(run), rate, run.seed + 1)
    return {"losses": losses_of(model, _held()), "entries": training.nnz}


def _fitted(run: ScaleRun) -> dict[str, Any]:
    """On the passages of the fine-tune, once each, against its logits and hidden states."""
    model, tuned = _load(run.base), _load(run.full)
    source = {name: copy.deepcopy(one.data) for name, one in _matrices(tuned).items()}
    passages = _texts(TARGET, "train")
    batches = [{"input_ids": passages[at]} for at in _order(len(passages), _tuning(run), run.seed + 1)]
    task = Task(
        model, source, {}, batches, [], lambda output, _: output.logits.flatten(0, 1), is_logits=True, is_causal=True,
        layers=blocks_of(model),
    )  # fmt: skip
    budget = round(run.density * task.numel)
    found = distill(task, budget, seed=run.seed, options=Distillation(steps=_tuning(run)))
    with showing(task, found):
        return {"losses": losses_of(model, _held()), "entries": budget}
