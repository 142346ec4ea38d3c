"""Files of LoRAs: tensors by key, from safetensors or ``torch.save``, and JSON beside them. No torch, no pickle is run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float, working_dtype
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.errors import SourceError

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MOST_JSON = 1 << 24  # bytes of a configuration file


def open_tensors(path: Path) -> Checkpoint:
    """The tensors of one file.

    Raises:
        SourceError: neither a safetensors file nor one of ``torch.save``, or it holds more than tensors.
        FormatError: a damaged safetensors file.
    """
    if not path.is_file() or path.suffix not in (SAFETENSORS, *PICKLES):
        raise SourceError(f"{path}: need a file that ends in {SAFETENSORS}, {', '.join(PICKLES)}")
    return open_checkpoint(path)


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of one file by key, each of floats and finite, and its ``__metadata__``.

    Raises:
        SourceError: as :func:`open_tensors`; or a tensor is not of floats, or holds NaN or Inf.
        FormatError: a damaged safetensors file.
    """
    tensors = open_tensors(path)
    found = {key: checked(path, key, tensors[key]) for key in tensors}
    return found, tensors.metadata(path.name)


def checked(path: Path, key: str, array: Array) -> Array:
    """``array``, if it is of floats and finite."""
    if not is_float(array.dtype):
        raise SourceError(f"{path}: {key!r} is of dtype {array.dtype}, not a float")
    if not np.isfinite(array.astype(working_dtype(array.dtype))).all():
        raise SourceError(f"{path}: {key!r} holds NaN or Inf")
    return array


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SourceError: it is something else, or too large.
    """
    if path.stat().st_size > MOST_JSON:
        raise SourceError(f"{path}: larger than {MOST_JSON} bytes, which no configuration is")
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        SourceError: it is something else; the message begins with ``where``.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: unreadable JSON: {error}") from None
    if not isinstance(found, dict):
        raise SourceError(f"{where}: not a JSON object but {type(found).__name__}")
    return found


def is_rank(value: Any) -> bool:
    """Whether a value of a configuration can be a rank."""
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def number_in(tensors: Mapping[str, Array], key: str, path: Path) -> float:
    """The one number in a tensor such as ``alpha``.

    Raises:
        SourceError: it holds more or fewer.
    """
    array = tensors[key]
    if array.size != 1:
        raise SourceError(f"{path}: {key!r} has shape {list(array.shape)}, not one number")
    return float(array.reshape(()).astype(np.float64))
