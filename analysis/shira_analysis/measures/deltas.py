"""The deltas of adapters, as float64 values and sparse matrices: the input of all measures.

A *delta* here is target - base, computed in float64 with at most one rounding (exact for 16-bit and 8-bit weights of similar
magnitude), not the float32 difference that :meth:`SparseTensor.delta` scales by a strength. Stored deltas are widened exactly.
The *matrix* of a tensor is its matrix view (spec, section 1): ``[shape[0], product of the other dimensions]``. Rows that a
patch appends or drops are not entries and not in the matrix.

Only the entries of one tensor per adapter are in memory; the base is read only at the entries where its layout allows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shira_format._core.arrays import Array
from shira_format.checkpoints.quantised import refuse_quantised
from shira_format.convert.csr.matrix import check_rows
from shira_format.entries.base_check import with_base
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.format import AdapterFile
from shira_format.names.filters import name_filter
from shira_format.tensors import SparseTensor, matrix_shape

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint  # imports every layout, which self-contained files do not need

Float64s = npt.NDArray[np.float64]


def delta_values(tensor: SparseTensor, base: Any = None) -> Float64s:
    """The delta of each entry: float64 ``[nnz]``, in the order of ``tensor.indices``.

    Args:
        tensor: targets or deltas.
        base: the full weight, ``[*shape]``, checked by digest; by default the base values in ``tensor``.

    Raises:
        SourceError: a mask, which has no deltas, or a delta that is NaN or infinite.
        BaseRequired: targets without base values.
        BaseMismatch: ``base`` is not the base of this tensor.
    """
    if tensor.value_kind == "none":
        raise SourceError(f"tensor {tensor.name!r} is a mask: it has no deltas")
    found = tensor.base if base is None else tensor.checked_base(base)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        values: Float64s = tensor.values.astype(np.float64)
        if tensor.value_kind == "target":
            if found is None:
                raise BaseRequired(
                    f"tensor {tensor.name!r} holds target values without those of the base: pass the base (--base), "
                    "or convert with --self-contained"
                )
            values = values - found.astype(np.float64)
    if not (finite := np.isfinite(values)).all():
        index = int(tensor.indices[np.flatnonzero(~finite)[0]])
        raise SourceError(f"tensor {tensor.name!r}: the delta at flat index {index} is NaN or infinite")
    return values


def delta_matrix(tensor: SparseTensor, base: Any = None, *, zeros: bool = False) -> Any:
    """The deltas as a ``scipy.sparse.csr_array`` in float64, in the matrix view of the tensor; columns sorted in each row.

    Args:
        tensor: targets or deltas.
        base: see :func:`delta_values`.
        zeros: keep entries whose delta is 0 as explicit zeros; by default they are dropped.

    Raises:
        SourceError: a mask, a delta that is not finite, or far more rows than entries.
        BaseRequired: targets without base values.
        BaseMismatch: ``base`` is not the base of this tensor.
    """
    values, indices = delta_values(tensor, base), tensor.indices
    if not zeros and not values.all():
        kept = np.flatnonzero(values)
        values, indices = values[kept], indices[kept]
    return entries_matrix(tensor.name, tensor.shape, indices, values)


def entries_matrix(name: str, shape: tuple[int, ...], indices: Array, values: Array) -> Any:
    """Flat, strictly increasing ``indices`` (int64 ``[nnz]``) and their ``values`` as a ``csr_array`` of the matrix view.

    Raises:
        SourceError: far more rows than entries.
    """
    from scipy import sparse

    rows, columns = matrix_shape(shape)
    try:
        check_rows(rows, indices.size)
    except SourceError as error:
        raise SourceError(f"tensor {name!r}: {error}") from None
    pointers = np.searchsorted(indices, np.arange(rows + 1, dtype=np.int64) * columns)
    return sparse.csr_array((values, indices % max(1, columns), pointers), shape=(rows, columns))


def without_empty(matrix: Any) -> Any:
    """A ``csr_array`` without its empty rows and columns; order is kept and the data array is shared.

    Memory is proportional to entries and rows, however many columns there are.
    """
    counts = np.diff(matrix.indptr)
    rows = np.flatnonzero(counts)
    columns, places = np.unique(matrix.indices, return_inverse=True)
    pointers = np.concatenate([[0], np.cumsum(counts[rows])])
    from scipy.sparse import csr_array

    return csr_array((matrix.data, places, pointers), shape=(rows.size, columns.size))


@dataclass(frozen=True)
class DeltaFile:
    """An open adapter file with its base, if given.

    Attributes:
        file: the adapter.
        base: its base; if None, a file with target values must be self-contained.
        names: names of the selected sparse tensors, in file order.
        whole: names of the selected whole tensors, which have no deltas.
    """

    file: AdapterFile
    base: Checkpoint | None
    names: tuple[str, ...]
    whole: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The adapter's path."""
        return self.file.path

    def tensor(self, name: str) -> SparseTensor:
        """One tensor, with base values at its entries if its deltas need them; a mask is returned unchanged.

        Raises:
            FormatError: the tensor is damaged.
            BaseRequired: targets without base values in the file or :attr:`base`; names file and tensor.
            BaseMismatch: :attr:`base` is not the base of this tensor; names file and tensor.
            SourceError: the weight is quantised in :attr:`base`: codes have no meaning without their scales.
        """
        tensor = self.file.sparse(name)
        if self.base is not None:
            refuse_quantised(self.base, [tensor.base_name])
            try:
                return with_base(tensor, self.base)
            except BaseMismatch as error:
                raise BaseMismatch(f"{self.path}: {error}") from None
        if tensor.value_kind == "target" and tensor.base is None:
            raise BaseRequired(
                f"{self.path}: tensor {name!r} holds target values without those of the base: pass --base, or convert "
                "with --self-contained"
            )
        return tensor

    def matrix(self, name: str, *, zeros: bool = False) -> Any:
        """The deltas of one tensor as a ``csr_array``; see :func:`delta_matrix`, and :meth:`tensor` for errors."""
        tensor = self.tensor(name)
        try:
            return delta_matrix(tensor, zeros=zeros)
        except SourceError as error:
            raise SourceError(f"{self.path}: {error}") from None

    def tensors(self) -> Iterator[SparseTensor]:
        """All selected tensors, one at a time; see :meth:`tensor`."""
        for name in self.names:
            yield self.tensor(name)


def open_deltas(
    adapter: str | os.PathLike[str] | DeltaFile,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> DeltaFile:
    """Open an adapter file for measuring; reads only the header.

    Args:
        adapter: its path; an open file is returned unchanged.
        base: the checkpoint it was made for, as a path or open, checked by digests; required for target values unless the
            file is self-contained.
        include: regexes; only tensors whose name contains a match are selected.
        exclude: regexes; tensors whose name contains a match are skipped.

    Raises:
        FormatError: not an adapter, or a damaged one.
        SourceError: ``include`` and ``exclude`` leave no tensor.
        OSError: the file cannot be read.
    """
    if isinstance(adapter, DeltaFile):
        return adapter
    if base is not None:
        from shira_format.checkpoints import open_checkpoint

        base = open_checkpoint(base)
    chosen = name_filter(include, exclude)
    file = AdapterFile(adapter, base=base)
    names = tuple(name for name in file.manifest.tensors if chosen(name))
    whole = tuple(name for name in file.manifest.whole if chosen(name))
    if not (names or whole) and (include or exclude):
        raise SourceError(f"{file.path}: no tensor is left by the choice of names")
    return DeltaFile(file, base, names, whole)


def side_by_side(files: Sequence[DeltaFile]) -> Iterator[tuple[str, list[SparseTensor | None]]]:
    """Iterate over several adapters by tensor name, yielding each file's tensor, or None if the file lacks that name.

    Names come in the order of the first file that has them; tensors are read lazily.

    Raises:
        SourceError: two files have different shapes for one name, so they are not adapters of one base.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    names = dict.fromkeys(name for file in files for name in file.names)
    for name in names:
        shapes = {file.file.manifest.tensors[name].shape: file for file in files if name in file.names}
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise SourceError(
                f"{second.path}: tensor {name!r} has the shape {list(other)}, but {list(one)} in {first.path}: "
                "these are not adapters of one base"
            )
        yield name, [file.tensor(name) if name in file.names else None for file in files]
