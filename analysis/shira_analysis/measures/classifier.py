"""Runs a transformers text classifier over texts, to measure what an adapter does to its logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.measures.model_outputs import rows_of


@dataclass(frozen=True)
class LabelledTexts:
    """Labelled texts, from a file with one ``{"text": ..., "label": ...}`` per line."""

    texts: list[str]
    labels: npt.NDArray[np.int64]

    @classmethod
    def read(cls, path: Path) -> LabelledTexts:
        """Read a ``.jsonl`` file."""
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return cls([row["text"] for row in rows], np.array([row["label"] for row in rows], np.int64))


def logits(model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 16, length: int = 128) -> npt.NDArray[np.float32]:  # fmt: skip
    """The model's logits, ``[texts, classes]``, in the order of ``texts``."""
    return rows_of(model, tokenizer, texts, lambda _, output: output.logits.float(), batch=batch, length=length)
