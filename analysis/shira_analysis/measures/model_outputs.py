"""Runs texts through a model in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def rows_of(
    model: Any, tokenizer: Any, texts: Sequence[str], rows: Callable[[Any, Any], Any], *, batch: int, length: int
) -> npt.NDArray[np.float32]:
    """One row per text, ``[texts, ...]``, in the order of ``texts``.

    Texts are truncated to ``length`` tokens; texts of similar length share a batch, to save padding.

    Args:
        model: a transformers model on the CPU; it is set to evaluation mode.
        tokenizer: its tokenizer.
        texts: at least one.
        rows: maps the tokenizer's tensors and the model's output to a tensor ``[batch, ...]``.
        batch: texts per batch.
        length: maximum tokens per text.
    """
    import torch

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Any] = [None] * len(texts)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            for i, row in zip(chosen, rows(inputs, model(**inputs)).numpy(), strict=True):
                found[i] = row
    return np.stack(found)
