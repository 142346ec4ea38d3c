"""``layer_replication``: a model of the base's layers, some of them repeated, each with its own LoRA.

Each layer of the result is the base's layer with its own update, as in PEFT's forward pass. ``merge_and_unload`` instead
adds all updates to the weight that the repeated layers share, which gives another model.
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
    """How the base's layers are rearranged.

    Attributes:
        copies: the base's names by new name, where they differ.
        removed: names that the result lacks.
        layers: number of layers in the result; 0 if nothing is replicated.
    """

    copies: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    layers: int = 0


def replicate_layers(config: Config, base: Checkpoint) -> Replication:
    """Arrange the base's layers as ``layer_replication`` says.

    Raises:
        SourceError: the base has no such layers.
    """
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
    kept = {f"{stem}.{new}.{rest}" for new, old in enumerate(order) for rest in layers.get(old, ())}
    removed = [
        name
        for number, rests in layers.items()
        for rest in rests
        if (name := f"{stem}.{number}.{rest}") not in kept
    ]
    return Replication(copies, sorted(removed), len(order))


def _layers(names: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """The lists of layers by name: the rests of tensor names in each layer."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if match := _LAYER.fullmatch(name):
            found.setdefault(match["stem"], {}).setdefault(int(match["number"]), []).append(match["rest"])
    return found
