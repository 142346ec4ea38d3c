"""LoRAs of parameters (``target_parameters``): 3-D ones of experts, and 2-D ones.

PEFT keeps ``lora_A`` as ``[experts * r, p]`` and ``lora_B`` as ``[q, r * experts]``. The rows of A are grouped by expert.
The columns of B are grouped by rank (``reshape(q, r, experts)``), which is easily mistaken for the other order: Unsloth's
trainer did so before September 2026. Shapes do not show the order, so PEFT's is assumed, unless the file is marked as
Unsloth's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.peft.base_names import BaseNames, PeftLayer
from shira_format.lora.peft.config import MERGE_FIRST, Config
from shira_format.lora.products import LowRank, Stacked, common_dtype, scale_factor

_MOST = 4  # parameters of one module; the search is over their permutations


@dataclass(frozen=True)
class Match:
    """A parameter that a layer's factors fit.

    Attributes:
        layer: with ``lora_A`` ``[experts * r, p]`` and ``lora_B`` ``[q, r * experts]``.
        parameter: the parameter's name.
        swapped: True if the parameter is ``[experts, q, p]``, False if it is ``[experts, p, q]``, None if it is one matrix,
            ``[q, p]``.
    """

    layer: PeftLayer
    parameter: str
    swapped: bool | None


# One match for each layer of a module.
_Assignment = list[Match]


class ParameterLayers:
    """All layers that wrap parameters."""

    def __init__(self, names: BaseNames, config: Config, where: object) -> None:
        self.names, self.config, self.where = names, config, where

    def updates(self, layers: Sequence[PeftLayer]) -> list[Update]:
        """The updates, in the order of the layers.

        Raises:
            SourceError: a pair of factors fits no parameter, or several.
        """
        modules: dict[str, list[PeftLayer]] = {}
        for layer in layers:
            modules.setdefault(layer.module, []).append(layer)
        possible = {module: self._assignments(group) for module, group in modules.items()}
        matches = [
            match
            for module, assignments in possible.items()
            for match in self._only(module, assignments, possible.values())
        ]
        grouped = any(self._experts(match) > 1 for match in matches) and self._grouped_by_expert()
        return [update for match in matches for update in self._updates_of(match, grouped)]

    def _assignments(self, layers: Sequence[PeftLayer]) -> list[_Assignment]:
        """All ways in which the layers of one module fit its parameters, which the keys do not name.

        The wrappers are nested in the order in which the module's class creates its parameters, which no file contains.
        """
        module, names = layers[0].module, self.names.parameters(layers[0])
        if sorted(layer.depth for layer in layers) != list(range(len(layers))):
            raise SourceError(
                f"{self.where}: {module!r} is wrapped several times, and a key of a wrapper is missing"
            )
        if len(names) > _MOST:
            raise SourceError(f"{self.where}: target_parameters names {len(names)} parameters of {module!r}")
        for layer in layers:
            layer.pair(self.where)
            if extra := layer.parts.keys() - {"lora_A.weight", "lora_B.weight"}:
                raise SourceError(f"{self.where}: {module!r} is a parameter, and has {min(extra)}")
        matches = [[match for name in names for match in self._matches(layer, name)] for layer in layers]
        for layer, found in zip(layers, matches, strict=True):
            if not found:
                raise SourceError(
                    f"{self.where}: {self._shapes(layer)}, which fits none of {', '.join(map(self._named, names))}"
                    + self.names.why_lacking(module)
                )
        return list(_combined(matches))

    def _matches(self, layer: PeftLayer, name: str) -> Iterator[Match]:
        a, b = layer.pair(self.where)
        shape = self.names.shape(name)
        if a.ndim != 2 or b.ndim != 2 or len(shape) not in (2, 3):
            return
        experts = shape[0] if len(shape) == 3 else 1
        if not a.shape[0] == b.shape[1] == self.config.scales.rank(name) * experts:
            return
        made = (b.shape[0], a.shape[1])
        if experts == 1:
            if shape[-2:] == made:
                yield Match(layer, name, None)
            return
        if shape[1:] == made:
            yield Match(layer, name, swapped=True)
        if shape[1:] == made[::-1]:
            yield Match(layer, name, swapped=False)

    def _only(self, module: str, found: list[_Assignment], of_all: Collection[list[_Assignment]]) -> _Assignment:
        """The only assignment with the known order of in and out."""
        if len(found) > 1 and (swapped := self._known_order(found, of_all)) is not None:
            found = [matches for matches in found if all(match.swapped in (None, swapped) for match in matches)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(map(self._named, self.names.parameters(found[0][0].layer))) if found else ""
        raise SourceError(
            f"{self.where}: which parameter each LoRA of {module!r} adapts, and whether it is transposed, is ambiguous: by "
            f"their shapes they fit {names} in several ways; {MERGE_FIRST}"
        )

    def _known_order(self, found: list[_Assignment], of_all: Collection[list[_Assignment]]) -> bool | None:
        """PEFT's :attr:`Match.swapped` for 3-D parameters, if its version or other layers show it.

        Before 0.19 it took all for ``[experts, in, out]``, so that A goes with the first. Since then it asks the module
        (``is_transposed``); what transformers fused from linear layers is ``[experts, out, in]``.
        """
        old = self.config.weights_before_swap
        if old:
            return False
        seen = set()
        for assignments in of_all:
            if len(assignments) == 1:
                seen |= {match.swapped for match in assignments[0]} - {None}
        if len(seen) == 1:
            return bool(seen.pop())
        fused = all(self.names.is_joined(match.parameter) for matches in found for match in matches)
        return True if old is False and fused else None

    def _grouped_by_expert(self) -> bool:
        layout = self.config["lora_B_layout"]
        if layout in ("rank_major", "grouped_by_expert"):
            return bool(layout == "grouped_by_expert")
        if layout:
            raise SourceError(f"{self.config.path}: lora_B_layout is {layout!r}, which is unknown")
        mapping = self.config["auto_mapping"]
        if isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
            raise SourceError(
                f"{self.config.path}: written by Unsloth, which before September 2026 read the columns of lora_B of experts "
                "in another order than PEFT; which order this file has is unknown: add lora_B_layout, 'rank_major' (as PEFT) "
                "or 'grouped_by_expert'"
            )
        return False

    def _experts(self, match: Match) -> int:
        shape = self.names.shape(match.parameter)
        return shape[0] if len(shape) == 3 else 1

    def _updates_of(self, match: Match, grouped: bool) -> Iterator[Update]:
        target, shape = self.names.tensor(match.parameter), self.names.shape(match.parameter)
        products = list(self._products(match, grouped))
        if len(products) == 1:
            yield LowRank(target, shape, *products[0])
            return
        yield Stacked(
            target,
            shape,
            [LowRank(target, shape[1:], up, down) for up, down in products],
            [shape[1]] * len(products),
        )

    def _products(self, match: Match, grouped: bool) -> Iterator[tuple[Array, Array]]:
        """``up`` and ``down`` of each expert, with the scale multiplied into ``lora_B``."""
        a, b = match.layer.pair(self.where)
        experts, dtype = self._experts(match), common_dtype(a, b)
        rank = a.shape[0] // experts
        b = scale_factor(b, self.config.scales.scale(match.parameter), dtype)
        for expert in range(experts):
            columns = slice(expert * rank, (expert + 1) * rank) if grouped else slice(expert, None, experts)
            up, down = b[:, columns], a[expert * rank : (expert + 1) * rank].astype(dtype)
            if match.swapped is False:
                up, down = down.T, up.T
            yield np.ascontiguousarray(up), np.ascontiguousarray(down)

    def _shapes(self, layer: PeftLayer) -> str:
        a, b = layer.pair(self.where)
        inner = ".base_layer" * layer.depth
        return f"{layer.module + inner!r} has lora_A of shape {list(a.shape)} and lora_B of shape {list(b.shape)}"

    def _named(self, name: str) -> str:
        return f"{name!r} {list(self.names.shape(name))} of rank {self.config.scales.rank(name)}"


def _combined(matches: list[list[Match]], taken: tuple[Match, ...] = ()) -> Iterator[_Assignment]:
    """All selections of one match from each list with different parameters and one order of in and out."""
    if not matches:
        yield list(taken)
        return
    for match in matches[0]:
        names = {before.parameter for before in taken}
        orders = {before.swapped for before in (*taken, match)} - {None}
        if match.parameter not in names and len(orders) <= 1:
            yield from _combined(matches[1:], (*taken, match))
