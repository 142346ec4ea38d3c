"""The tensors of one adapted module, and what they do to its weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import is_float
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.lora.base import Update
from shira_format.lora.files import checked, number_in
from shira_format.lora.keys import ALPHA, DOWN, UP, Key

_STEP = 1 << 22  # elements of a large tensor that are checked at a time


@dataclass
class Group:
    """The parts of one module's LoRA, as the file has them.

    Attributes:
        path: the file.
        key: prefix and module, without a part.
        tensors: all that the file holds.
        parts: the tensors by part, but for large ones.
        keys: all keys by part.
        scale_of: the factor of the module's update, given its rank.
    """

    path: Path
    key: Key
    tensors: Checkpoint
    parts: dict[str, Array] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    scale_of: Callable[[Group, int], float] = lambda group, rank: group.alpha(rank) / rank

    def add(self, part: str, key: str, *, stored: bool) -> None:
        """Add a part; one that is ``stored`` is checked in pieces and stays in the file.

        Raises:
            SourceError: it is there already, of no float dtype, or not finite.
        """
        if (other := self.keys.setdefault(part, key)) != key:
            raise SourceError(f"{self.path}: {other!r} and {key!r} are the same part of one LoRA")
        if stored:
            _check_stored(self.tensors, key, self.path)
        elif (
            part in (ALPHA, "on_input") and self.tensors.dtype(key).kind in "iub"
        ):  # a number, as some trainers save it
            self.parts[part] = self.tensors[key].astype(np.float64)
        else:
            self.parts[part] = checked(self.path, key, self.tensors[key])

    @property
    def stored(self) -> set[str]:
        """The parts that are still in the file."""
        return self.keys.keys() - self.parts.keys()

    def alpha(self, rank: int) -> float:
        """Alpha; the rank if the file has none or 0."""
        return (self.number(ALPHA) if ALPHA in self.parts else 0.0) or float(rank)

    def number(self, part: str) -> float:
        """The number in a part of one element."""
        return number_in(self.parts[part], self.keys[part], self.path)

    def scale(self, rank: int) -> float:
        """The factor of the module's update."""
        return self.scale_of(self, rank)

    def factors(self) -> tuple[Array, Array]:
        """``lora_up`` and ``lora_down``, whose ranks agree.

        Raises:
            SourceError: one is missing, or they do not fit.
        """
        for part, partner in ((DOWN, UP), (UP, DOWN)):
            if part not in self.parts:
                have = f"{self.keys[partner]!r} has no partner" if partner in self.parts else f"{self.name!r} has neither factor"  # fmt: skip
                raise SourceError(f"{self.path}: {have}: {part} is missing")
        up, down = self.parts[UP], self.parts[DOWN]
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise SourceError(
                f"{self.path}: {self.keys[DOWN]!r} of shape {list(down.shape)} and {self.keys[UP]!r} of shape {list(up.shape)} "
                "have no rank in common"
            )
        return up, down

    @property
    def name(self) -> str:
        """Prefix and module, as in the file."""
        if not self.key.prefix:
            return self.key.module
        return self.key.prefix + ("_" if self.key.is_flat else ".") + self.key.module

    @property
    def where(self) -> str:
        """File and module, for messages."""
        return f"{self.path}: {self.name!r}"


class Layer(NamedTuple):
    """The effect of a module's LoRA.

    Attributes:
        update: of the weight.
        weight: addition to a 1-D weight, instead of an update.
        bias: addition to the bias.
        magnitude: of DoRA: ``[rows]``, or with ``kernel`` ``[columns / kernel]``.
        kernel: for DoRA by columns, the number of columns that share a norm; 0 for DoRA by rows.
        eps: added to DoRA's norms.
        rank: for the provenance.
        scale: likewise.
        whole: replaces the tensor.
    """

    update: Update | None = None
    weight: Array | None = None
    bias: Array | None = None
    magnitude: Array | None = None
    kernel: int = 0
    eps: float = 0.0
    rank: int | None = None
    scale: float | None = None
    whole: Array | None = None


def _check_stored(tensors: Checkpoint, name: str, path: Path) -> None:
    """As ``checked``, in pieces."""
    if not is_float(dtype := tensors.dtype(name)):
        raise SourceError(f"{path}: {name!r} is of dtype {dtype}, not a float")
    size = int(np.prod(tensors.shape(name), dtype=object))
    for start in range(0, size, _STEP):
        checked(path, name, tensors.part(name, start, min(size, start + _STEP)))
