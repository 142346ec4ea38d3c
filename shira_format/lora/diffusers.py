"""diffusers' LoRAs: ``pytorch_lora_weights.safetensors``, with or without PEFT's options in its header.

The rules are those of ``diffusers.loaders``. With options (``lora_adapter_metadata``), scales are PEFT's. Without, the
scale of a layer is ``alpha / rank`` if the file has its alpha, else 1.

A file without alphas means ``W + B A``: alpha is the rank *of each layer*, as the trainers that write such files compute.
Before August 2026 diffusers took the first layer's rank as the alpha of all, which scaled layers of other ranks wrongly;
since then ``get_peft_kwargs`` sets each layer's alpha to its own rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Lora
from shira_format.lora.files import parse_json
from shira_format.lora.groups import Group
from shira_format.lora.keyed import OPTIONS, Groups, Scale, Scaling, dialect_of, read_keyed
from shira_format.lora.keys import ALPHA, BIAS, DOWN, MAGNITUDE
from shira_format.lora.peft.config import CHANGES_BASE, CONFIG, REFUSED, read_config, read_scales
from shira_format.lora.peft.wrapped import check_patterns
from shira_format.names.components import DENOISERS
from shira_format.storage.paths import is_file

# Options under which B @ A is not the update.
_UNSUPPORTED = (*REFUSED, "layer_replication", "target_parameters", "trainable_token_indices", "modules_to_save")
_SHOWN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_SWITCHES = ("use_rslora", "use_dora", "lora_bias")

Options = dict[str, dict[str, Any]]  # PEFT's by component


class Diffusers:
    """Files of diffusers, old and new, and of trainers that follow it."""

    name = "diffusers"

    def recognises(self, path: Path) -> bool:
        return dialect_of(path) == self.name

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        return read_keyed(path, base, self.name, prefix, scaling=_Options())


class _Options(Scaling):
    """PEFT's options in the header or beside the file, else the file's alphas, else none."""

    def __init__(self) -> None:
        self._options: Options = {}
        self._config: Path | None = None

    def source(self) -> dict[str, Any]:
        shown = {
            component or "model": {key: config[key] for key in _SHOWN if config.get(key)}
            | {key: True for key in _SWITCHES if config.get(key)}
            for component, config in self._options.items()
        }
        return {"options": shown} if shown else {}

    def files(self) -> list[Path]:
        return [] if self._config is None else [self._config]

    def notices(self) -> list[str]:
        if self._config is None:
            return []
        return [f"{self._config.name} beside the file: rank and alpha are taken from it"]

    def of_components(self, components: Mapping[str, Groups], tensors: Checkpoint, path: Path) -> dict[str, Scale]:
        unnamed = any(not group.key.prefix for groups in components.values() for group in groups.values())
        options = _in_header(tensors.metadata(path.name), components, path, unnamed=unnamed)
        if is_file(config := path.with_name(CONFIG)):
            self._config = config
            options = _beside(options, components, path, config)
        self._options = options
        return {
            component: self._scale(component, groups.values(), options.get(component), path)
            for component, groups in components.items()
        }

    def _scale(
        self, component: str, groups: Collection[Group], config: Mapping[str, Any] | None, path: Path
    ) -> Scale:
        if config is None:
            _check_alike(ALPHA, "whether its alpha is its rank or theirs is unknown", groups, path)
            _check_alike(MAGNITUDE, "whether it is a DoRA is unknown", groups, path)
            return _by_alpha
        where = f"{path}: {OPTIONS}" + (f" of {component}" if component else "")
        _check(config, groups, where, path, "" if self._config is None else f" and {self._config}")
        scales = read_scales(config, where)
        for prefix, tensors in {group.key.prefix: group.tensors for group in groups}.items():
            check_patterns(scales, tensors, f"{prefix}." if prefix else "")

        def scale(group: Group, rank: int) -> float:
            # Patterns match the names in training, which the file has; the base's names may lack a "text_model."
            if (expected := scales.rank(group.key.module)) != rank:
                down = group.parts[DOWN]
                raise SourceError(
                    f"{path}: {group.keys[DOWN]!r} has shape {list(down.shape)}, and should have rank {expected} by its options"
                )
            return scales.scale(group.key.module)

        return scale


def _by_alpha(group: Group, rank: int) -> float:
    if ALPHA not in group.keys:
        return 1.0
    if not (alpha := group.number(ALPHA)):
        raise SourceError(
            f"{group.path}: {group.keys[ALPHA]!r} is 0: for diffusers the LoRA changes nothing, for kohya's trainer 0 means the "
            "rank; choose with the dialect (--dialect kohya)"
        )
    return alpha / rank


def _in_header(header: Mapping[str, str], components: Iterable[str], path: Path, *, unnamed: bool) -> Options:
    """PEFT's options by component: of all or of none; ``unnamed``: keys name no component."""
    if not header.get(OPTIONS):
        return {}
    options = parse_json(header[OPTIONS], f"{path}: {OPTIONS}")
    found = {}
    for component in components:
        prefix = f"{component}." if component else ""
        inner = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
        if inner:
            found[component] = inner
    if unnamed and not found:  # saved from a single model, a component of this base
        denoiser = next((component for component in components if component in DENOISERS), None)
        found = {} if denoiser is None else {denoiser: options}
    # If only some components have options, diffusers takes PEFT's defaults for the others, and fails.
    if options and (missing := [component for component in components if component not in found]):
        raise SourceError(
            f"{path}: the options in the header do not cover all components that the file adapts: the scale of "
            f"{', '.join(missing) or 'its layers'} is unknown"
        )
    return found


def _beside(options: Options, components: Collection[str], path: Path, config_path: Path) -> Options:
    """The options in PEFT's configuration beside the file, which must not contradict those in the header."""
    config = read_config(config_path).raw
    both = f"{path} and {config_path}"
    for component, given in options.items():
        if any((given.get(key) or None) != (config.get(key) or None) for key in (*_SHOWN, *_SWITCHES)):
            raise SourceError(f"{both}: the options of {component or 'the model'} in the header are others")
    if options:
        return options
    if len(components) > 1:
        raise SourceError(f"{both}: one configuration, and several components: {', '.join(components)}")
    return {component: dict(config) for component in components}


def _check(config: Mapping[str, Any], groups: Collection[Group], where: str, path: Path, beside: str) -> None:
    """Refuse options under which the update is another one, and keys that contradict them."""
    if config.get("peft_type", "LORA") != "LORA":
        raise SourceError(f"{where}: not a LoRA (peft_type is {config['peft_type']!r})")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise SourceError(f"{where}: {option} is set, which is not supported: merge the LoRA with diffusers and convert the full checkpoint")  # fmt: skip
    if config.get("fan_in_fan_out"):
        raise SourceError(
            f"{where}{beside}: fan_in_fan_out is set, and layers of diffusers are never stored as [in, out]: if it is a LoRA of PEFT, "
            "its keys need PEFT's prefix (base_model.model.)"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and CHANGES_BASE.match(start):
        raise SourceError(
            f"{where}: init_lora_weights={start!r} changed the base's weights in training, so B @ A is not an "
            "update of the base"
        )
    for part, option in ((MAGNITUDE, "use_dora"), (BIAS, "lora_bias")):
        if not config.get(option) and (group := next((group for group in groups if part in group.keys), None)):
            raise SourceError(f"{path}: unmatched key {group.keys[part]!r}: {option} is not set")
    for group in groups:
        if ALPHA in group.keys:
            raise SourceError(f"{where}{beside}: sets alphas, and the file has keys of alphas as well")
        for part, option in ((MAGNITUDE, "use_dora"), (BIAS, "lora_bias")):
            if config.get(option) and DOWN in group.keys and part not in group.keys:
                raise SourceError(f"{path}: {group.keys[DOWN]!r} has no {part}, and {option} is set")


def _check_alike(part: str, why: str, groups: Collection[Group], path: Path) -> None:
    """Refuse a file in which some low-rank updates have a part, and others have not."""
    low_rank = [group for group in groups if DOWN in group.keys]
    lone = next((group for group in low_rank if part not in group.keys), None)
    if lone is not None and any(part in group.keys for group in low_rank):
        raise SourceError(f"{path}: {lone.keys[DOWN]!r} has no {part} and other layers have one: {why}")
