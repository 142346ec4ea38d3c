"""How much of a source's effect on a model's outputs an adapter keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Effect:
    """An adapter's outputs compared with those of the base and of the source it was made from.

    Attributes:
        kept: R², ``1 - ||adapter - source||² / ||base - source||²`` over all outputs: 1 if the outputs equal the source's,
            0 if they are no closer than the base's, negative if they are farther. For a source without effect, 1 if the
            outputs are equal, else 0.
        cosine: the cosine between ``adapter - base`` and ``source - base``: whether the outputs move in the same direction,
            regardless of size.
    """

    kept: float
    cosine: float


def effect(base: Floats, source: Floats, adapter: Floats) -> Effect:
    """Compare outputs (logits, embeddings) of the same shape on the same inputs."""
    # float64 before subtracting: in float32, different outputs could have equal differences to the base.
    base, source, adapter = (outputs.astype(np.float64).ravel() for outputs in (base, source, adapter))
    wanted, moved = source - base, adapter - base
    norm, missed = float(np.linalg.norm(wanted)), float(np.linalg.norm(adapter - source))
    both = norm * float(np.linalg.norm(moved))
    kept = 1.0 - (missed / norm) ** 2 if norm else float(missed == 0)
    return Effect(kept=kept, cosine=float(wanted @ moved) / both if both else 0.0)


def accuracy(logits: Floats, labels: npt.NDArray[np.integer[Any]]) -> float:
    """Share of rows of ``[n, classes]`` logits whose argmax is the label."""
    return float(np.mean(logits.argmax(axis=1) == labels))
