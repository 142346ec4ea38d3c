"""PEFT's rules for rank and scale, from the options that it writes to ``adapter_config.json`` or a file's header."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shira_format.errors import SourceError
from shira_format.lora.files import is_number, is_rank


@dataclass(frozen=True)
class Scales:
    """Rank and scale of each module; made by :func:`read_scales`.

    Attributes:
        where: the file, for messages.
        r: the rank of modules that no pattern names.
        lora_alpha: their alpha.
        rank_pattern: ranks by regex.
        alpha_pattern: alphas by regex.
        use_rslora: whether the scale is ``alpha / sqrt(rank)``, not ``alpha / rank``.
    """

    where: str
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank(self, module: str) -> int:
        """Of a module, by its name in the model that was trained.

        Raises:
            SourceError: a pattern is no regex.
        """
        return int(self._by_pattern("rank_pattern", self.rank_pattern, module, self.r))

    def alpha(self, module: str) -> float:
        """As :meth:`rank`."""
        return self._by_pattern("alpha_pattern", self.alpha_pattern, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """What ``B @ A`` is multiplied by; as :meth:`rank`."""
        rank = self.rank(module)
        return float(self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank))

    def _by_pattern(self, key: str, patterns: Mapping[str, float], module: str, default: float) -> float:
        """PEFT's ``get_pattern_key``: the end of the name matches, after a dot or from its start; first hit wins."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise SourceError(f"{self.where}: {key} {pattern!r}: {error}") from None
        return default


def read_scales(config: Mapping[str, Any], where: object) -> Scales:
    """The options of one adapter.

    Raises:
        SourceError: they are no ranks and alphas; the message begins with ``where``.
    """
    if not is_rank(config.get("r")) or not is_number(config.get("lora_alpha")):
        raise SourceError(f"{where}: r and lora_alpha must be numbers, r a positive integer")
    patterns: dict[str, dict[str, Any]] = {}
    for key, good in (("rank_pattern", is_rank), ("alpha_pattern", is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(good, pattern.values())):
            raise SourceError(f"{where}: {key} must map module names to numbers")
        patterns[key] = pattern
    return Scales(
        where=str(where), r=config["r"], lora_alpha=config["lora_alpha"], use_rslora=bool(config.get("use_rslora")),
        **patterns,
    )  # fmt: skip
