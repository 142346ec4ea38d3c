"""Arrays in memory of their own, between pages without access: a read or a write outside of one ends the process.

Where the system has no ``mprotect`` (Windows), only writes are seen, by canaries in these pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np

from shira_format._core.arrays import Array

_CANARY = 0xA5
_PROTECT: Any = ctypes.CDLL(None).mprotect if os.name == "posix" else None
_NO_ACCESS = 0  # PROT_NONE


class Guards:
    """Makes arrays, and knows what lies beside them."""

    def __init__(self) -> None:
        self._canaries: list[Array] = []

    def array(self, shape: int | tuple[int, ...], dtype: Any, *, at_end: bool) -> Array:
        """A new array of anything, ``[*shape]``, whose last byte is before a page without access.

        Args:
            shape: its shape.
            dtype: its dtype.
            at_end: False: its first byte is after such a page instead.
        """
        shape = (shape,) if isinstance(shape, int | np.integer) else shape
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        page = mmap.PAGESIZE
        inside = -(-size // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        every = np.frombuffer(memory, np.uint8)
        start = page + (inside - size if at_end else 0)
        sides = [every[page:start], every[start + size : page + inside]]
        if _PROTECT is None:
            sides = [every[:start], every[start + size :]]
        else:
            for first in (every.ctypes.data, every.ctypes.data + page + inside):
                if _PROTECT(ctypes.c_void_p(first), ctypes.c_size_t(page), _NO_ACCESS):
                    raise OSError("mprotect fails")
        for side in sides:
            side[:] = _CANARY
        self._canaries += sides
        return np.ndarray(shape, dtype, memory, start)

    def copy(self, array: Array, *, at_end: bool) -> Array:
        """The same for a copy of an array."""
        found = self.array(array.shape, array.dtype, at_end=at_end)
        found[...] = array
        return found

    def are_whole(self) -> bool:
        """Whether nothing was written beside an array."""
        return all((side == _CANARY).all() for side in self._canaries)
