"""Inputs of several adapters that are fitted together, where each adapter alone is the example on inputs of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shira_format.convert.fit.data import Data, Inputs, Split, read_inputs
from shira_format.convert.fit.task import Task, TaughtBatch
from shira_format.errors import SourceError


@dataclass(frozen=True)
class Part:
    """One adapter's inputs.

    Attributes:
        data: to fit on; see :data:`shira_format.convert.fit.data.Data`.
        held: other inputs to measure on; None: a share of ``data``.
        weights: computes what the adapter makes of the parameters that it changes, by the model's names.
    """

    data: Data
    held: Data | None
    weights: Callable[[], dict[str, Tensor]]


def part_inputs(task: Task, parts: Sequence[Part], split: Split, tokenizer: Any) -> Inputs:
    """The inputs of all parts, each batch with the weights to follow on it; of parameters that a part leaves alone, the base's.

    The model shows the base.

    Raises:
        SourceError: inputs that are not texts or named arrays, or see :func:`shira_format.convert.fit.data.read_inputs`.
    """
    base = {name: task.parameter(name).detach().clone() for name in task.source}
    found = Inputs([], [], (0, 0), {"name": "inputs of each adapter", "parts": []})
    for part in parts:
        weights = base | part.weights()
        read = read_inputs(part.data, split, tokenizer, part.held)
        found.train += [_taught(batch, weights) for batch in read.train]
        found.held += [_taught(batch, weights) for batch in read.held]
        found.counts = (found.counts[0] + read.counts[0], found.counts[1] + read.counts[1])
        found.source["parts"].append(read.source)
        found.notices += read.notices
    return found


def _taught(batch: Any, weights: dict[str, Tensor]) -> TaughtBatch:
    if not isinstance(batch, Mapping):
        raise SourceError(
            "inputs of each adapter are texts, arrays by name, or batches of keyword arguments; these are "
            f"{type(batch).__name__}"
        )
    return TaughtBatch(batch, weights)
