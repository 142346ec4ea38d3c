"""What counts of a model's output: logits, embeddings or states, ``[rows, width]``, without padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shira_format.calibration.layers import attention_mask
from shira_format.errors import SourceError


def logits(output: Any, batch: Any) -> Tensor:
    """Logits: ``[texts, classes]`` of a classifier, ``[tokens, vocabulary]`` of a language model."""
    return _unpadded(_tensor(output, "logits"), batch)


def states(output: Any, batch: Any) -> Tensor:
    """The last hidden states, ``[tokens, width]``; of a denoiser its prediction, ``[inputs, elements]``."""
    return _unpadded(_tensor(output, "last_hidden_state", "sample"), batch)


def embeddings(output: Any, batch: Any) -> Tensor:
    """The mean of each text's last hidden states over its tokens, ``[texts, width]``, as sentence-transformers pools them."""
    found = _tensor(output, "last_hidden_state")
    mask = attention_mask(batch)
    if mask is None:
        return found.mean(1)
    wide = mask.to(found.device, found.dtype)[..., None]
    return (found * wide).sum(1) / wide.sum(1).clamp_min(1)


def _tensor(output: Any, *names: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in names:
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise SourceError(f"an output of type {type(output).__name__} has no {' or '.join(names)}: give outputs=")


def _unpadded(found: Tensor, batch: Any) -> Tensor:
    mask = attention_mask(batch)
    if mask is not None and found.ndim == 3 and found.shape[:2] == mask.shape:
        return found[mask.to(found.device) != 0]
    if found.ndim == 3:
        return found.reshape(-1, found.shape[-1])
    return found.flatten(1) if found.ndim > 2 else found
