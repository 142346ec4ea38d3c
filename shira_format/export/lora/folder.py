"""The folder of a PEFT LoRA: its two files, and which folders hold one that was written here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format.errors import SourceError
from shira_format.export.lora.plan import Kind, pattern, targets
from shira_format.export.lora.report import LayerReport
from shira_format.lora.peft.config import CONFIG, PREFIX, WEIGHTS
from shira_format.storage.safetensors_file import SafetensorsFile

FILE = WEIGHTS[0]
WRITER = "shira_to_lora"
_MARK = "written_by"
METADATA = {"format": "pt", _MARK: WRITER}

Shapes = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


def factors_of(module: str, kind: Kind, shape: tuple[int, ...], up: Array, down: Array) -> dict[str, Array]:
    """The tensors of one adapted module as PEFT names and shapes them.

    Args:
        module: its name in the live model.
        kind: what it is.
        shape: of its weight.
        up: ``[shape[0], r]``.
        down: ``[r, product of the other dimensions]``; ``up @ down`` is what the weight's matrix view gains.
    """
    start = f"{PREFIX}{module}."
    rank = down.shape[0]
    if kind == "linear":
        return {f"{start}lora_A.weight": down, f"{start}lora_B.weight": up}
    if kind == "conv":
        ones = (1,) * (len(shape) - 2)
        return {
            f"{start}lora_A.weight": down.reshape(rank, *shape[1:]),
            f"{start}lora_B.weight": up.reshape(shape[0], rank, *ones),
        }
    # Both store the transposed of what B @ A is.
    if kind == "conv1d":
        return {f"{start}lora_A.weight": up.T, f"{start}lora_B.weight": down.T}
    return {f"{start}lora_embedding_A": up.T, f"{start}lora_embedding_B": down.T}


def largest_shapes(module: str, kind: Kind, shape: tuple[int, ...], rank: int) -> Shapes:
    """Dtypes and shapes of :func:`factors_of` at the largest rank that may come."""
    columns = int(np.prod(shape[1:], dtype=object))
    empty = np.broadcast_to(np.float32(0), (shape[0], rank)), np.broadcast_to(np.float32(0), (rank, columns))
    return {name: (array.dtype, array.shape) for name, array in factors_of(module, kind, shape, *empty).items()}


def config(
    layers: list[LayerReport], saved: list[str], known: set[str] | None, base_model: Mapping[str, Any]
) -> dict[str, Any]:
    """``adapter_config.json``: what PEFT must know, its scale 1 for every rank.

    Args:
        layers: the adapted weights.
        saved: the modules that are replaced as a whole.
        known: names of the live model's modules, if a base told them.
        base_model: ``id`` and ``revision``, if they are known.
    """
    rank = max(layer.rank for layer in layers)
    others = {pattern(layer.module): layer.rank for layer in layers if layer.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model.get("id"),
        "revision": base_model.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": targets([layer.module for layer in layers], known),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in layers),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def own_files(folder: Path) -> set[str]:
    """Names of the files of a LoRA that :func:`shira_to_lora` wrote.

    Raises:
        SourceError: the folder holds none.
        OSError: its weights cannot be read.
        FormatError: they are not a safetensors file.
    """
    file = SafetensorsFile(folder / FILE)
    mark = file.metadata.get(_MARK)
    file.close()
    if mark != WRITER or not (folder / CONFIG).is_file():
        raise SourceError(f"its weights do not say so, or it has no {CONFIG}")
    return {CONFIG, FILE}
