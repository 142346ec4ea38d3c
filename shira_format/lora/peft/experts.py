"""LoRAs of parameters (``target_parameters``): those of experts, which are 3-D, and others, which are 2-D.

PEFT keeps ``lora_A`` as ``[experts * r, p]`` and ``lora_B`` as ``[q, r * experts]``. The rows of A go expert by expert.
The columns of B go rank by rank, all experts for each (``reshape(q, r, experts)``), which is easily taken for the other
order, and was: Unsloth's trainer did so until September 2026. Shapes cannot tell, so PEFT's order it is, unless the file
bears Unsloth's marks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.pairs import common_dtype, scaled
from shira_format.lora.peft.config import Config
from shira_format.lora.peft.keys import PeftLayer
from shira_format.lora.peft.places import Experts, Places
from shira_format.lora.products import LowRank, Stacked
from shira_format.lora.update import Update

_MOST = 4  # parameters of one module among which those of its wrappers are looked for


@dataclass(frozen=True)
class Choice:
    """A layer as the update of a certain parameter.

    Attributes:
        layer: with ``lora_A`` ``[experts * r, p]`` and ``lora_B`` ``[q, r * experts]``.
        parameter: its name.
        swapped: the parameter is ``[experts, q, p]``; None: it has one matrix alone, which is ``[q, p]``. Otherwise it is
            ``[experts, p, q]``.
    """

    layer: PeftLayer
    parameter: str
    swapped: bool | None


# For each module, all ways in which its layers fit its parameters.
_All = Collection[list[list[Choice]]]


class Parameters:
    """All layers that wrap parameters."""

    def __init__(self, places: Places, config: Config, where: object) -> None:
        self.places, self.config, self.where = places, config, where

    def updates(self, layers: Sequence[PeftLayer]) -> list[Update]:
        """The updates, in the order of the layers.

        Raises:
            SourceError: a pair of factors fits no parameter, or more than one.
        """
        modules: dict[str, list[PeftLayer]] = {}
        for layer in layers:
            modules.setdefault(layer.module, []).append(layer)
        found = {module: self._choices(group) for module, group in modules.items()}
        chosen = {module: self._one(module, choices, found.values()) for module, choices in found.items()}
        layouts = [choice.layer for choices in chosen.values() for choice in choices if self._experts(choice) > 1]
        grouped = bool(layouts) and self._grouped_by_expert()
        return [
            update for choices in chosen.values() for choice in choices for update in self._made(choice, grouped)
        ]

    def _choices(self, layers: Sequence[PeftLayer]) -> list[list[Choice]]:
        """All ways in which the layers of one module fit its parameters, which the keys do not name.

        Wrappers lie around each other, in the order in which the module's class makes its parameters: no file says it.
        """
        module, names = layers[0].module, self.places.parameters(layers[0])
        if sorted(layer.depth for layer in layers) != list(range(len(layers))):
            raise SourceError(
                f"{self.where}: {module!r} is wrapped more than once, and a key of a wrapper is missing"
            )
        if len(names) > _MOST:
            raise SourceError(f"{self.where}: target_parameters names {len(names)} parameters of {module!r}")
        for layer in layers:
            layer.pair(self.where)
            if extra := layer.parts.keys() - {"lora_A.weight", "lora_B.weight"}:
                raise SourceError(f"{self.where}: {module!r} is a parameter, and has {min(extra)}")
        ways = [[choice for name in names for choice in self._fits(layer, name)] for layer in layers]
        for layer, way in zip(layers, ways, strict=True):
            if not way:
                raise SourceError(
                    f"{self.where}: {self._shapes(layer)}, which fits none of {', '.join(map(self._named, names))}"
                )
        return list(_combined(ways))

    def _fits(self, layer: PeftLayer, name: str) -> Iterator[Choice]:
        a, b = layer.pair(self.where)
        shape = self.places.shape(name)
        if a.ndim != 2 or b.ndim != 2 or len(shape) not in (2, 3):
            return
        experts = shape[0] if len(shape) == 3 else 1
        if not a.shape[0] == b.shape[1] == self.config.scales.rank(name) * experts:
            return
        made = (b.shape[0], a.shape[1])
        if experts == 1:
            if shape[-2:] == made:
                yield Choice(layer, name, None)
            return
        if shape[1:] == made:
            yield Choice(layer, name, swapped=True)
        if shape[1:] == made[::-1]:
            yield Choice(layer, name, swapped=False)

    def _one(self, module: str, found: list[list[Choice]], all_found: _All) -> list[Choice]:
        """The one way that is left when what is known of the order of in and out is used."""
        if len(found) > 1 and (swapped := self._known_order(found, all_found)) is not None:
            found = [way for way in found if all(choice.swapped in (None, swapped) for choice in way)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(map(self._named, self.places.parameters(found[0][0].layer))) if found else ""
        raise SourceError(
            f"{self.where}: nothing tells which parameter each LoRA of {module!r} is for, or which way round: by their "
            f"shapes they fit {names} in more than one way; merge the LoRA with PEFT and convert the full checkpoint"
        )

    def _known_order(self, found: list[list[Choice]], all_found: _All) -> bool | None:
        """Which way round PEFT took 3-D parameters, if the version that wrote the file or other layers tell.

        Before 0.19 it took all for ``[experts, in, out]``, so that A goes with the first. Since then it asks the module
        (``is_transposed``); what transformers joined of linear layers is ``[experts, out, in]``.
        """
        old = self.config.weights_before_swap
        if old:
            return False
        seen = set()
        for ways in all_found:
            if len(ways) == 1:
                seen |= {choice.swapped for choice in ways[0]} - {None}
        if len(seen) == 1:
            return bool(seen.pop())
        joined = all(isinstance(self.places[choice.parameter], Experts) for way in found for choice in way)
        return True if old is False and joined else None

    def _grouped_by_expert(self) -> bool:
        layout = self.config["lora_B_layout"]
        if layout in ("rank_major", "grouped_by_expert"):
            return bool(layout == "grouped_by_expert")
        if layout:
            raise SourceError(f"{self.config.path}: lora_B_layout is {layout!r}, which is not known")
        mapping = self.config["auto_mapping"]
        if isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
            raise SourceError(
                f"{self.config.path}: written by Unsloth, which before September 2026 read the columns of lora_B of experts "
                "in another order than PEFT, and nothing tells which this is: add lora_B_layout, 'rank_major' (as PEFT) or "
                "'grouped_by_expert'"
            )
        return False

    def _experts(self, choice: Choice) -> int:
        shape = self.places.shape(choice.parameter)
        return shape[0] if len(shape) == 3 else 1

    def _made(self, choice: Choice, grouped: bool) -> Iterator[Update]:
        place, shape = self.places[choice.parameter], self.places.shape(choice.parameter)
        products = list(self._products(choice, grouped))
        if isinstance(place, Experts):
            # Rows of the joined parameter are rows of its parts, so the update splits exactly.
            for names, (up, down) in zip(place.parts, products, strict=True):
                at = 0
                for name in names:
                    part = self.places.base.shape(name)
                    yield LowRank(name, part, np.ascontiguousarray(up[at : at + part[0]]), down)
                    at += part[0]
            return
        if len(products) == 1:
            yield LowRank(place, shape, *products[0])
            return
        yield Stacked(
            place,
            shape,
            [LowRank(place, shape[1:], up, down) for up, down in products],
            [shape[1]] * len(products),
        )

    def _products(self, choice: Choice, grouped: bool) -> Iterator[tuple[Array, Array]]:
        """``up`` and ``down`` of each expert, the scale in ``lora_B``."""
        a, b = choice.layer.pair(self.where)
        experts, dtype = self._experts(choice), common_dtype(a, b)
        rank = a.shape[0] // experts
        b = scaled(b, self.config.scales.scale(choice.parameter), dtype)
        for expert in range(experts):
            columns = slice(expert * rank, (expert + 1) * rank) if grouped else slice(expert, None, experts)
            up, down = b[:, columns], a[expert * rank : (expert + 1) * rank].astype(dtype)
            if choice.swapped is False:
                up, down = down.T, up.T
            yield np.ascontiguousarray(up), np.ascontiguousarray(down)

    def _shapes(self, layer: PeftLayer) -> str:
        a, b = layer.pair(self.where)
        inner = ".base_layer" * layer.depth
        return f"{layer.module + inner!r} has lora_A of shape {list(a.shape)} and lora_B of shape {list(b.shape)}"

    def _named(self, name: str) -> str:
        return f"{name!r} {list(self.places.shape(name))} of rank {self.config.scales.rank(name)}"


def _combined(ways: list[list[Choice]], taken: tuple[Choice, ...] = ()) -> Iterator[list[Choice]]:
    """All choices of one from each list that name different parameters and agree on the order of in and out."""
    if not ways:
        yield list(taken)
        return
    for choice in ways[0]:
        names = {before.parameter for before in taken}
        orders = {before.swapped for before in (*taken, choice)} - {None}
        if choice.parameter not in names and len(orders) <= 1:
            yield from _combined(ways[1:], (*taken, choice))
