"""How much of a source's effect on a model some entries keep, measured on inputs that were held out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira_format._core.arrays import Array
from shira_format.convert.fit.task import (
    Entries,
    Seen,
    SourceOutputs,
    Task,
    inputs_of,
    see,
    showing,
    showing_base,
)

KEPT = 1 << 28  # bytes of the source's outputs that are kept; beyond that they are computed again
_DRAWS, _LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Effect:
    """How near a model is to the source.

    Attributes:
        r2: ``1 - sum |z - z_source|^2 / sum |z_base - z_source|^2`` over all outputs: 1 is the source, 0 no nearer than the base.
        low: of the 95 % interval of ``r2`` by bootstrap over the inputs.
        high: likewise.
        kl: mean KL divergence from the source's distribution, in nats; None if outputs are no logits.
        agreement: share of outputs with the source's first choice; likewise.
        cosine: mean cosine of the outputs to the source's; None if they are logits.
        layers: by layer, ``sum |h - h_source|^2 / sum |h_base - h_source|^2``; nan for a layer that the source does not change.
        inputs: how many there were.
    """

    r2: float
    low: float
    high: float
    kl: float | None
    agreement: float | None
    cosine: float | None
    layers: dict[str, float] = field(default_factory=dict)
    inputs: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: six digits, and None for what is no number."""
        return {key: _plain(value) for key, value in asdict(self).items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def effect(task: Task, entries: Entries) -> Effect:
    """Measure entries, rounded as a file rounds them, on the held-out inputs.

    What the source and the base do is computed once for each task, and the source's outputs are kept if they are small.
    """
    if task.reference is None:
        task.reference = _Reference(task)
    with showing(task, entries):
        return _compared(task.reference, task)


class _Reference:
    """The source's outputs on the held-out inputs, and how far from them the base is."""

    def __init__(self, task: Task) -> None:
        self.source = SourceOutputs(task, task.held, KEPT)
        self.base = _Distances(task)
        with showing_base(task):
            for number, batch in enumerate(task.held):
                self.base.add(batch, self.source[number], _seen(task, batch))


def _seen(task: Task, batch: Any) -> Seen:
    with torch.no_grad():
        return see(task, batch)


class _Distances:
    """Sums over batches of how far a model is from the source."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.squares: list[Array] = []  # for each batch, of each input
        self.layers = np.zeros(len(task.layers))
        self.rows, self.kl, self.same, self.cosine = 0, 0.0, 0, 0.0

    def add(self, batch: Any, source: Seen, here: Seen) -> None:
        want, found = source.outputs.float(), here.outputs.float()
        each = (found - want).square().sum(1).double().cpu().numpy()
        where = inputs_of(batch, len(each))
        self.squares.append(np.bincount(where, each))
        self.rows += len(each)
        if self._task.is_logits:
            self.kl += float(kl_divergence(found, want).sum(dtype=torch.float64))
            self.same += int((found.argmax(1) == want.argmax(1)).sum())
        else:
            self.cosine += float(torch.cosine_similarity(found, want, dim=1).double().sum())
        for number, (one, other) in enumerate(zip(here.hidden, source.hidden, strict=True)):
            self.layers[number] += float((one.float() - other.float()).square().sum(dtype=torch.float64))


def kl_divergence(found: Tensor, want: Tensor) -> Tensor:
    """``[rows]``: KL divergence of ``softmax(found)`` from ``softmax(want)``, in nats."""
    target = want.log_softmax(1)
    return (target.exp() * (target - found.log_softmax(1))).sum(1)


def _compared(reference: _Reference, task: Task) -> Effect:
    here = _Distances(task)
    for number, batch in enumerate(task.held):
        here.add(batch, reference.source[number], _seen(task, batch))
    error, base = np.concatenate(here.squares), np.concatenate(reference.base.squares)
    low, high = _interval(error, base)
    with np.errstate(divide="ignore", invalid="ignore"):
        layers = here.layers / reference.base.layers
    return Effect(
        _r2(error.sum(), base.sum()), low, high,
        kl=here.kl / here.rows if task.is_logits else None,
        agreement=here.same / here.rows if task.is_logits else None,
        cosine=None if task.is_logits else here.cosine / here.rows,
        layers=dict(zip(task.layers, map(float, layers), strict=True)), inputs=len(error),
    )  # fmt: skip


def _r2(error: float, base: float) -> float:
    return float(1 - error / base) if base else float("nan")


def _interval(error: Array, base: Array) -> tuple[float, float]:
    """The bootstrap interval of R^2 over inputs, by percentiles (Efron and Tibshirani 1993, chapter 13); the same each time."""
    drawn = np.random.default_rng(0).integers(len(error), size=(_DRAWS, len(error)))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 1 - error[drawn].sum(1) / base[drawn].sum(1)
    low, high = (
        np.nanquantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        if np.isfinite(found).any()
        else (np.nan, np.nan)
    )
    return float(low), float(high)
