"""Which entries may be chosen at all: those within some masks, and without others."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.masks.weights import Weight
from shira_format.names.prefixes import match_names
from shira_format.tensors import SparseTensor

# A mask or an adapter, of which only the entries count, or a file of one.
MaskSource = str | os.PathLike[str] | Mapping[str, SparseTensor]


@dataclass(frozen=True)
class Allowed:
    """The entries of one weight, or its aligned runs, that may be chosen.

    Attributes:
        size: how many there are in all.
        only: positions that may be chosen, int64, strictly increasing; None: all but ``never``.
        never: positions that may not, likewise.
    """

    size: int
    only: Indices | None
    never: Indices

    @property
    def count(self) -> int:
        """How many may be chosen."""
        return self.size - len(self.never) if self.only is None else len(self.only)

    def bar(self, start: int, ranks: Array) -> None:
        """Set the ranks of what may not be chosen to 0; ``ranks`` begin at position ``start``."""
        chosen = self.never if self.only is None else self.only
        low, high = np.searchsorted(chosen, (start, start + ranks.size))
        places = chosen[low:high] - start
        if self.only is None:
            ranks[places] = 0
        else:
            kept = ranks[places]
            ranks[:] = 0
            ranks[places] = kept

    def least_of_rows(self, rows: int, columns: int, *, inputs_first: bool) -> int:
        """The fewest that may be chosen of one output, of matrices of ``rows`` x ``columns``."""
        chosen = self.never if self.only is None else self.only
        matrix, row, column = chosen // (rows * columns), chosen // columns % rows, chosen % columns
        outputs, width = (columns, rows) if inputs_first else (rows, columns)
        number = matrix * outputs + (column if inputs_first else row)
        counts = np.bincount(number, minlength=self.size // max(width, 1))
        return int((width - counts if self.only is None else counts).min(initial=width))


class Limits:
    """Masks within which, and without which, entries are chosen."""

    def __init__(
        self, within: Sequence[MaskSource], without: Sequence[MaskSource], names: Collection[str]
    ) -> None:
        """Read the masks.

        Args:
            within: an entry must be in all of them.
            without: an entry must be in none of them.
            names: of the base, in which names of the masks may lack a prefix, or have one.

        Raises:
            SourceError: a mask has a tensor that the base has not.
            OSError: a file cannot be read.
        """
        self._within = [_Named(mask, names) for mask in within]
        self._without = [_Named(mask, names) for mask in without]

    def takes(self, weight: Weight) -> bool:
        """Whether a weight has entries within the masks; others are left out."""
        return all((found := mask.entries(weight)) is not None and len(found) for mask in self._within)

    def of(self, weight: Weight, length: int) -> Allowed:
        """What may be chosen of a weight, in entries or in runs of ``length``."""
        without = [found for mask in self._without if (found := mask.entries(weight)) is not None]
        never = reduce(np.union1d, without, np.empty(0, np.int64))
        size = -(-weight.size // length)
        if not self._within:
            return Allowed(size, None, np.unique(never // length))
        within = [found for mask in self._within if (found := mask.entries(weight)) is not None]
        only = np.setdiff1d(reduce(np.intersect1d, within), never, assume_unique=True)
        runs, counts = np.unique(only // length, return_counts=True)
        whole = np.minimum(length, weight.size - runs * length)  # the last run may be shorter
        return Allowed(size, runs[counts == whole], np.empty(0, np.int64))

    @property
    def notes(self) -> dict[str, Any]:
        """For the manifest's ``selection``."""
        masks = {"within": self._within, "without": self._without}
        return {key: [mask.label for mask in found] for key, found in masks.items() if found}


class _Named:
    """A mask under the base's names."""

    def __init__(self, mask: MaskSource, names: Collection[str]) -> None:
        path = os.fspath(mask) if isinstance(mask, str | os.PathLike) else None
        self.label = "a mask" if path is None else Path(path).name
        found = load(mask) if isinstance(mask, str | os.PathLike) else mask
        rename = match_names(list(found), names, path or self.label)
        self._tensors = found
        self._where, self._names = path or self.label, {rename(name): name for name in found}

    def entries(self, weight: Weight) -> Indices | None:
        """The mask's entries of a weight; None if it has no such tensor."""
        name = self._names.get(weight.name)
        if name is None:
            return None
        tensor = self._tensors[name]
        if tensor.shape != weight.shape:
            raise SourceError(
                f"{self._where}: tensor {name!r}: has the shape {list(tensor.shape)}, and the weight {list(weight.shape)}"
            )
        return tensor.indices
