"""Keys of ``adapter_model.safetensors``: the adapted layers, and the base's names of the weights that these change.

The names in a LoRA are those of the model in memory. transformers renames and fuses tensors when it loads some models:
experts that are separate tensors on disk are one 3-D parameter in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.peft.config import PREFIX, Config
from shira_format.lora.products import fits_factors
from shira_format.names.prefixes import match_names

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
# What PEFT's wrappers insert into names of the base's parameters.
_WRAPPED = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|modules_to_save)(?=\.)")
_VELORA = ".lora_velora_embed"
_OTHER = re.compile(r"\.lora_|\.trainable_tokens|\.token_adapter\.")
_DEEP = re.compile(r"(?:\.base_layer)+\Z")


@dataclass(eq=False)
class PeftLayer:
    """The tensors of one adapted layer.

    Attributes:
        module: its name in the trained model.
        depth: how many wrappers of the same module's parameters enclose this one.
        parent: the module in whose wrapper it is, if it is ``out_proj`` there (``MultiheadAttention``); else "".
        parts: the tensors by PEFT's name, such as ``"lora_A.weight"``.
    """

    module: str
    depth: int = 0
    parent: str = ""
    parts: dict[str, Array] = field(default_factory=dict)

    def pair(self, where: object) -> tuple[Array, Array]:
        """``lora_A`` and ``lora_B``.

        Raises:
            SourceError: one of them is missing, or the layer has parts that do not belong to them.
        """
        stem = "lora_embedding_" if any(part.startswith("lora_embedding_") for part in self.parts) else "lora_"
        names = [f"{stem}A", f"{stem}B"] if stem == "lora_embedding_" else ["lora_A.weight", "lora_B.weight"]
        if not all(name in self.parts for name in names) or self.parts.keys() - {
            *names, "lora_B.bias", "lora_magnitude_vector"
        }:  # fmt: skip
            found = ", ".join(part.removesuffix(".weight") for part in self.parts)
            raise SourceError(f"{where}: {self.module!r} has {found} only")
        return self.parts[names[0]], self.parts[names[1]]

    @property
    def is_embedding(self) -> bool:
        """Whether the factors are those of an embedding."""
        return "lora_embedding_A" in self.parts


@dataclass
class Keys:
    """All tensors of a file.

    Attributes:
        layers: adapted layers.
        tokens: new rows of an embedding, by its module.
        plain: whole tensors, by their names in the model.
        training: keys of what is used in training only.
    """

    layers: list[PeftLayer] = field(default_factory=list)
    tokens: dict[str, Array] = field(default_factory=dict)
    plain: dict[str, Array] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)


def sort_keys(tensors: Mapping[str, Array], config: Config, path: Path) -> Keys:
    """Sort the tensors by what their keys mean.

    Raises:
        SourceError: a key that is not PEFT's, or that contradicts the options.
    """
    found = Keys()
    layers: dict[str, PeftLayer] = {}
    for key, array in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise SourceError(f"{path}: unmatched key {key!r}: it does not start with {PREFIX!r}")
        if match := _PART.fullmatch(name):
            part = match["part"]
            for option, wanted in (("lora_bias", "lora_B.bias"), ("use_dora", "lora_magnitude_vector")):
                if part == wanted and not config[option]:
                    raise SourceError(f"{path}: unmatched key {key!r}: {option} is not set")
            layer = layers.setdefault(match["module"], _layer(match["module"]))
            if part in layer.parts:
                raise SourceError(f"{path}: {key!r} is there twice, with and without '.weight'")
            layer.parts[part] = array
        elif match := _TOKENS.fullmatch(name):
            found.tokens[match["module"]] = array
        elif name.endswith(_VELORA) and config["velora_config"]:
            found.training.append(key)  # projects activations in the backward pass only
        elif _OTHER.search(plain := _WRAPPED.sub("", name)):
            raise SourceError(f"{path}: unmatched key {key!r}: not a known part of a LoRA")
        elif ".original_module." in name:
            raise SourceError(
                f"{path}: unmatched key {key!r}: the base's own module beside its copy that was trained, which PEFT does not "
                "save: leave it out"
            )
        elif plain in found.plain:
            raise SourceError(f"{path}: {key!r} means the same tensor as another key")
        else:
            found.plain[plain] = array
    found.layers = list(layers.values())
    if not found.layers and not found.tokens:
        raise SourceError(f"{path}: no key ends in lora_A.weight and lora_B.weight: not a LoRA")
    if config.tokens and not found.tokens:
        raise SourceError(f"{path}: trainable_token_indices is set, and no key ends in trainable_tokens_delta")
    return found


def _layer(raw: str) -> PeftLayer:
    outer = _DEEP.sub("", raw)
    parent = outer.removesuffix(".base_layer.out_proj")
    return PeftLayer(
        _WRAPPED.sub("", outer),
        depth=(len(raw) - len(outer)) // len(".base_layer"),
        parent=_WRAPPED.sub("", parent) if parent != outer else "",
    )


def candidates(module: str, targets: Iterable[str]) -> list[str]:
    """The parameters of ``module`` that ``target_parameters`` can mean; like PEFT, by the ends of names."""
    ends = (target.rpartition(".") for target in targets)
    return sorted(
        {parameter for parent, _, parameter in ends if not parent or f".{module}".endswith(f".{parent}")}
    )


_EXPERT = re.compile(
    r"(?P<module>(?:.*\.)?experts)\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<part>gate_proj|up_proj|down_proj|w[123]|fc[123])\.weight"
)
# The parts that are stacked in a parameter of experts, by their names on disk (transformers' conversion_mapping.py). An
# expert without a gate has up_proj alone.
_FUSED: dict[str, list[tuple[str, ...]]] = {
    "gate_up_proj": [("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")],
    "up_proj": [("up_proj",)],
    "down_proj": [("down_proj",), ("w2",), ("fc2",)],
}
_RENAMED = (".block_sparse_moe.", ".mlp.")  # on disk, in memory: Mixtral, Phi-MoE, MiniMax


@dataclass(frozen=True)
class Experts:
    """A 3-D parameter whose parts are separate tensors on disk.

    Attributes:
        parts: names on disk by expert; those of one expert are stacked along rows.
        shape: of the parameter in memory.
    """

    parts: list[list[str]]
    shape: tuple[int, ...]


class BaseNames:
    """Resolves names of the model in memory to tensors of the base.

    Attributes:
        rename: the change of one prefix from these names to the base's.
    """

    def __init__(
        self, base: Checkpoint, keys: Keys, targets: list[str], where: object, prefix: str | None = None
    ) -> None:
        """Raises SourceError if an adapted layer is not in the base, or could be one of several; ``prefix`` chooses."""
        self.base = base
        self._fused = {name: parts for name, parts in _fused(base).items() if name not in base}
        self._known = {name.replace(*_RENAMED): name for name in base} | {
            name: name for name in (*self._fused, *base)
        }
        attentions = {layer.parent for layer in keys.layers if layer.parent}
        self._wanted = {layer.module: self._names(layer.module, targets, attentions) for layer in keys.layers} | {
            module: [f"{module}.weight"] for module in keys.tokens
        }
        needed = dict.fromkeys(name for names in self._wanted.values() for name in names)
        modules = {layer.module: layer for layer in keys.layers}

        def fits(name: str, found: str) -> bool:
            if (layer := modules.get(name.removesuffix(".weight"))) is None or found in self._fused:
                return True
            return fits_factors(base.shape(self._known[found]), *reversed(layer.pair(where)))

        self.rename = match_names(needed.keys(), self._known, where, fits=fits, prefix=prefix)

    def parameters(self, layer: PeftLayer) -> list[str]:
        """The names of the weights that the layer may change: several only if it wraps parameters of one module."""
        return self._wanted[layer.module]

    def is_attention(self, module: str) -> bool:
        """Whether it is a ``MultiheadAttention``."""
        return self._wanted.get(module) == [f"{module}.in_proj_weight"]

    def __getitem__(self, name: str) -> str | Experts:
        """The base's tensor, or experts; if the base has neither, the name with the base's prefix."""
        name = self.rename(name)
        return self._experts(self._fused[name]) if name in self._fused else self._known.get(name, name)

    def tensor(self, name: str) -> str:
        """As ``[]``, for a name that is no parameter of experts."""
        found = self[name]
        return found if isinstance(found, str) else name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter in memory."""
        found = self[name]
        return found.shape if isinstance(found, Experts) else self.base.shape(found)

    def _names(self, module: str, targets: list[str], attentions: Iterable[str]) -> list[str]:
        # A key does not say whether PEFT wrapped the module or a parameter of it. The prefixes of LoRA and base may
        # differ, so only the last parts of names are compared here.
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
            raise SourceError(
                f"{self.base.path}: experts are missing: not all have what {next(iter(parts[0].values()))!r} has"
            )
        experts = [[part[expert] for part in parts] for expert in range(count)]
        shapes = [[self.base.shape(name) for name in names] for names in experts]
        if any(len(shape) != 2 for shape in shapes[0]) or any(other != shapes[0] for other in shapes):
            raise SourceError(f"{self.base.path}: {experts[0][0]!r} and others of its kind differ in shape")
        if len({columns for _, columns in shapes[0]}) > 1:
            raise SourceError(
                f"{self.base.path}: {', '.join(experts[0])} cannot be stacked: they differ in columns"
            )
        return Experts(experts, (count, sum(rows for rows, _ in shapes[0]), shapes[0][0][1]))


def _fused(names: Iterable[str]) -> dict[str, list[dict[int, str]]]:
    """Parameters whose parts are separate on disk: by name in memory, the names of each part by expert."""
    modules: dict[str, dict[str, dict[int, str]]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            parts = modules.setdefault(match["module"], {})
            parts.setdefault(match["part"], {})[int(match["expert"])] = name
    return {
        f"{module}.{parameter}".replace(*_RENAMED): [parts[part] for part in way]
        for module, parts in modules.items()
        for parameter, ways in _FUSED.items()
        for way in ways
        if all(part in parts for part in way) and not (parameter == "up_proj" and "gate_proj" in parts)
    }
