"""Sentence embeddings of an encoder of transformers, to see what an adapter of it does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.measures.model_outputs import rows_of

Floats = npt.NDArray[np.floating[Any]]


def embed(model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 16, length: int = 128) -> npt.NDArray[np.float32]:  # fmt: skip
    """One vector of length 1 a text, float32 ``[texts, hidden]``, in the order of ``texts``.

    The mean of the last hidden states over a text's own tokens, normalised, as MiniLM and its kin are used. Texts are
    cut after ``length`` tokens; those of like length share a batch, so that little is computed on padding.

    Args:
        model: such as ``AutoModel`` gives, on the CPU; it is put into evaluation mode.
        tokenizer: its tokenizer.
        texts: at least one.
        batch: texts at a time.
        length: tokens of a text that count.
    """
    import torch

    def rows(inputs: Any, output: Any) -> Any:
        own = inputs["attention_mask"].unsqueeze(-1).float()
        means = (output.last_hidden_state.float() * own).sum(1) / own.sum(1)
        return torch.nn.functional.normalize(means)

    return rows_of(model, tokenizer, texts, rows, batch=batch, length=length)


def mean_cosine(a: Floats, b: Floats) -> float:
    """The mean over the rows of two ``[n, d]`` arrays of the cosine between a row and its counterpart.

    Raises:
        ValueError: the shapes differ, there are no rows, or a row is zero or not finite: it has no direction.
    """
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"embeddings of shapes {a.shape} and {b.shape} have no pairs of rows")
    first, second = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError("a row that is zero or not finite has no direction")
    return float(np.mean(np.sum(first * second, axis=1) / norms))
