"""One adapter on its way from keys to updates."""

from __future__ import annotations

from pathlib import Path

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.renamed import rearranged
from shira_format.errors import SourceError
from shira_format.lora.files import read_tensors
from shira_format.lora.peft.config import Config, base_model_of, read_config, source_of
from shira_format.lora.peft.experts import Parameters
from shira_format.lora.peft.keys import PeftLayer, candidates, sorted_keys
from shira_format.lora.peft.layers import Modules
from shira_format.lora.peft.places import Places
from shira_format.lora.peft.replication import replication
from shira_format.lora.peft.tokens import rows_of
from shira_format.lora.peft.wholes import Wholes, without_tied_head
from shira_format.lora.update import Update
from shira_format.lora.updates import Lora


def read(weights: Path, config_path: Path, base: Checkpoint) -> Lora:
    """The LoRA in a pair of files; see :func:`shira_format.lora.open_lora`."""
    config = read_config(config_path)
    keys = sorted_keys(read_tensors(weights)[0], config, weights)
    replicated = replication(config, base)
    base = rearranged(base, replicated.copies, replicated.removed)
    keys.layers = without_tied_head(keys.layers, base, config, weights)
    places = Places(base, keys, config.parameters, weights)
    adapted = {name for layer in keys.layers for name in places.parameters(layer)}
    wholes = Wholes(keys.plain, adapted, {f"{module}.weight" for module in keys.tokens}, places, config, weights)
    whole = wholes.found()
    modules = [layer for layer in keys.layers if not _is_parameter(layer, config, places)]
    reader = Modules(places, config, modules, weights)
    updates: list[Update] = [reader.update(layer) for layer in modules]
    updates += Parameters(places, config, weights).updates(
        [layer for layer in keys.layers if layer not in modules]
    )
    updates += [
        rows_of(module, rows, places.tensor(f"{module}.weight"), base, config, weights)
        for module, rows in keys.tokens.items()
    ]
    additions = _additions(reader, modules, whole)
    notices = [f"names of the LoRA are not those of the base: {places.words}"] if places.words else []
    if replicated.layers:
        notices.append(
            f"layer_replication: the result has {replicated.layers} layers; shira_to_full takes config.json from the base, "
            f"and num_hidden_layers (or what the model calls it) must become {replicated.layers} there"
        )
    return Lora(
        updates=updates, whole=whole, additions=additions, copies=replicated.copies, removed=replicated.removed,
        source=source_of(config), base_model=base_model_of(config), files=[weights, config_path],
        notices=notices + wholes.notices,
    )  # fmt: skip


def _is_parameter(layer: PeftLayer, config: Config, places: Places) -> bool:
    names = {f"{layer.module}.{parameter}" for parameter in candidates(layer.module, config.parameters)}
    return bool(names & set(places.parameters(layer)))


def _additions(reader: Modules, layers: list[PeftLayer], whole: dict[str, Array]) -> dict[str, Array]:
    """What is added to biases; to those that ``bias`` trains, too, right away."""
    found = {}
    for layer in layers:
        if (addition := reader.bias(layer)) is None:
            continue
        name, values = addition
        if name in found:
            raise SourceError(f"{reader.where}: two additions to {name!r}")
        if name in whole:
            whole[name] = whole[name].astype(values.dtype) + values
        else:
            found[name] = values
    return found
