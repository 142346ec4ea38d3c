"""One matrix: flat entries to a CSR matrix in an ``.npz`` file of scipy's, and back with every size checked."""

from __future__ import annotations

import io
import os
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.files import open_regular
from shira_format.errors import SourceError
from shira_format.storage.atomic import atomic_file
from shira_format.storage.npz import Header, check_unpacked, header_of
from shira_format.storage.paths import one_line
from shira_format.tensors import matrix_shape

# A CSR matrix has an array as long as its rows, however few its entries are. So many it may have in any case.
MAX_ROWS = 1 << 24
_ROWS_PER_ENTRY = 8
# The members that load_npz reads, with the kinds of dtype that each may have; others are ignored.
_MEMBERS = {"format": "SU", "shape": "iu", "data": "f", "indices": "i", "indptr": "i"}
_OPTIONAL = {"_is_array": "b"}
_WANTED = {
    "data": "; it must be float16, float32 or float64",
    "indices": ", not integers",
    "indptr": ", not integers",
}


def check_rows(rows: int, nnz: int) -> None:
    """Raise SourceError if a CSR matrix would be large, and mostly row pointers."""
    if rows > max(MAX_ROWS, _ROWS_PER_ENTRY * nnz):
        raise SourceError(
            f"{rows} rows for {nnz} entries: a CSR matrix takes up to 8 bytes a row, empty ones too; the limit is "
            f"{MAX_ROWS} rows, or {_ROWS_PER_ENTRY} for each entry"
        )


def write_matrix(path: Path, shape: tuple[int, ...], indices: Indices, data: Array) -> None:
    """Write entries as a CSR matrix.

    Args:
        path: the ``.npz`` file.
        shape: the tensor's shape, any rank.
        indices: int64 ``[nnz]``, flat, strictly increasing.
        data: ``[nnz]`` float32 or float64.
    """
    from scipy import sparse

    rows, columns = matrix_shape(shape)
    pointers = np.searchsorted(indices, np.arange(rows + 1, dtype=np.int64) * columns)
    # scipy takes int32 for indices and pointers where that is enough.
    matrix = sparse.csr_matrix((data, indices % max(1, columns), pointers), shape=(rows, columns))
    with atomic_file(path) as file:
        # Floats hardly compress, and reading is several times faster without.
        sparse.save_npz(file, matrix, compressed=False)


def read_matrix(path: Path, shape: tuple[int, ...]) -> tuple[Indices, Array]:
    """The entries of a CSR matrix that scipy wrote.

    Args:
        path: the ``.npz`` file.
        shape: the tensor's shape, whose matrix view the matrix must have.

    Returns:
        Flat indices, int64 ``[nnz]``, strictly increasing, and the data, ``[nnz]`` float32 or float64. Entries that were in
        another order within their row are sorted.

    Raises:
        SourceError: not such a file, not CSR, another shape, data that are not floats, indices out of range, or an
            entry that occurs twice.
        OSError: it cannot be read.
    """
    from scipy import sparse

    try:
        with io.BufferedReader(open_regular(path)) as file:
            nnz = _check_members(file, matrix_shape(shape))
            matrix = sparse.load_npz(file)
        return _entries(matrix, nnz)
    except (MemoryError, OSError) as error:
        # zipfile and numpy raise OSErrors of their own, without a number, about what is in the file.
        if isinstance(error, OSError) and error.errno is None:
            raise SourceError(f"{path}: {one_line(error)}") from None
        raise
    except Exception as error:  # of zipfile, zlib, numpy and scipy: strangers' files find them all
        raise SourceError(f"{path}: {one_line(error)}") from None


def _check_members(file: IO[bytes], view: tuple[int, int]) -> int:
    """Compare the sizes that the file announces with what is there, before anything of these sizes is allocated.

    Returns how many entries it has.
    """
    arrays: dict[str, Header] = {}
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            kinds = (_MEMBERS | _OPTIONAL).get(name)
            if kinds is None:
                continue
            if name in arrays or name == info.filename:
                raise SourceError(f"the member {name!r} occurs twice, or is no .npy array")
            arrays[name] = found = header_of(archive, info, size)
            if found[1].kind not in kinds or found[1].itemsize > (64 if name == "format" else 8):
                raise SourceError(f"{name!r} is of dtype {found[1]}{_WANTED.get(name, '')}")
    check_unpacked(size, arrays.values())
    if lacks := [name for name in _MEMBERS if name not in arrays]:
        raise SourceError(f"not a CSR matrix of scipy.sparse.save_npz: it has no {lacks[0]!r}")
    if prod(arrays["format"][0]) != 1 or prod(arrays.get("_is_array", ((), None))[0]) != 1:
        raise SourceError("'format' is not one word")
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        word = loaded["format"].item()
        layout = word if isinstance(word, str) else word.decode("ascii")
        if layout != "csr":
            raise SourceError(f"a matrix in the format {layout!r}: save its .tocsr()")
        if arrays["shape"][0] != (2,):
            raise SourceError("not a matrix: its shape has not two dimensions")
        shape = tuple(int(n) for n in loaded["shape"])
    file.seek(0)
    if shape != view:
        raise SourceError(f"a matrix of shape {list(shape)}, expected {list(view)}")
    entries = arrays["data"][0]
    if len(entries) != 1 or arrays["indices"][0] != entries or arrays["indptr"][0] != (view[0] + 1,):
        raise SourceError("'data', 'indices' and 'indptr' do not fit each other, or the shape")
    if entries[0] > prod(view):
        raise SourceError(f"{entries[0]} entries, more than the matrix has elements")
    check_rows(view[0], entries[0])
    return entries[0]


def _entries(matrix: Any, nnz: int) -> tuple[Indices, Array]:
    rows, columns = (int(n) for n in matrix.shape)
    counts = np.diff(matrix.indptr.astype(np.int64))
    if (counts < 0).any() or matrix.indptr[0] != 0 or matrix.indptr[-1] != nnz:
        raise SourceError(f"'indptr' does not go from 0 to {nnz}, the number of entries, without going back")
    found = np.asarray(matrix.indices, np.int64)
    bad = np.flatnonzero((found < 0) | (found >= columns))
    if bad.size:
        raise SourceError(f"column {found[bad[0]]} is out of range: there are {columns}")
    flat = np.repeat(np.arange(rows, dtype=np.int64) * columns, counts)
    flat += found
    data = np.asarray(matrix.data).astype(
        np.float64 if matrix.data.dtype.itemsize == 8 else np.float32, copy=False
    )
    steps = np.diff(flat)
    if (steps <= 0).any():
        order = np.argsort(flat, kind="stable")
        flat, data = flat[order], data[order]
        steps = np.diff(flat)
        if not steps.all():
            row, column = divmod(int(flat[np.flatnonzero(steps == 0)[0]]), columns)
            raise SourceError(f"the entry at row {row}, column {column} occurs twice")
    return flat, data
