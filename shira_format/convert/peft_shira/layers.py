"""The entries of one adapted layer, from PEFT's two tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import is_float, round_to, working_dtype
from shira_format.checkpoints import Checkpoint
from shira_format.convert.peft_shira.files import Kind
from shira_format.errors import SourceError
from shira_format.lora.files import checked

# From here on float32 skips integers: 2^24 may have been 2^24 + 1.
_EXACT = 1 << 24


@dataclass(frozen=True)
class ShiraLayer:
    """One adapted layer as an update of the base's weight; its entries are read when they are asked for.

    Attributes:
        name: the weight's name in the base.
        shape: its shape, ``[rows, columns]``.
        weight_dtype: its dtype.
        kind: the method.
        tensors: the adapter's file.
        indices_key: the key of the positions there.
        values_key: the key of the values.
        path: the adapter's file, for messages.
    """

    name: str
    shape: tuple[int, ...]
    weight_dtype: np.dtype[Any]
    kind: Kind
    tensors: Checkpoint
    indices_key: str
    values_key: str
    path: Path

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which PEFT adds: float64 to a float64 weight, else float32."""
        return working_dtype(self.weight_dtype)

    @property
    def columns(self) -> int:
        """Elements a row."""
        return self.shape[-1]

    def check(self, rank: int | None) -> None:
        """Check what is known without reading the tensors.

        Args:
            rank: PEFT's ``r``; None where there is none.

        Raises:
            SourceError: shapes or dtypes that do not fit each other or the base.
        """
        if len(self.shape) != 2:
            raise self._bad(
                self.values_key, f"adapts {self.name!r} of shape {list(self.shape)}: not a linear layer"
            )
        values, indices = self.tensors.shape(self.values_key), self.tensors.shape(self.indices_key)
        if len(values) != 1:
            raise self._bad(self.values_key, f"has shape {list(values)}, not [n]")
        if not is_float(self.tensors.dtype(self.values_key)):
            raise self._bad(self.values_key, f"is of dtype {self.tensors.dtype(self.values_key)}, not a float")
        wanted = values if self.kind.flat else (2, *values)
        if indices != wanted:
            raise self._bad(self.indices_key, f"has shape {list(indices)}, should have {list(wanted)}")
        found = self.tensors.dtype(self.indices_key)
        allowed = (np.int32,) if self.kind.flat else (np.int32, np.float32)  # PEFT on Windows saves float32
        if found not in allowed:
            raise self._bad(self.indices_key, f"is of dtype {found}, not {' or '.join(np.dtype(d).name for d in allowed)}")  # fmt: skip
        if rank is not None and values[0] != rank * sum(self.shape):
            raise self._bad(
                self.values_key,
                f"has {values[0]} entries; PEFT holds r * (rows + columns) = {rank} * {sum(self.shape)} in a layer of shape "
                f"{list(self.shape)}",
            )

    def entries(self) -> tuple[Indices, Array]:
        """Flat positions int64 ``[n]``, strictly increasing, and the values ``[n]`` as they are stored.

        Raises:
            SourceError: a position that is no whole number, out of range or there twice; a value that is not finite.
        """
        values = checked(self.path, self.values_key, self.tensors[self.values_key])
        flat = self._positions()
        if not (flat[1:] > flat[:-1]).all():
            order = np.argsort(flat, kind="stable")
            flat, values = flat[order], values[order]
        if (twice := np.flatnonzero(flat[1:] == flat[:-1])).size:
            # PEFT would add both, rounding twice; it never writes such a file.
            raise self._bad(self.indices_key, f"names the element {self._place(int(flat[twice[0]]))} twice")
        return flat, values

    def _positions(self) -> Indices:
        raw = self.tensors[self.indices_key]
        if raw.dtype != np.int32:
            if not (raw == np.floor(raw)).all():
                raise self._bad(self.indices_key, "holds a position that is not an integer")
            if raw.size and np.abs(raw).max() >= _EXACT:
                raise self._bad(
                    self.indices_key,
                    "holds positions from 2^24 on in float32, which cannot tell them apart; save the adapter with integer indices",
                )
        numbers = raw.astype(np.int64)
        rows, columns = self.shape
        if self.kind.flat:
            self._check_range(numbers, rows * columns, "element")
            return numbers
        self._check_range(numbers[0], rows, "row")
        self._check_range(numbers[1], columns, "column")
        return np.asarray(numbers[0] * columns + numbers[1])

    def _check_range(self, numbers: Indices, size: int, what: str) -> None:
        if (bad := np.flatnonzero((numbers < 0) | (numbers >= size))).size:
            raise self._bad(
                self.indices_key,
                f"names {what} {numbers[bad[0]]}, out of range in {self.name!r} of shape {list(self.shape)}",
            )

    def steps(self, values: Array) -> Array:
        """``values`` as PEFT adds them, in :attr:`dtype`."""
        with np.errstate(over="ignore"):  # found, and named, where the entries are finished
            if self.kind.rounds_first:
                values = round_to(values.copy(), self.weight_dtype)
            return np.asarray(values.astype(self.dtype))

    def tile(self, start: int, stop: int, out: Array) -> None:
        """Rows ``start`` to ``stop`` of the dense update."""
        flat, values = self.entries()
        first, last = np.searchsorted(flat, [start * self.columns, stop * self.columns])
        out[...] = 0
        out.reshape(-1)[flat[first:last] - start * self.columns] = self.steps(values[first:last])

    def _place(self, flat: int) -> str:
        return str(list(divmod(flat, self.columns)))

    def _bad(self, key: str, reason: str) -> SourceError:
        return SourceError(f"{self.path}: {key!r} {reason}")
