"""One change after the other, tile by tile on the threads of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from shira_format._core.arrays import scratch, sum_of_squares
from shira_format._core.threads import Progress, Workers
from shira_format.entries.changes import Change, Tile, tile_size

_R = TypeVar("_R")


def tiles(
    workers: Workers,
    change: Change,
    work: Callable[[int, Tile, float], _R],
    progress: Progress = lambda _: None,
) -> Iterator[_R]:
    """``work(start, tile, energy)`` for each tile: its first flat index, the tile, and its sum of squares."""

    def one(start: int, stop: int) -> _R:
        with np.errstate(over="ignore", invalid="ignore"):  # the energy shows it, and the error names the tensor
            tile = change.tile(start, stop, scratch("values", stop - start, change.dtype))
            energy = sum_of_squares(tile.values)
            if tile.moved is not None and not np.isfinite(energy):
                tile.values[~tile.moved()] = 0
                energy = sum_of_squares(tile.values)
        return work(start, tile, energy)

    return workers.ranges(change.size, tile_size(change), one, progress)
