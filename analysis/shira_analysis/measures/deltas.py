"""What adapters add to their base, as numbers and as matrices in float64: the ground of all measures.

A *delta* here is target - base, computed in float64 and rounded there at most once (for 16-bit and 8-bit weights of like
magnitude it is exact), not the float32 difference that :meth:`SparseTensor.delta` scales by a strength. Deltas that a file
holds as such are widened exactly. The *matrix* of a tensor is its matrix view (spec, section 1): ``[shape[0], product of the
other dimensions]``. A patch's further rows, and those that it drops, are no entries and in no matrix.

Memory stays at the entries of one tensor of each adapter; a base is read at the entries alone where its layout can do so.
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
    from shira_format.checkpoints import Checkpoint  # with all layouts, which self-contained files do not need

Float64s = npt.NDArray[np.float64]


def delta_values(tensor: SparseTensor, base: Any = None) -> Float64s:
    """What the adapter adds to each entry: float64 ``[nnz]``, in the order of ``tensor.indices``.

    Args:
        tensor: targets or deltas.
        base: the whole weight, ``[*shape]``, checked by digest; by default the base's values that ``tensor`` holds.

    Raises:
        SourceError: a mask, which has no deltas, or a delta that is NaN or infinite.
        BaseRequired: targets, and no base values.
        BaseMismatch: ``base`` is not the base of this tensor.
    """
    if tensor.value_kind == "none":
        raise SourceError(f"tensor {tensor.name!r} is a mask: it has no deltas")
    found = tensor.base if base is None else tensor.checked_base(base)
    with np.errstate(over="ignore", invalid="ignore"):  # told below
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
        zeros: keep entries whose delta is 0 as explicit zeros; by default only entries that change something are stored.

    Raises:
        SourceError: a mask, a delta that is not finite, or far more rows than entries.
        BaseRequired: targets, and no base values.
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
        SourceError: or far more rows than entries.
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
    """A ``csr_array`` without its empty rows and columns, in the order of the others and of its data, which it shares.

    Memory stays at the entries and the rows, however many columns there are.
    """
    counts = np.diff(matrix.indptr)
    rows = np.flatnonzero(counts)
    columns, places = np.unique(matrix.indices, return_inverse=True)
    pointers = np.concatenate([[0], np.cumsum(counts[rows])])
    from scipy.sparse import csr_array

    return csr_array((matrix.data, places, pointers), shape=(rows.size, columns.size))


@dataclass(frozen=True)
class DeltaFile:
    """An open adapter file, and the base where one was given.

    Attributes:
        file: the adapter.
        base: its base, or None: then the file must be self-contained for deltas of target values.
        names: the names of its chosen sparse tensors, in the order of the file.
        whole: the names of its chosen whole tensors, which have no deltas.
    """

    file: AdapterFile
    base: Checkpoint | None
    names: tuple[str, ...]
    whole: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the adapter is."""
        return self.file.path

    def tensor(self, name: str) -> SparseTensor:
        """One tensor, with the base's values at its entries if its deltas need them; a mask as it is.

        Raises:
            FormatError: the tensor is damaged.
            BaseRequired: targets, and neither the file nor :attr:`base` has the base's values; names file and tensor.
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
        """The deltas of one tensor as a ``csr_array``; see :func:`delta_matrix`, and :meth:`tensor` for what it raises."""
        tensor = self.tensor(name)
        try:
            return delta_matrix(tensor, zeros=zeros)
        except SourceError as error:
            raise SourceError(f"{self.path}: {error}") from None

    def tensors(self) -> Iterator[SparseTensor]:
        """All chosen tensors, one by one; see :meth:`tensor`."""
        for name in self.names:
            yield self.tensor(name)


def open_deltas(
    adapter: str | os.PathLike[str] | DeltaFile,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> DeltaFile:
    """Open an adapter file for measures; reads the header alone.

    Args:
        adapter: its path; one that is open already is returned as it is.
        base: the checkpoint that it was made for, which is checked by digests: a path or an open one. Needed for target
            values unless the file is self-contained.
        include: regexes; a tensor is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.

    Raises:
        FormatError: not an adapter, or a damaged one.
        SourceError: no tensor is left by ``include`` and ``exclude``.
        OSError: it cannot be read.
    """
    if isinstance(adapter, DeltaFile):
        return adapter
    if base is not None:
        from shira_format.checkpoints import open_checkpoint

        base = open_checkpoint(base)
    chosen = name_filter(include, exclude)
    file = AdapterFile(adapter, separate_maps=True)
    names = tuple(name for name in file.manifest.tensors if chosen(name))
    whole = tuple(name for name in file.manifest.whole if chosen(name))
    if not (names or whole) and (include or exclude):
        raise SourceError(f"{file.path}: no tensor is left by the choice of names")
    return DeltaFile(file, base, names, whole)


def side_by_side(files: Sequence[DeltaFile]) -> Iterator[tuple[str, list[SparseTensor | None]]]:
    """Tensors of several adapters by name: for each, the tensor of every file, None where a file has none of that name.

    Names come in the order of the first file that has them; a name's tensors are read when it is reached.

    Raises:
        SourceError: two files adapt weights of different shapes under one name, so that they are no adapters of one base.
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
