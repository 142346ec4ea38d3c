"""Keys of ``adapter_model.safetensors``: the adapted layers, and the base's names of the weights that these change.

The names in a LoRA are those of the model in memory. transformers renames and fuses tensors when it loads some models:
experts that are separate tensors on disk are one 3-D parameter in memory (:mod:`shira_format.names.models.experts`).
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
from shira_format.lora.peft.resized import is_resized
from shira_format.lora.products import fits_factors
from shira_format.names.located import LocatedCheckpoint
from shira_format.names.models.experts import why_not
from shira_format.names.prefixes import AmbiguousNames, Statement, match_names, match_others
from shira_format.names.row_blocks import Location
from shira_format.names.spaces import other_names

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
# What PEFT's wrappers insert into names of the base's parameters.
_WRAPPED = re.compile(r"\.(?:token_adapter\.base_layer|base_layer|modules_to_save)(?=\.)")
_VELORA = ".lora_velora_embed"
_OTHER = re.compile(r"\.lora_|\.trainable_tokens|\.token_adapter\.")
_DEEP = re.compile(r"(?<!\.base_layer)(?:\.base_layer)+\Z")


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


class BaseNames:
    """Resolves names of the model in memory to tensors of the base.

    Attributes:
        base: the base, and what it has under other names.
        rename: the change of prefixes from these names to the base's.
    """

    def __init__(
        self,
        base: Checkpoint,
        keys: Keys,
        targets: list[str],
        where: object,
        prefix: str | None = None,
        statements: Sequence[Statement] = (),
    ) -> None:
        """Raises SourceError if an adapted layer is not in the base, or could be one of several; ``prefix`` chooses."""
        self.base = located = LocatedCheckpoint(base, other_names(base, base.shape))
        # Tensors that only have another name.
        self._renamed = {
            name: location.blocks[0].name
            for name, location in located.locations.items()
            if location == Location(base.shape(location.blocks[0].name), location.blocks[:1])
        }
        self._targets = targets
        attentions = {layer.parent for layer in keys.layers if layer.parent}
        self._wanted = {layer.module: self._names(layer.module, targets, attentions) for layer in keys.layers} | {
            module: [f"{module}.weight"] for module in keys.tokens
        }
        needed = dict.fromkeys(name for names in self._wanted.values() for name in names)
        modules = {layer.module: layer for layer in keys.layers}

        def fits(name: str, found: str) -> bool:
            if name in keys.plain:
                shape = keys.plain[name].shape
                return located.shape(found) == shape or is_resized(found, located.shape(found), shape)
            layer = modules.get(name.removesuffix(".weight"))
            if layer is None or (len(located.shape(found)) == 3 and found in located.locations):
                return True
            return fits_factors(located.shape(found), *reversed(layer.pair(where)))

        try:
            self.rename = match_names(
                needed.keys(), located, where, fits=fits, prefix=prefix, statements=statements
            )
            self.rename = match_others(
                self.rename,
                needed.keys(),
                keys.plain.keys() - needed.keys(),
                located,
                where,
                fits=fits,
                prefix=prefix,
            )
        except AmbiguousNames:
            raise
        except SourceError as error:
            if reason := next(filter(None, (why_not(name, base, base.shape) for name in needed)), None):
                raise SourceError(f"{error}; of its experts, {reason}") from None
            raise

    def parameters(self, layer: PeftLayer) -> list[str]:
        """The names of the weights that the layer may change: several only if it wraps parameters of one module."""
        return self._wanted[layer.module]

    def is_attention(self, module: str) -> bool:
        """Whether it is a ``MultiheadAttention``."""
        return self._wanted.get(module) == [f"{module}.in_proj_weight"]

    def why_lacking(self, module: str) -> str:
        """Why the base lacks parameters of experts that ``module`` may mean, for messages; "" if it does not."""
        names = [self.rename(f"{module}.{parameter}") for parameter in candidates(module, self._targets)]
        reasons = (why_not(name, self.base.base, self.base.base.shape) for name in names if name not in self.base)
        return next((f"; of the base's experts, {reason}" for reason in reasons if reason), "")

    def is_joined(self, name: str) -> bool:
        """Whether the base has a tensor in parts, as experts that transformers joins when it loads them."""
        location = self.base.locations.get(self.tensor(name))
        return location is not None and len(location.blocks) > 1

    def tensor(self, name: str) -> str:
        """The tensor of :attr:`base`; if it has none, the name with the base's prefix."""
        name = self.rename(name)
        return self._renamed.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter in memory."""
        return self.base.shape(self.tensor(name))

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
        for name in self.base:
            parts = name.split(".")
            found |= {".".join(parts[-2:]), ".".join(parts[-3:])}
        return found
