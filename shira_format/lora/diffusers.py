"""diffusers' LoRAs: ``pytorch_lora_weights.safetensors``, with or without PEFT's options in its header.

The rules are those of ``diffusers.loaders``. With options (``lora_adapter_metadata``), scales are PEFT's. Without, the
scale of a layer is ``alpha / rank`` if the file has its alpha, else 1.

A file without alphas means ``W + B A``: alpha is the rank *of each layer*, as the trainers that write such files compute.
Before August 2026 diffusers took the first layer's rank as the alpha of all, which scaled layers of other ranks wrongly;
since then ``get_peft_kwargs`` sets each layer's alpha to its own rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.decomposed import Decomposed
from shira_format.lora.diffusers_keys import parse
from shira_format.lora.files import PICKLES, SAFETENSORS, number_in, open_tensors, parse_json, read_tensors
from shira_format.lora.keys import check_pairs, group_keys
from shira_format.lora.peft.config import CHANGES_BASE, CONFIG, REFUSED, Scales, read_config, read_scales
from shira_format.lora.products import common_dtype, fits_factors, low_rank, scale_factor
from shira_format.names.components import component_names
from shira_format.names.flux import flux_parts, is_diffusers_flux
from shira_format.names.prefixes import AmbiguousNames, match_names, prefix_of
from shira_format.names.row_blocks import FusedPart

WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
OPTIONS = "lora_adapter_metadata"

# Parts of other dialects' keys that may occur beside keys like ours.
_FOREIGN = (".lora_down.", ".lora_up.", ".lokr_", ".hada_", ".dora_scale")
# What a file that names no component adapts: the pipeline's denoiser.
_DENOISERS = ("unet", "transformer", "prior")
# Options under which B @ A is not the update.
_UNSUPPORTED = (*REFUSED, "layer_replication", "target_parameters", "trainable_token_indices", "modules_to_save")
_SHOWN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_SWITCHES = ("use_rslora", "use_dora", "lora_bias")


class Diffusers:
    """Files of diffusers, old and new, and of trainers that follow it."""

    name = "diffusers"

    def recognises(self, path: Path) -> bool:
        found = _candidates(path)
        if len(found) != 1:
            return False
        try:
            tensors = open_tensors(found[0])
        except SourceError:  # of another kind than tensors
            return False
        if any(part in key for key in tensors for part in _FOREIGN):
            return False
        keys = [key for key in map(parse, tensors) if key is not None]
        if not any(key.part in ("down", "up") for key in keys):
            return False
        # PEFT's keys without a component are not enough: they may be from another library, and their scale in a
        # configuration file that is lost.
        ours = found[0].name in WEIGHTS or OPTIONS in tensors.metadata(found[0].name)
        return ours or any(key.only_diffusers for key in keys)

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        found = _candidates(path)
        if len(found) > 1:
            raise SourceError(f"{path}: several files ({', '.join(file.name for file in found)}); name one")
        if not found:
            raise SourceError(f"{path}: no LoRA of diffusers: need {WEIGHTS[0]} or a file like it")
        return _Reader(found[0], base, prefix).read()


def _candidates(path: Path) -> list[Path]:
    """The file at ``path``; in a folder the one with diffusers' own name, else all safetensors files, else all ``.bin``."""
    if path.is_file():
        return [path] if path.suffix in (SAFETENSORS, *PICKLES) else []
    for name in WEIGHTS:
        if (path / name).is_file():
            return [path / name]
    files = sorted(file for file in path.iterdir() if file.is_file())
    for suffix in (SAFETENSORS, ".bin"):
        if found := [file for file in files if file.suffix == suffix]:
            return found
    return []


@dataclass
class _Layer:
    """The tensors of one adapted module and, for messages, their keys; both by part."""

    module: str
    keys: Mapping[str, str]
    parts: Mapping[str, Array]


@dataclass(frozen=True)
class _Options:
    """PEFT's options of one component, or their equivalent for a file without options.

    Attributes:
        scales: from PEFT's options.
        alphas: whether the file has alphas.
        dora: whether each layer must have a magnitude.
    """

    scales: Scales | None
    alphas: bool
    dora: bool


class _Reader:
    """Turns the tensors of one file into updates."""

    def __init__(self, path: Path, base: Checkpoint, prefix: str | None) -> None:
        self.path = path
        self.prefix = prefix
        self._config = path.with_name(CONFIG)
        self.base = base
        self.notices: list[str] = []
        self.updates: list[Update] = []
        self.additions: dict[str, Array] = {}
        self._unnamed = False  # whether keys name no component

    def read(self) -> Lora:
        tensors, header = read_tensors(self.path, self.base)
        components = self._layers(tensors)
        options = self._metadata(header, components)
        if self._config.is_file():
            options = self._beside(options, components)
        ranks, alphas = set(), set()
        for component, layers in components.items():
            settings = self._options(component, layers.values(), options.get(component))
            places = self._places(component, layers, alone=len(components) == 1)
            for layer in layers.values():
                rank, scale = self._rank_and_scale(layer, settings)
                ranks.add(rank)
                alphas.add(scale * rank)
                self._add(layer, scale, places(layer.module))
        shown = {
            component or "model": {key: config[key] for key in _SHOWN if config.get(key)}
            | {key: True for key in _SWITCHES if config.get(key)}
            for component, config in options.items()
        }
        return Lora(
            updates=self.updates,
            additions=self.additions,
            source={"kind": "lora", "dialect": "diffusers", "ranks": sorted(ranks)}
            | ({"options": shown} if shown else {"alphas": sorted(alphas)}),
            files=[self.path, self._config] if self._config.is_file() else [self.path],
            notices=self.notices,
        )

    def _beside(
        self, options: dict[str, dict[str, Any]], components: Collection[str]
    ) -> dict[str, dict[str, Any]]:
        """The options in PEFT's configuration beside the file, which must not contradict those in the header."""
        config = read_config(self._config).raw
        both = f"{self.path} and {self._config}"
        for component, given in options.items():
            if any((given.get(key) or None) != (config.get(key) or None) for key in (*_SHOWN, *_SWITCHES)):
                raise SourceError(f"{both}: the options of {component or 'the model'} in the header are others")
        if options:
            return options
        if len(components) > 1:
            raise SourceError(f"{both}: one configuration, and several components: {', '.join(components)}")
        self.notices.append(f"{self._config.name} beside the file: rank and alpha are taken from it")
        return {component: dict(config) for component in components}

    def _layers(self, tensors: Mapping[str, Array]) -> dict[str, dict[str, _Layer]]:
        """By component and module."""
        groups = group_keys(
            tensors,
            self._parse,
            self.path,
            "it ends in none of diffusers' names for parts of a LoRA (lora_A.weight, lora.down.weight, "
            "to_q_lora.down.weight and the like)",
        )
        check_pairs(groups.values(), self.path)
        found: dict[str, dict[str, _Layer]] = {}
        for (component, module), keys in groups.items():
            parts = {part: tensors[key] for part, key in keys.items()}
            found.setdefault(component, {})[module] = _Layer(module, keys, parts)
        return found

    def _parse(self, name: str) -> tuple[tuple[str, str], str] | None:
        """Component and module, and the part."""
        if (key := parse(name)) is None:
            return None
        return (key.component or self._unnamed_component(key.module), key.module), key.part

    def _unnamed_component(self, module: str) -> str:
        """The component of keys that name none."""
        self._unnamed = True
        if not self.base.components:
            return ""
        for component in _DENOISERS:
            if component in self.base.components:
                return component
        raise SourceError(
            f"{self.path}: the key of module {module!r} names no component, and the base has neither "
            f"{' nor '.join(_DENOISERS)}, but {', '.join(self.base.components)}"
        )

    def _metadata(self, header: Mapping[str, str], components: Iterable[str]) -> dict[str, dict[str, Any]]:
        """PEFT's options by component: of all or of none."""
        if not header.get(OPTIONS):
            return {}
        options = parse_json(header[OPTIONS], f"{self.path}: {OPTIONS}")
        found = {}
        for component in components:
            prefix = f"{component}." if component else ""
            inner = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
            if inner:
                found[component] = inner
        if self._unnamed and not found:  # saved from a single model, a component of this base
            denoiser = next((component for component in components if component in _DENOISERS), None)
            found = {} if denoiser is None else {denoiser: options}
        # If only some components have options, diffusers takes PEFT's defaults for the others, and fails.
        if options and (missing := [component for component in components if component not in found]):
            raise SourceError(
                f"{self.path}: the options in the header do not cover all components that the file adapts: the scale of "
                f"{', '.join(missing) or 'its layers'} is unknown"
            )
        return found

    def _options(self, component: str, layers: Collection[_Layer], config: Mapping[str, Any] | None) -> _Options:
        has = {part for layer in layers for part in layer.parts}
        where = f"{self.path}: {OPTIONS}" + (f" of {component}" if component else "")
        if config is None:
            if "alpha" in has and not all("alpha" in layer.parts for layer in layers):
                layer = next(layer for layer in layers if "alpha" not in layer.parts)
                raise SourceError(
                    f"{self.path}: {layer.keys['down']!r} has no alpha and other layers have one: whether its alpha is its "
                    "rank or theirs is unknown"
                )
            return _Options(None, "alpha" in has, "magnitude" in has)
        if config.get("peft_type", "LORA") != "LORA":
            raise SourceError(f"{where}: not a LoRA (peft_type is {config['peft_type']!r})")
        for option in _UNSUPPORTED:
            if config.get(option):
                raise SourceError(f"{where}: {option} is set, which is not supported: merge the LoRA with diffusers and convert the full checkpoint")  # fmt: skip
        start = config.get("init_lora_weights")
        if isinstance(start, str) and CHANGES_BASE.match(start):
            raise SourceError(
                f"{where}: init_lora_weights={start!r} changed the base's weights in training, so B @ A is not an "
                "update of the base"
            )
        if "alpha" in has:
            beside = f" and {self._config}" if self._config.is_file() else ""
            raise SourceError(f"{where}{beside}: sets alphas, and the file has keys of alphas as well")
        dora, bias = bool(config.get("use_dora")), bool(config.get("lora_bias"))
        for part, option, is_set in (("magnitude", "use_dora", dora), ("bias", "lora_bias", bias)):
            if part in has and not is_set:
                layer = next(layer for layer in layers if part in layer.parts)
                raise SourceError(f"{self.path}: unmatched key {layer.keys[part]!r}: {option} is not set")
        return _Options(read_scales(config, where), False, dora)

    def _rank_and_scale(self, layer: _Layer, options: _Options) -> tuple[int, float]:
        down, up = layer.parts["down"], layer.parts["up"]
        if down.ndim < 2 or up.ndim < 2 or not down.shape[0] or down.shape[0] != up.shape[1]:
            raise SourceError(
                f"{self.path}: {layer.keys['down']!r} of shape {list(down.shape)} and {layer.keys['up']!r} of shape "
                f"{list(up.shape)} have no rank in common"
            )
        rank = down.shape[0]
        if options.dora and "magnitude" not in layer.parts:
            raise SourceError(
                f"{self.path}: {layer.keys['down']!r} has no lora_magnitude_vector, which DoRA needs"
            )
        if options.dora and "bias" in layer.parts:
            raise SourceError(f"{self.path}: {layer.keys['bias']!r}: DoRA with a bias of lora_B is not supported")
        if options.scales is not None:
            # Patterns match the names in training, which the file has; the base's names may lack a "text_model."
            if options.scales.rank(layer.module) != rank:
                raise SourceError(
                    f"{self.path}: {layer.keys['down']!r} has shape {list(down.shape)}, and should have rank "
                    f"{options.scales.rank(layer.module)} by its options"
                )
            return rank, options.scales.scale(layer.module)
        if options.alphas:
            return rank, number_in(layer.parts["alpha"], layer.keys["alpha"], self.path) / rank
        return rank, 1.0  # alpha is the layer's rank

    def _places(self, component: str, layers: Mapping[str, _Layer], *, alone: bool) -> Callable[[str], list[tuple[str, FusedPart | None]]]:  # fmt: skip
        """Where the base has a component's modules: each is one module there, or several that are its rows."""
        prefix, names = "", list(self.base)
        if component:
            prefix, names = component_names(self.base, component, self.path, alone=alone)
        where = f"{self.path}: {component}" if component else str(self.path)

        def fits(name: str, found: str) -> bool:
            parts = layers[name.removesuffix(".weight")].parts
            return fits_factors(self.base.shape(prefix + found), parts["up"], parts["down"])

        try:
            rename = match_names(
                [f"{module}.weight" for module in layers],
                names,
                where,
                fits=fits,
                prefix=prefix_of(self.prefix, prefix),
            )
        except AmbiguousNames:
            raise
        except SourceError:
            if (found := self._flux(prefix, names, list(layers))) is None:
                raise
            return found
        self.notices += rename.notices("the LoRA", component)
        return lambda module: [(prefix + rename(f"{module}.weight").removesuffix(".weight"), None)]

    def _flux(self, prefix: str, names: list[str], modules: list[str]) -> Callable[[str], list[tuple[str, FusedPart | None]]] | None:  # fmt: skip
        """As ``_places`` if the base is diffusers' FLUX and the modules are those of its authors, else None."""
        if not is_diffusers_flux(names):
            return None
        fused = flux_parts(names, lambda name: self.base.shape(prefix + name)[0])
        if not all(module in fused for module in modules):
            return None
        self.notices.append("names of the LoRA are those of FLUX's authors, the base has diffusers'")
        return lambda module: [(prefix + part.module, part) for part in fused[module]]

    def _add(self, layer: _Layer, scale: float, places: list[tuple[str, FusedPart | None]]) -> None:
        up, where = layer.parts["up"], f"{self.path}: {layer.keys['up']!r}"
        height = sum(stop - start for _, part in places if part for start, stop in part.rows)
        if height and up.shape[0] != height:
            raise SourceError(
                f"{where} has shape {list(up.shape)}, the base's modules together have {height} rows"
            )
        for module, part in places:
            rows = _rows(part)
            name = f"{module}.weight"
            update = low_rank(name, self.base.shape(name), rows(up), layer.parts["down"], scale, where)
            if "magnitude" in layer.parts:
                magnitude = layer.parts["magnitude"]
                if magnitude.size != up.shape[0]:
                    raise SourceError(
                        f"{self.path}: {layer.keys['magnitude']!r} has shape {list(magnitude.shape)}, not one number for "
                        f"each of {up.shape[0]} rows"
                    )
                self.updates.append(
                    Decomposed(update, self.base, rows(magnitude.reshape(-1)).astype(update.dtype))
                )
            else:
                self.updates.append(update)
            if "bias" in layer.parts:
                self._add_bias(layer, f"{module}.bias", rows, scale)

    def _add_bias(self, layer: _Layer, name: str, rows: Callable[[Array], Array], scale: float) -> None:
        bias, where = layer.parts["bias"], f"{self.path}: {layer.keys['bias']!r}"
        if name not in self.base:
            raise SourceError(f"{where}: the base has no {name!r}")
        if bias.shape != layer.parts["up"].shape[:1] or rows(bias).shape != self.base.shape(name):
            raise SourceError(
                f"{where} has shape {list(bias.shape)}, the base's {name!r} {list(self.base.shape(name))}"
            )
        self.additions[name] = scale_factor(rows(bias), scale, common_dtype(bias))


def _rows(part: FusedPart | None) -> Callable[[Array], Array]:
    return (lambda array: array) if part is None else part.take
