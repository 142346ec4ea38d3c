"""Where the base keeps what an adapted layer changes.

The names in a LoRA are those of the model in memory. transformers renames and joins tensors when it loads some models:
experts that lie on disk one by one are one 3-D parameter in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.peft.keys import Keys, PeftLayer, candidates
from shira_format.names.match import match_names

_EXPERT = re.compile(
    r"(?P<module>(?:.*\.)?experts)\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<part>gate_proj|up_proj|down_proj|w[123]|fc[123])\.weight"
)
# The parts of a parameter of experts, one below the other, under the names that one expert's have on disk: those of
# transformers' conversion_mapping.py. An expert without a gate has its up_proj alone.
_JOINED: dict[str, list[tuple[str, ...]]] = {
    "gate_up_proj": [("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")],
    "up_proj": [("up_proj",)],
    "down_proj": [("down_proj",), ("w2",), ("fc2",)],
}
_RENAMED = (".block_sparse_moe.", ".mlp.")  # on disk, in memory: Mixtral, Phi-MoE, MiniMax


@dataclass(frozen=True)
class Experts:
    """A 3-D parameter that lies on disk in parts.

    Attributes:
        parts: names by expert; those of one expert lie one below the other.
        shape: of the parameter in memory.
    """

    parts: list[list[str]]
    shape: tuple[int, ...]


class Places:
    """Resolves names of the model in memory to tensors of the base."""

    def __init__(self, base: Checkpoint, keys: Keys, targets: list[str], where: object) -> None:
        """Raises SourceError if an adapted layer is not in the base."""
        self.base = base
        self._where = where
        self._joined = {name: parts for name, parts in _joined(base).items() if name not in base}
        self._known = {name.replace(*_RENAMED): name for name in base} | {
            name: name for name in (*self._joined, *base)
        }
        attentions = {layer.parent for layer in keys.layers if layer.parent}
        self._wanted = {layer.module: self._names(layer.module, targets, attentions) for layer in keys.layers} | {
            module: [f"{module}.weight"] for module in keys.tokens
        }
        needed = dict.fromkeys(name for names in self._wanted.values() for name in names)
        self._rename, self.words = match_names(needed.keys(), self._known, where)

    def parameters(self, layer: PeftLayer) -> list[str]:
        """The names of those that the layer can change: several only if it wraps parameters of one module."""
        return self._wanted[layer.module]

    def is_attention(self, module: str) -> bool:
        """Whether it is a ``MultiheadAttention``."""
        return self._wanted.get(module) == [f"{module}.in_proj_weight"]

    def __getitem__(self, name: str) -> str | Experts:
        """Where a parameter is; its name under the base's prefix, if the base has none."""
        name = self._rename(name)
        return self._experts(self._joined[name]) if name in self._joined else self._known.get(name, name)

    def tensor(self, name: str) -> str:
        """As ``[]``, for what cannot be a parameter of experts."""
        found = self[name]
        return found if isinstance(found, str) else name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter in memory."""
        found = self[name]
        return found.shape if isinstance(found, Experts) else self.base.shape(found)

    def _names(self, module: str, targets: list[str], attentions: Iterable[str]) -> list[str]:
        # Whether PEFT wrapped the module or a parameter of it, the key does not say. What stands before the last part
        # of the name may differ between LoRA and base, so only that is looked for yet.
        tail = module.rpartition(".")[2]
        found = [
            parameter
            for parameter in candidates(module, targets)
            if f"{tail}.{parameter}" in self._tails and f"{tail}.{parameter}.weight" not in self._tails
        ]
        if found:
            return [f"{module}.{parameter}" for parameter in found]
        if module in attentions:
            return [f"{module}.in_proj_weight"]
        return [f"{module}.weight"]

    @cached_property
    def _tails(self) -> set[str]:
        """The last two and three parts of all names."""
        found = set()
        for name in self._known:
            parts = name.split(".")
            found |= {".".join(parts[-2:]), ".".join(parts[-3:])}
        return found

    def _experts(self, parts: Sequence[Mapping[int, str]]) -> Experts:
        count = len(parts[0])
        if any(sorted(part) != list(range(count)) for part in parts):
            raise SourceError(f"{self.base.path}: experts are missing beside {next(iter(parts[0].values()))!r}")
        experts = [[part[expert] for part in parts] for expert in range(count)]
        shapes = [[self.base.shape(name) for name in names] for names in experts]
        if any(len(shape) != 2 for shape in shapes[0]) or any(other != shapes[0] for other in shapes):
            raise SourceError(f"{self.base.path}: {experts[0][0]!r} and others of its kind differ in shape")
        if len({columns for _, columns in shapes[0]}) > 1:
            raise SourceError(f"{self.base.path}: {', '.join(experts[0])} do not fit on top of each other")
        return Experts(experts, (count, sum(rows for rows, _ in shapes[0]), shapes[0][0][1]))


def _joined(names: Iterable[str]) -> dict[str, list[dict[int, str]]]:
    """Parameters that lie on disk in parts: by their names in memory, the names of each part by expert."""
    modules: dict[str, dict[str, dict[int, str]]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            parts = modules.setdefault(match["module"], {})
            parts.setdefault(match["part"], {})[int(match["expert"])] = name
    return {
        f"{module}.{parameter}".replace(*_RENAMED): [parts[part] for part in way]
        for module, parts in modules.items()
        for parameter, ways in _JOINED.items()
        for way in ways
        if all(part in parts for part in way) and not (parameter == "up_proj" and "gate_proj" in parts)
    }
