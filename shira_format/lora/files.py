"""Files of LoRAs: tensors by key, from safetensors or ``torch.save``, and JSON. Needs no torch; no pickle is executed."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float, working_dtype
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.wrapped import UnwrappedCheckpoint
from shira_format.errors import SourceError
from shira_format.names.wrappers import unwrapped_adapter

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MOST_JSON = 1 << 24  # bytes of a configuration file


def open_tensors(path: Path, base: Collection[str] | None = None) -> Checkpoint:
    """The tensors of one file by the keys that a saved adapter has, see :mod:`shira_format.names.wrappers`.

    Args:
        path: the file.
        base: the base's names; a wrapper's word that occurs in them is kept in keys.

    Raises:
        SourceError: neither a safetensors file nor one of ``torch.save``, or it holds other things than tensors.
        FormatError: a damaged safetensors file.
    """
    if not path.is_file() or path.suffix not in (SAFETENSORS, *PICKLES):
        raise SourceError(f"{path}: need a file that ends in {SAFETENSORS}, {', '.join(PICKLES)}")
    return unwrapped_adapter(open_checkpoint(path, wrapped=True), base)


def unwrapping_notices(tensors: Checkpoint) -> list[str]:
    """What was left out of keys, for the user."""
    return [tensors.notice] if isinstance(tensors, UnwrappedCheckpoint) else []


def read_tensors(path: Path, base: Collection[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of one file by key, checked as in :func:`checked`, and its ``__metadata__``.

    Raises:
        SourceError: as :func:`open_tensors` and :func:`checked`.
        FormatError: a damaged safetensors file.
    """
    tensors = open_tensors(path, base)
    found = {key: checked(path, key, tensors[key]) for key in tensors}
    return found, tensors.metadata(path.name)


def checked(path: Path, key: str, array: Array) -> Array:
    """``array``, whose dtype must be a float, and whose values finite.

    Raises:
        SourceError: they are not.
    """
    if not is_float(array.dtype):
        raise SourceError(f"{path}: {key!r} is of dtype {array.dtype}, not a float")
    if not np.isfinite(array.astype(working_dtype(array.dtype))).all():
        raise SourceError(f"{path}: {key!r} holds NaN or Inf")
    return array


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SourceError: not a JSON object, or too large.
    """
    if path.stat().st_size > MOST_JSON:
        raise SourceError(f"{path}: larger than {MOST_JSON} bytes, the limit for a configuration")
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        SourceError: not a JSON object; the message begins with ``where``.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: unreadable JSON: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{where}: not a JSON object but {type(found).__name__}")
    return found


def is_rank(value: Any) -> bool:
    """Whether a configuration's value can be a rank."""
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """Whether a configuration's value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def number_in(array: Array, key: str, path: Path) -> float:
    """The number in a tensor of one element such as ``alpha``.

    Raises:
        SourceError: it has more or no elements.
    """
    if array.size != 1:
        raise SourceError(f"{path}: {key!r} has shape {list(array.shape)}, not one number")
    return float(array.reshape(()).astype(np.float64))
