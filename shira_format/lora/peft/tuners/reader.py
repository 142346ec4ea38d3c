"""Reads an adapter of one of :data:`~shira_format.lora.peft.tuners.TUNERS` as updates of a base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.files import checked, open_tensors
from shira_format.lora.peft.base_names import BaseNames, Keys, PeftLayer
from shira_format.lora.peft.config import HARMLESS, PREFIX, Config, Scales, base_model_of
from shira_format.lora.peft.dense import DenseReplacements
from shira_format.lora.peft.end_patterns import NO_PATTERNS
from shira_format.lora.peft.tuners import REFUSED, TUNERS, tuner
from shira_format.lora.peft.tuners.common import Effect, Options, Tuner, TunerLayer
from shira_format.names.prefixes import AmbiguousNames, match_names

# Options of all kinds of adapters.
COMMON = frozenset(
    {
        "peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
        "fan_in_fan_out",
    }
)  # fmt: skip
# What PEFT's wrappers insert into names of the base's parameters.
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")


class _Named(PeftLayer):
    """A layer whose weight is to be found by its name alone."""

    def pair(self, where: object) -> tuple[Array, Array]:
        nothing = np.zeros(())
        return nothing, nothing


def read_tuner(
    raw: Mapping[str, Any], weights: Path, config_path: Path, base: Checkpoint, prefix: str | None
) -> Lora:
    """The adapter in a pair of files, whose options are ``raw``; see :func:`shira_format.lora.open_lora`.

    Raises:
        SourceError: it is of a kind that is not supported, or does not fit the base; the message says why.
        FormatError: a damaged safetensors file.
    """
    kind = raw.get("peft_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise SourceError(f"{config_path}: not a LoRA (peft_type is {kind!r}): {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in TUNERS:
        raise SourceError(f"{config_path}: not a LoRA (peft_type is {kind!r})")
    found, options = tuner(kind), Options(config_path, raw)
    _check_options(found, options)
    config = _config(options)
    layers, shared, plain = _sort(found, kind, weights, base)
    adapter = _Adapter(weights, options, shared, base, turned=_holds_turned(base))
    names = _names(found, adapter, layers, prefix)
    effects = {
        module: found.effect(
            adapter.layer(module, parts, names.tensor(f"{module}.weight"), names.tensor(f"{module}.bias"))
        )
        for module, parts in layers.items()
    }
    adapted = {f"{module}.weight" for module in layers}
    rows, whole_weights = (adapted, set[str]()) if found.trains_rows else (set[str](), adapted)
    dense = DenseReplacements(plain, whole_weights, rows, names, config, weights)
    whole = dense.found()
    updates, additions = _collect(effects, names, whole, weights)
    return Lora(
        updates=updates, whole=whole, additions=additions, source=_source(found, kind, options),
        base_model=base_model_of(config), files=[weights, config_path],
        notices=names.rename.notices("the adapter") + dense.notices,
    )  # fmt: skip


def _check_options(kind: Tuner, options: Options) -> None:
    for option, reason in kind.refused.items():
        if options[option]:
            raise SourceError(f"{options.path}: {option} is set: {reason}")
    known = COMMON | kind.options | kind.harmless | kind.refused.keys()
    if kind.parts[0].startswith("lora_"):  # a subclass of LoRA's options
        known |= HARMLESS
    for option in options.raw.keys() - known:
        if options.raw[option]:
            raise SourceError(
                f"{options.path}: the option {option!r} is set, which is unknown and may change the update; if it does not, remove it "
                "from the file"
            )
    bias = options["bias"]
    if bias not in (None, "none", "all") and not (isinstance(bias, str) and bias.endswith("_only")):
        raise SourceError(f"{options.path}: bias must be 'none', 'all' or '..._only', not {bias!r}")
    if kind.check is not None:
        kind.check(options)


def _config(options: Options) -> Config:
    """What :class:`DenseReplacements` needs to know."""
    saved = options["modules_to_save"] or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise SourceError(f"{options.path}: modules_to_save must be a list of names")
    scales = Scales(str(options.path), 1, 1, NO_PATTERNS, NO_PATTERNS, use_rslora=False)
    config = Config(options.path, options.raw, scales, saved, [], [], [])
    _check_text(options.path, base_model_of(config))
    return config


def _check_text(path: Path, value: Any) -> None:
    """What goes into the adapter's manifest must be JSON and UTF-8, on which Python's reader does not insist."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: holds a value that an adapter's header cannot: {error}") from None


def _source(kind: Tuner, name: str, options: Options) -> dict[str, Any]:
    keys = sorted(kind.options | {"bias", "modules_to_save", "peft_version"})
    found = {"kind": "lora", "dialect": "peft", "peft_type": name}
    found |= {key: options[key] for key in keys if options[key]}
    _check_text(options.path, found)
    return found


def _sort(
    kind: Tuner, name: str, weights: Path, base: Checkpoint
) -> tuple[dict[str, dict[str, Array]], dict[str, Array], dict[str, Array]]:
    """The tensors: by module and part; those of no layer; and whole ones by their names in the model.

    Raises:
        SourceError: a key that is none of these, or no layer at all.
    """
    tensors = open_tensors(weights, list(base))
    layers: dict[str, dict[str, Array]] = {}
    shared: dict[str, Array] = {}
    plain: dict[str, Array] = {}
    for key in tensors:
        array = tensors[key]
        if is_float(array.dtype) or array.dtype.kind not in "iu":
            array = checked(weights, key, array)
        short = key.removeprefix(PREFIX)
        module, part = _split(short, kind.parts)
        if (common := key.rpartition(".")[2]) in kind.shared:
            # PEFT saves it once, or again in each layer.
            if not np.array_equal(shared.setdefault(common, array), array):
                raise SourceError(
                    f"{weights}: {key!r} differs from another layer's {common}, which all should share"
                )
        elif short == key:
            raise SourceError(f"{weights}: unmatched key {key!r}: it does not start with {PREFIX!r}")
        elif module is not None:
            if ".base_layer" in f".{module}":
                raise SourceError(f"{weights}: {module!r} is wrapped several times, by adapters of several kinds")
            layers.setdefault(module, {})[part] = array
        elif not is_float(array.dtype) or ".original_module." in short:
            raise SourceError(f"{weights}: unmatched key {key!r}: not a known part of {name}")
        elif (tensor := _WRAPPED.sub("", short)) in plain:
            raise SourceError(f"{weights}: {key!r} means the same tensor as another key")
        else:
            plain[tensor] = array
    if not layers:
        raise SourceError(f"{weights}: no key ends in {' or '.join(kind.parts)}: no layer is adapted by {name}")
    return layers, shared, plain


def _split(key: str, parts: tuple[str, ...]) -> tuple[str | None, str]:
    """The module and the part of a key; None if it ends in no part."""
    for part in parts:
        if key.endswith(f".{part}"):
            return key.removesuffix(f".{part}"), part
    return None, ""


@dataclass(frozen=True)
class _Adapter:
    """What all layers have in common."""

    weights: Path
    options: Options
    shared: Mapping[str, Array]
    base: Checkpoint
    turned: bool

    def layer(self, module: str, parts: Mapping[str, Array], weight: str, bias: str) -> TunerLayer:
        """A layer, given the names of its weight and its bias in the base.

        Raises:
            SourceError: the base does not have the weight.
        """
        where = f"{self.weights}: {module!r}"
        if weight not in self.base:
            raise SourceError(
                f"{where}: its weight is no tensor of the base (experts of one parameter are not supported)"
            )
        return TunerLayer(
            where,
            module,
            parts,
            self.shared,
            weight,
            self.base.shape(weight),
            bias,
            self.base,
            self.options,
            self.turned,
        )


def _names(
    kind: Tuner, adapter: _Adapter, layers: Mapping[str, Mapping[str, Array]], prefix: str | None
) -> BaseNames:
    """The base's names; where several would be possible, those that all layers fit.

    Raises:
        SourceError: there are none, or several.
    """
    keys = Keys(layers=[_Named(module) for module in layers])
    try:
        return BaseNames(adapter.base, keys, [], adapter.weights, prefix)
    except AmbiguousNames:
        if prefix is not None:
            raise

    def fits(name: str, found: str) -> bool:
        module = name.removesuffix(".weight")
        try:
            kind.effect(adapter.layer(module, layers[module], found, f"{found.removesuffix('weight')}bias"))
        except SourceError:
            return False
        return True

    rename = match_names([f"{module}.weight" for module in layers], adapter.base, adapter.weights, fits=fits)
    return BaseNames(adapter.base, keys, [], adapter.weights, rename.new)


def _holds_turned(base: Checkpoint) -> bool:
    """Whether the bias of a weight that is not square shows that it is stored as ``[in, out]``."""
    for name in base:
        shape, bias = base.shape(name), f"{name.removesuffix('weight')}bias"
        if len(shape) == 2 and shape[0] != shape[1] and bias in base and base.shape(bias) == shape[1:]:
            return True
    return False


def _collect(
    effects: Mapping[str, Effect], names: BaseNames, whole: dict[str, Array], weights: Path
) -> tuple[list[Update], dict[str, Array]]:
    """The updates, and the additions to biases; adds to ``whole``."""
    updates: dict[str, Update] = {}
    additions: dict[str, Array] = {}
    for module, effect in effects.items():
        name = partial("{}.{}".format, module)
        if (
            effect.update is not None
            and updates.setdefault(effect.update.name, effect.update) is not effect.update
        ):
            raise SourceError(f"{weights}: {module!r} and another layer adapt the base's {effect.update.name!r}")
        if effect.bias is not None:
            target = names.tensor(name("bias"))
            if target not in names.base or names.base.shape(target) != effect.bias.shape:
                raise SourceError(
                    f"{weights}: {module!r} changes a bias of {effect.bias.size} numbers, and the base has no such {target!r}"
                )
            if target in whole:
                raise SourceError(
                    f"{weights}: {module!r} changes the bias {target!r}, which is saved whole as well"
                )
            additions[target] = effect.bias
        for parameter, array in effect.whole.items():
            target = names.tensor(name(parameter))
            if target not in names.base or names.base.shape(target) != array.shape or target in whole:
                raise SourceError(
                    f"{weights}: {module!r} replaces {target!r} by a tensor of shape {list(array.shape)}, which does not fit the base"
                )
            whole[target] = array
    return list(updates.values()), additions
