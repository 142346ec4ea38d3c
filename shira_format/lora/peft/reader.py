"""PEFT's LoRA: ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.

The rules are those of ``peft.tuners.lora``: ``delta W = scale * B @ A`` with scale ``alpha / r``, or ``alpha /
sqrt(r)`` under rslora; ``rank_pattern`` and ``alpha_pattern`` are regexes on module names, first hit wins.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.renamed import rearranged
from shira_format.errors import FormatError, SourceError
from shira_format.lora.base import Lora, Update
from shira_format.lora.files import open_tensors, read_json, read_tensors
from shira_format.lora.keys import parse_key
from shira_format.lora.peft.bare import bare_weights, config_by_hand, missing_config, notice_of
from shira_format.lora.peft.base_names import BaseNames, PeftLayer, candidates, sort_keys
from shira_format.lora.peft.config import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Config,
    base_model_of,
    find_peft_files,
    read_config,
    source_of,
)
from shira_format.lora.peft.dense import DenseReplacements, drop_tied_head
from shira_format.lora.peft.experts import ParameterLayers
from shira_format.lora.peft.layers import ModuleLayers
from shira_format.lora.peft.placed import placed
from shira_format.lora.peft.promised import check_biases
from shira_format.lora.peft.replication import Replication, replicate_layers
from shira_format.lora.peft.stated import statements
from shira_format.lora.peft.tokens import row_replacement
from shira_format.lora.peft.tuners.reader import read_tuner
from shira_format.lora.peft.wrapped import check_patterns


class Peft:
    """Files that ``save_pretrained`` writes."""

    name = "peft"

    def recognises(self, path: Path) -> bool:
        found = _find(path)
        return found is not None and not _names_components(found[0])

    def read(self, path: Path, base: Checkpoint, prefix: str | None = None) -> Lora:
        found = _find(path)
        if found is None:
            if weights := bare_weights(path, base):
                raise missing_config(weights)
            raise SourceError(f"{path}: no PEFT adapter: need {CONFIG} beside {' or '.join(WEIGHTS)}")
        weights, config = found
        if (raw := read_json(config)).get("peft_type") != "LORA":
            return read_tuner(raw, weights, config, base, prefix)
        return read(weights, read_config(config), base, prefix, [weights, config])


def read_by_hand(path: Path, base: Checkpoint, prefix: str | None, rank: int | None, alpha: float | None) -> Lora:
    """Read weights without a configuration; see :func:`shira_format.lora.open_lora`."""
    weights, config = config_by_hand(path, base, rank, alpha)
    lora = read(weights, config, base, prefix, [weights])
    return replace(lora, notices=[notice_of(config), *lora.notices])


def _names_components(weights: Path) -> bool:
    """Whether all keys name a component as diffusers or kohya do, with PEFT's configuration beside."""
    try:
        keys = list(open_tensors(weights))
    except (FormatError, SourceError):  # reported when it is read
        return False
    parsed = [None if key.startswith(PREFIX) else parse_key(key) for key in keys]
    return bool(parsed) and all(key is not None and key.prefix for key in parsed)


def _find(path: Path) -> tuple[Path, Path] | None:
    if path.is_file() and path.suffix not in (".safetensors", ".bin"):
        return None
    return find_peft_files(path)


def read(weights: Path, config: Config, base: Checkpoint, prefix: str | None, files: list[Path]) -> Lora:
    """The LoRA in a file of weights, under these options; see :func:`shira_format.lora.open_lora`."""
    keys = sort_keys(read_tensors(weights, base)[0], config, weights)
    check_patterns(config.scales, open_tensors(weights, base), PREFIX)
    replicated = replicate_layers(config, base) if config.replication else Replication()
    if config.replication:
        base = rearranged(base, replicated.copies, replicated.removed)
    saved = [layer.module for layer in keys.layers]
    keys.layers = drop_tied_head(keys.layers, base, config, weights)
    names = BaseNames(base, keys, config.parameters, weights, prefix, statements(config.raw, base))
    adapted = {name for layer in keys.layers for name in names.parameters(layer)}
    check_biases(config, keys, names, weights)
    replacements = DenseReplacements(
        keys.plain, adapted, {f"{module}.weight" for module in keys.tokens}, names, config, weights
    )
    whole = replacements.found()
    layers = [layer for layer in keys.layers if not _is_parameter(layer, config, names)]
    modules = ModuleLayers(names, config, layers, weights)
    updates: list[Update] = [modules.update(layer) for layer in layers]
    if parameters := [layer for layer in keys.layers if layer not in layers]:
        updates += ParameterLayers(names, config, weights).updates(parameters)
    updates += [
        row_replacement(module, rows, names.tensor(f"{module}.weight"), base, config, weights)
        for module, rows in keys.tokens.items()
    ]
    updates = placed(updates, names.base, weights)
    additions = _additions(modules, layers, whole)
    left_out = {
        "equal to the base's": replacements.equal,
        "the tied embeddings' own, repeated": [
            m for m in saved if all(layer.module != m for layer in keys.layers)
        ],
        "of VeLoRA, for training only": keys.training,
    }
    notices = names.rename.notices("the LoRA")
    if replicated.layers:
        notices.append(
            f"layer_replication: the result has {replicated.layers} layers; shira_to_full copies config.json of the base, "
            f"in which num_hidden_layers (or its equivalent) must then be set to {replicated.layers}"
        )
    return Lora(
        updates=updates, whole=whole, additions=additions, copies=replicated.copies, removed=replicated.removed,
        source=source_of(config), base_model=base_model_of(config), files=files,
        left_out={reason: found for reason, found in left_out.items() if found},
        notices=notices + replacements.notices,
    )  # fmt: skip


def _is_parameter(layer: PeftLayer, config: Config, names: BaseNames) -> bool:
    targets = {f"{layer.module}.{parameter}" for parameter in candidates(layer.module, config.parameters)}
    return bool(targets & set(names.parameters(layer)))


def _additions(modules: ModuleLayers, layers: list[PeftLayer], whole: dict[str, Array]) -> dict[str, Array]:
    """The additions to biases by name, but for those of biases in ``whole``, to which they are added here."""
    found = {}
    for layer in layers:
        if (addition := modules.bias(layer)) is None:
            continue
        name, values = addition
        if name in found:
            raise SourceError(f"{modules.where}: two additions to {name!r}")
        if name in whole:
            whole[name] = whole[name].astype(values.dtype) + values
        else:
            found[name] = values
    return found
