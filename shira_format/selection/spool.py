"""Entries on disk between two passes, so that memory does not grow with the selection."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from shira_format._core.files import naming
from shira_format.entries.changes import COLUMNS, Entries


@dataclass(frozen=True)
class SpoolRange:
    """Where entries are in a spool, and their dtypes."""

    at: int
    count: int
    dtypes: tuple[np.dtype[Any], ...]
    energy: float


class Spool:
    """An unnamed temporary file of entries, which disappears however the process ends."""

    def __init__(self, folder: Path | None = None) -> None:
        """Args: ``folder`` for the file; the system's by default."""
        self._folder = folder or tempfile.gettempdir()
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed on exit
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self._folder):  # what is in the buffer of a full disk fails again
            self._file.close()

    def put(self, entries: Entries) -> SpoolRange:
        """Append entries."""
        columns = [np.ascontiguousarray(getattr(entries, column)) for column in COLUMNS]
        place = SpoolRange(self._end, entries.size, tuple(column.dtype for column in columns), entries.energy)
        with naming(self._folder):
            self._file.seek(self._end)
            for column in columns:
                self._file.write(column.view(np.uint8).data)
                self._end += column.nbytes
        return place

    def get(self, place: SpoolRange) -> Entries:
        """Read entries."""
        self._file.seek(place.at)
        indices, values, base, target = (
            np.frombuffer(self._file.read(place.count * dtype.itemsize), dtype) for dtype in place.dtypes
        )
        return Entries(indices, values, base, target, place.energy)
