"""A merge that is distilled from its parts: on the texts of each part it is taught by that part, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shira_format.adapter import Adapter
from shira_format.training.sparse import SparseParameters, sparse_parameters, take_adapter
from studies.bank.encoder import Encoder, Head
from studies.learning import Tokens

RATE = 1e-3  # the highest; it falls as a cosine
HIDDEN = 0.3  # weight of the hidden states beside the logits, as in the fits


@dataclass(frozen=True)
class Part:
    """A part and what it teaches.

    Attributes:
        adapter: of the part.
        head: of its task.
        batches: its texts.
    """

    adapter: Adapter
    head: Head
    batches: Sequence[Tokens]


@dataclass(frozen=True)
class _Seen:
    """What an encoder makes of a batch.

    Attributes:
        logits: under the part's head, ``[texts, 2]``.
        hidden: of each layer at the positions of words, ``[positions, width]``.
    """

    logits: Tensor
    hidden: list[Tensor]

    def apart(self, other: _Seen) -> tuple[Tensor, list[Tensor]]:
        """Mean squared differences, of the logits and of each layer."""
        layers = [(a - b).square().mean() for a, b in zip(self.hidden, other.hidden, strict=True)]
        return (self.logits - other.logits).square().mean(), layers


def _see(model: nn.Module, batch: Tokens, head: Head) -> _Seen:
    encoder: Any = model.get_submodule("bert")
    found = encoder(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
    words = batch.mask != 0
    return _Seen(found.pooler_output @ head[0].T + head[1], [one[words] for one in found.hidden_states[1:]])


def distilled(base: Path, start: Adapter, parts: Sequence[Part], seed: int) -> Adapter:
    """Train the entries of ``start``, once through all batches, so that the encoder does on each part's texts what the part does.

    The loss of a batch is the squared distance of logits and hidden states to those with the part, each divided by what it is of the
    base, as in a distillation of one source.

    Args:
        base: folder of the model.
        start: a merge of the parts: its entries are trained, from its values.
        parts: the teachers.
        seed: of the order of the batches.
    """
    encoder = Encoder(base)
    taught = [_taught(encoder, part) for part in parts]
    scales = [_scales(encoder.model, part, seen) for part, seen in zip(parts, taught, strict=True)]
    training = sparse_parameters(encoder.model, start)
    take_adapter(training, start, None)
    pairs = [(number, at) for number, part in enumerate(parts) for at in range(len(part.batches))]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = torch.optim.Adam(training.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(len(order)))
    for place in order:
        number, at = pairs[place]
        part = parts[number]
        logits, layers = _see(encoder.model, part.batches[at], part.head).apart(taught[number][at])
        of_logits, of_layers = scales[number]
        hidden = torch.stack([one / scale for one, scale in zip(layers, of_layers, strict=True)]).mean()
        (logits / of_logits + HIDDEN * hidden).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return _ended(training)


def _cosine(steps: int) -> Any:
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))


def _ended(training: SparseParameters) -> Adapter:
    found = training.adapter(self_contained=True)
    training.detach(restore=True)
    return found


@torch.no_grad()
def _taught(encoder: Encoder, part: Part) -> list[_Seen]:
    with encoder.showing(part.adapter) as model:
        return [_see(model, batch, part.head) for batch in part.batches]


@torch.no_grad()
def _scales(model: nn.Module, part: Part, taught: Sequence[_Seen]) -> tuple[float, list[float]]:
    """How far the base is from the part, on a quarter of its texts."""
    some = range(0, len(taught), 4)
    found = [_see(model, part.batches[at], part.head).apart(taught[at]) for at in some]
    logits = sum(float(one) for one, _ in found) / len(found)
    layers = [sum(float(one[layer]) for _, one in found) / len(found) for layer in range(len(found[0][1]))]
    return logits, layers
