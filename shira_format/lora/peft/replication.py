"""``layer_replication``: a model of layers of the base, some of them several times, each with a LoRA of its own.

Each layer of the result is the base's layer with its own update, as PEFT's forward pass has it. Its ``merge_and_unload``
adds all updates to the weight that the repeated layers share, and gives another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.peft.config import Config

# Where PEFT looks for the list of layers: model.model.layers, bert.encoder.layer or h.
_LAYER = re.compile(
    r"(?P<stem>(?:model\.)*layers|(?:model\.|bert\.)*encoder\.layer|(?:model\.)*h)\.(?P<number>0|[1-9][0-9]{0,8})\.(?P<rest>.+)"
)
_MOST = 10_000  # layers of a result


@dataclass(frozen=True)
class Replication:
    """What becomes of the base.

    Attributes:
        copies: from new names of tensors to those of the base, where they differ.
        removed: names that the result lacks.
        layers: how many there are in the end; 0 if nothing is replicated.
    """

    copies: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    layers: int = 0


def replication(config: Config, base: Checkpoint) -> Replication:
    """Lay the layers out as ``layer_replication`` says.

    Raises:
        SourceError: the base has no such layers.
    """
    if not config.replication:
        return Replication()
    found = _layers(base)
    if len(found) != 1:
        raise SourceError(
            f"{config.path}: layer_replication is set, and the base has {'no list' if not found else 'several lists'} of "
            "layers where PEFT looks for one"
        )
    ((stem, layers),) = found.items()
    count = 1 + max(layers)
    if sum(max(0, end - first) for first, end in config.replication) > _MOST:
        raise SourceError(f"{config.path}: layer_replication makes more than {_MOST} layers")
    order = [number for first, end in config.replication for number in range(first, end)]
    if not order or max(order) >= count:
        raise SourceError(
            f"{config.path}: layer_replication names layers up to {max(order, default=0)}, the base has {count}"
        )
    copies = {
        f"{stem}.{new}.{rest}": f"{stem}.{old}.{rest}"
        for new, old in enumerate(order)
        for rest in layers.get(old, ())
        if new != old
    }
    ours = {f"{stem}.{new}.{rest}" for new, old in enumerate(order) for rest in layers.get(old, ())}
    removed = [
        name
        for number, rests in layers.items()
        for rest in rests
        if (name := f"{stem}.{number}.{rest}") not in ours
    ]
    return Replication(copies, sorted(removed), len(order))


def _layers(names: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """Names in each layer, by the list of layers."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if match := _LAYER.fullmatch(name):
            found.setdefault(match["stem"], {}).setdefault(int(match["number"]), []).append(match["rest"])
    return found
