"""Sentence embeddings of a transformers encoder, to measure what an adapter does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.measures.model_outputs import rows_of

Floats = npt.NDArray[np.floating[Any]]


def embed(model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 16, length: int = 128) -> npt.NDArray[np.float32]:  # fmt: skip
    """One unit vector per text, float32 ``[texts, hidden]``, in the order of ``texts``.

    Mean pooling of the last hidden states over the text's tokens, normalized, as for MiniLM. Texts are truncated to ``length``
    tokens; texts of similar length share a batch, to save padding.

    Args:
        model: an ``AutoModel`` on the CPU; it is set to evaluation mode.
        tokenizer: its tokenizer.
        texts: at least one.
        batch: texts per batch.
        length: maximum tokens per text.
    """
    import torch

    def rows(inputs: Any, output: Any) -> Any:
        own = inputs["attention_mask"].unsqueeze(-1).float()
        means = (output.last_hidden_state.float() * own).sum(1) / own.sum(1)
        return torch.nn.functional.normalize(means)

    return rows_of(model, tokenizer, texts, rows, batch=batch, length=length)


def mean_cosine(a: Floats, b: Floats) -> float:
    """The mean cosine between corresponding rows of two ``[n, d]`` arrays.

    Raises:
        ValueError: the shapes differ, there are no rows, or a row is zero or not finite.
    """
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"embeddings of shapes {a.shape} and {b.shape} cannot be compared row by row")
    first, second = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError("an embedding is zero or not finite: its cosine is undefined")
    return float(np.mean(np.sum(first * second, axis=1) / norms))
