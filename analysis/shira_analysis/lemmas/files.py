"""The deltas of adapter files, one weight at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shira_analysis.measures.deltas import delta_values
from shira_format.checkpoints import Checkpoint
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.format import AdapterFile
from shira_format.tensors import matrix_shape

# The laws are tested on a few vectors as long as a side of the weight: about a gigabyte. No layer of a real model is larger.
LONGEST = 1 << 20


@dataclass(frozen=True)
class FileDelta:
    """What an adapter adds to one weight, in its matrix view (axis 0 by all other axes).

    Attributes:
        source: the adapter's file name.
        name: the weight's name.
        shape: rows and columns.
        indices: int64 ``[nnz]``, flat row-major, strictly increasing.
        values: float64 ``[nnz]``; None for a mask.
    """

    source: str
    name: str
    shape: tuple[int, int]
    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64] | None

    @property
    def where(self) -> str:
        """Its name in a report."""
        return f"{self.source}: {self.name}"

    @property
    def row(self) -> npt.NDArray[np.int64]:
        """The row of each entry."""
        return np.asarray(self.indices // self.shape[1])

    @property
    def column(self) -> npt.NDArray[np.int64]:
        """The column of each entry."""
        return np.asarray(self.indices % self.shape[1])

    def matrix(self) -> Any:
        """The delta as a float64 CSR matrix; all ones for a mask."""
        values = np.ones(self.indices.size) if self.values is None else self.values
        from scipy.sparse import csr_matrix

        return csr_matrix((values, (self.row, self.column)), shape=self.shape)


@dataclass
class FileDeltas:
    """One adapter file. Tensors are read on demand and not cached.

    Attributes:
        file: the open file.
        base: its base checkpoint, or None.
        names: shapes of the weights that are matrices and have entries, by name.
        notes: what is skipped, and why.
    """

    file: AdapterFile
    base: Checkpoint | None
    names: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | os.PathLike[str], base: Checkpoint | None) -> FileDeltas:
        """Open an adapter file.

        Raises:
            FormatError: the file is not an adapter, or is damaged.
            BaseRequired: the adapter has targets without base values, and ``base`` is None.
        """
        found = cls(AdapterFile(path, base=base), base)
        vectors, large = 0, []
        for name, entry in found.file.manifest.tensors.items():
            if len(entry.shape) < 2:
                vectors += 1
            elif max(matrix_shape(entry.shape)) > LONGEST:
                large.append(name)
            elif entry.nnz:
                if base is None and entry.values == "target" and not entry.base_values:
                    raise BaseRequired(
                        f"{path}: tensor {name!r} holds target values without base values: pass the base (--base)"
                    )
                found.names[name] = matrix_shape(entry.shape)
        if vectors:
            found.notes.append(
                f"{path}: {vectors} of its tensors {'is not a matrix' if vectors == 1 else 'are not matrices'}"
            )
        if large:
            found.notes.append(
                f"{path}: {len(large)} of its tensors {'has' if len(large) == 1 else 'have'} a side above {LONGEST}: {large[0]!r}{', ...' if large[1:] else ''}"
            )
        if not found.names:
            found.notes.append(f"{path}: no matrix in it has entries and can be checked: it is skipped")
        return found

    def spread(self, most: int) -> list[str]:
        """At most ``most`` of the names, evenly spread."""
        return spread(list(self.names), most)

    def update(self, name: str) -> FileDelta:
        """Read one delta, at the strength of training.

        Raises:
            SourceError: the delta is not finite.
            BaseMismatch: the base is not the one that the adapter was made for.
            FormatError: the file is damaged.
        """
        tensor, path = self.file.sparse(name), self.file.path
        values = None
        if tensor.value_kind != "none":
            if self.base is not None and tensor.base_name not in self.base:
                raise BaseMismatch(
                    f"{path}: tensor {name!r}: the base {self.base.path} has no {tensor.base_name!r}"
                )
            try:
                values = delta_values(tensor, None if self.base is None else self.base[tensor.base_name])
            except (BaseMismatch, SourceError) as error:
                raise type(error)(f"{path}: {error}") from None
        return FileDelta(path.name, name, self.names[name], tensor.indices, values)


def spread(names: list[str], most: int) -> list[str]:
    """At most ``most`` of the names, evenly spread."""
    if len(names) <= most:
        return names
    # From the first to the last: a fixed step could hit layers of one kind only.
    return [names[i * (len(names) - 1) // max(1, most - 1)] for i in range(most)]
