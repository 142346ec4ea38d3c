"""What every checkpoint layout looks like to the rest of the package."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shira_format.arrays import Array


class Checkpoint(Mapping[str, Array]):
    """A lazy mapping from tensor name to a read-only array, which lives in memory only as long as it is held.

    Attributes:
        path: what was opened.
        files: the files that hold the tensors.
    """

    path: Path
    files: list[Path]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor, without reading it."""
