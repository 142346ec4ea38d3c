"""Numpy arrays: from torch tensors (torch is never imported here), as bytes, digests, and buffers that are reused."""

from __future__ import annotations

import hashlib
import io
import sys
import threading
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shira_format._core.files import open_regular

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]  # flat positions in a weight

# torch dtypes that numpy lacks, with an integer dtype of the same size through which the bits are converted.
_VIA_BITS: dict[str, tuple[str, Any]] = {
    "torch.bfloat16": ("int16", ml_dtypes.bfloat16),
    "torch.float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
}


def as_array(tensor: Any) -> Array:
    """``tensor``, numpy or torch, as a numpy array that shares its memory where possible.

    A torch tensor elsewhere is copied to the CPU. bfloat16 and float8 become ``ml_dtypes`` arrays, bit for bit.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if (as_bytes := _VIA_BITS.get(str(tensor.dtype))) is None:
        return np.asarray(tensor.numpy())
    carrier, dtype = as_bytes
    return np.asarray(tensor.view(getattr(torch, carrier)).numpy().view(dtype))


def as_bytes(array: Array) -> Array:
    """The bytes of ``array`` as flat uint8, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def bits_differ(a: Array, b: Array) -> Array:
    """Where the bits of two arrays of one dtype differ."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return np.asarray(a.view(unsigned) != b.view(unsigned))


def array_digest(array: Array) -> str:
    """SHA-256 of the array's bytes in row-major order, as 64 hex digits (spec, section 6)."""
    return hashlib.sha256(as_bytes(array).data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
        ValueError: the name holds a NUL.
    """
    with io.BufferedReader(open_regular(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_only(array: Array) -> Array:
    """A read-only view of ``array``."""
    view = array.view()
    view.flags.writeable = False
    return view


# Arrays whose memory is theirs, and that :func:`frozen` has made read-only, by their identity.
_FROZEN: WeakValueDictionary[int, Array] = WeakValueDictionary()


def frozen(array: Array) -> Array:
    """An array that was just made, and that nobody else writes to, read-only from now on with all that it is a view of."""
    part: Any = array
    while isinstance(part, np.ndarray):
        part.flags.writeable = False
        if part.base is None:
            _FROZEN[id(part)] = part
        part = part.base
    return array


def owned(array: Array) -> Array:
    """``array`` if nothing can change its memory any more, else a copy.

    A read-only array is not enough: its owner may make it writable again, the array that a view shows may still be written to,
    and a mapped file overwritten or cut.
    """
    part: Any = array
    while isinstance(part, np.ndarray) and part.base is not None and not part.flags.writeable:
        part = part.base
        if isinstance(part, memoryview):
            part = part.obj
    if isinstance(part, np.ndarray):
        is_ours = part.base is None and not part.flags.writeable and _FROZEN.get(id(part)) is part
    else:
        is_ours = isinstance(part, bytes)
    return array if is_ours else frozen(array.copy())


def distinct(values: Array) -> Array:
    """The distinct values, sorted: ``np.unique``, which for integers is a hundred times slower where most are different."""
    ordered = np.sort(values, axis=None, kind="stable")  # merges sorted lists that follow one another
    return np.asarray(ordered[_is_new(ordered)])


def distinct_counts(values: Array) -> tuple[Array, Indices]:
    """The distinct values, sorted, and how often each occurs: ``[n]`` and int64 ``[n]``."""
    ordered = np.sort(values, axis=None, kind="stable")
    ends = np.flatnonzero(_is_new(ordered))
    found = ordered[ends]
    counts = np.empty(ends.size, np.int64)  # quicker than np.diff, which a hundred thousand small tensors show
    if ends.size:
        np.subtract(ends[1:], ends[:-1], out=counts[:-1])
        counts[-1] = ordered.size - ends[-1]
    return found, counts


def _is_new(ordered: Array) -> npt.NDArray[np.bool_]:
    is_new = np.ones(ordered.size, bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    return is_new


def where_true(mask: npt.NDArray[np.bool_], count: int | None = None) -> npt.NDArray[np.int64]:
    """``np.flatnonzero`` of a flat mask, faster if the mask is sparse; ``count`` is the number of true elements, if known."""
    if (np.count_nonzero(mask) if count is None else count) * 8 > mask.size:
        return np.flatnonzero(mask)
    whole = mask.size & ~7
    words = mask[:whole].view(np.uint64)
    some = np.flatnonzero(words != 0)  # several times as fast on booleans
    inner = np.flatnonzero(words[some].view(np.bool_))
    found = (some << 3)[inner >> 3] + (inner & 7)
    return found if whole == mask.size else np.concatenate([found, np.flatnonzero(mask[whole:]) + whole])


def sum_of_squares(values: Array) -> float:
    """The sum of squares, in the values' dtype; in float64 if it leaves that dtype's normal range."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        energy = float(np.dot(values, values))
    if not 1e-30 < energy < 1e30:  # squares may have underflowed or overflowed, or there is a NaN, which stays
        wide = values.astype(np.float64)
        energy = float(np.dot(wide, wide))
    return energy


_held = threading.local()


def scratch(use: str, size: int, dtype: np.dtype[Any]) -> Array:
    """A buffer ``[size]`` for this thread and use, which the next call returns again: allocation costs more than arithmetic."""
    held: Array | None = getattr(_held, use, None)
    nbytes = size * dtype.itemsize
    if held is None or held.size < nbytes:
        held = np.empty(nbytes, np.uint8)
        setattr(_held, use, held)
    return held[:nbytes].view(dtype)
