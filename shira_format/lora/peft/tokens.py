"""Rows of an embedding that are trained alone (``trainable_token_indices``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float, round_to, working_dtype
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.peft.config import MERGE_FIRST, Config


@dataclass(frozen=True)
class RowReplacement:
    """An update that sets some rows of a weight to new values.

    Attributes:
        name, shape: of the weight, ``[rows, columns]``.
        base: the checkpoint that has the weight.
        rows: int64 ``[n]``, strictly increasing.
        values: ``[n, columns]``, the new rows, in the weight's dtype.
    """

    name: str
    shape: tuple[int, ...]
    base: Checkpoint
    rows: Array
    values: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64)  # in which base + (target - base) is exactly the target

    @property
    def columns(self) -> int:
        return self.shape[1]

    def tile(self, start: int, stop: int, out: Array) -> None:
        out[...] = 0
        first, last = np.searchsorted(self.rows, [start, stop])
        for i in range(first, last):
            row = int(self.rows[i])
            before = self.base.part(self.name, row * self.columns, (row + 1) * self.columns)
            np.subtract(self.values[i], before, out=out[row - start], dtype=np.float64)


def row_replacement(
    module: str, values: Array, name: str, base: Checkpoint, config: Config, where: object
) -> RowReplacement:
    """``token_adapter.trainable_tokens_delta`` as an update: despite its name it holds the new rows, not deltas.

    Raises:
        SourceError: the options do not say which rows, or the base's weight does not have them.
    """
    rows = _indices(module, config)
    shape, dtype = base.shape(name), base.dtype(name)
    if rows is None:
        raise SourceError(
            f"{config.path}: trainable_token_indices does not say which rows of {module!r} are trained"
        )
    if len(shape) != 2 or values.shape != (len(rows), shape[1]):
        raise SourceError(
            f"{where}: {module}.token_adapter.trainable_tokens_delta has shape {list(values.shape)}; {len(rows)} rows of "
            f"{name!r}, {list(shape)}, are trained"
        )
    if rows and max(rows) >= shape[0]:
        raise SourceError(
            f"{config.path}: trainable_token_indices has row {max(rows)}, the base's {name!r} has {shape[0]} (was it resized?): "
            f"{MERGE_FIRST}"
        )
    if is_float(dtype):  # other dtypes are refused for all updates alike
        with np.errstate(over="ignore"):
            values = round_to(values, dtype)
        if not np.isfinite(values.astype(working_dtype(dtype))).all():
            raise SourceError(f"{where}: new rows of {module!r} do not fit the base's dtype {dtype}")
    order = np.argsort(rows)
    return RowReplacement(name, shape, base, np.asarray(rows, np.int64)[order], values[order])


def _indices(module: str, config: Config) -> list[int] | None:
    if isinstance(config.tokens, list):
        return config.tokens or None
    for target, rows in config.tokens.items():
        if module == target or module.endswith(f".{target}"):
            return rows
    return None
