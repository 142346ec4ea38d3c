"""The folder of a PEFT LoRA: its two files, and what may be replaced by another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shira_format._core.arrays import Array, bits
from shira_format._core.dtypes import dtype_name
from shira_format.errors import FormatError, SourceError
from shira_format.export.lora.plan import Kind, pattern, targets
from shira_format.export.lora.report import LayerReport
from shira_format.lora.peft import CONFIG, PREFIX, WEIGHTS
from shira_format.storage.atomic import LITTER
from shira_format.storage.safetensors_file import SafetensorsFile

FILE = WEIGHTS[0]
WRITER = "shira_to_lora"
_MARK = "written_by"

Shapes = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


class WeightsFile:
    """A safetensors file that is written tensor by tensor, although its header tells their sizes.

    Room for the header is left by the largest shapes that the tensors may have; the true one, which is no longer, is filled up
    with spaces.
    """

    def __init__(self, file: BinaryIO, most: Shapes) -> None:
        """Args: ``file``: open for writing, empty; ``most``: dtypes and largest shapes, also of tensors that may not come."""
        self._file = file
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt", _MARK: WRITER}}
        self._at = 0
        end = sum(dtype.itemsize * int(np.prod(shape, dtype=object)) for dtype, shape in most.values())
        entries = self._entries | {name: _entry(*known, end, end) for name, known in most.items()}
        self._room = len(_text(entries)) + 7 & ~7
        file.write(bytes(8 + self._room))

    def add(self, name: str, array: Array) -> None:
        """Write one tensor."""
        array = np.ascontiguousarray(array)
        self._entries[name] = _entry(array.dtype, array.shape, self._at, self._at + array.nbytes)
        self._at += array.nbytes
        self._file.write(bits(array).data)

    def finish(self) -> None:
        """Write the header."""
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + _text(self._entries).ljust(self._room))


def _entry(dtype: np.dtype[Any], shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [start, stop]}


def _text(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()


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


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ``adapter_config.json``; escapes instead of other letters, so that whatever encoding a reader takes is right."""
    (folder / CONFIG).write_bytes(json.dumps(values, indent=2, allow_nan=False).encode("ascii") + b"\n")


def check_replaceable(folder: Path) -> None:
    """Raise SourceError unless ``folder`` holds a LoRA that :func:`shira_to_lora` wrote, and nothing else."""
    reason = f"{folder}: not a folder that {WRITER} wrote, and so not replaced"
    if folder.is_symlink() or not folder.is_dir():
        raise SourceError(reason)
    names = {path.name for path in folder.iterdir()} - LITTER
    if others := sorted(names - {CONFIG, FILE}):
        raise SourceError(f"{folder}: holds {others[0]!r}, which {WRITER} did not write, and so is not replaced")
    try:
        file = SafetensorsFile(folder / FILE)
    except (OSError, FormatError):
        raise SourceError(reason) from None
    mark = file.metadata.get(_MARK)
    file.close()
    if mark != WRITER or not (folder / CONFIG).is_file():
        raise SourceError(reason)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum((folder / name).stat().st_size for name in (CONFIG, FILE))
