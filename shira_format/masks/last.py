"""What is computed for one weight, until the next is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from shira_format.masks.weights import Weight

_T = TypeVar("_T")


class LastOne(Generic[_T]):
    """A value for the weight that was asked for last: all tiles of one weight are read before those of the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[Weight, _T] | None = None

    def get(self, weight: Weight, make: Callable[[], _T]) -> _T:
        """The value for ``weight``, made if another one's was asked for last; one thread makes it, others wait."""
        with self._lock:
            if self._kept is None or self._kept[0] is not weight:
                self._kept = None  # before the next one takes its memory
                self._kept = weight, make()
            return self._kept[1]
