"""The best entries of each row, exactly so many, of equal ones the first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.threads import Progress
from shira_format.entries.changes import TILE
from shira_format.errors import SourceError
from shira_format.masks.scores import Ranking


def best_of_rows(ranking: Ranking, count: int, progress: Progress = lambda _: None) -> Indices:
    """The flat positions of the ``count`` best entries of each row; runs are counted as entries of the ranking.

    A row of the matrix is an output; where the inputs come first, as in transformers' ``Conv1D``, a column is. Memory is
    proportional to a tile and the result.

    Args:
        ranking: of single entries, or of runs of which each row has a whole number.
        count: for each row.
        progress: called with numbers of elements.

    Returns:
        int64, strictly increasing; positions of entries or runs, as :meth:`Ranking.entries` takes them.

    Raises:
        SourceError: runs that cross from one row to the next, or it is not known which side is the output.
    """
    weight = ranking.scores.weight
    if weight.inputs_first is None:
        raise SourceError(
            f"tensor {weight.name!r}: is square, and the checkpoint has layers that store [in, out] and layers that store [out, in]: "
            "give the live model, or take another scope"
        )
    matrices, rows, columns = weight.matrices
    if columns % ranking.length or (ranking.length > 1 and weight.inputs_first):
        raise SourceError(
            f"tensor {weight.name!r}: runs of {ranking.length} do not divide the rows of {columns}; take the scope 'tensor'"
        )
    width, found = columns // ranking.length, []
    if not weight.size or not count:
        return np.empty(0, np.int64)
    for matrix in range(matrices):
        start = matrix * rows * width
        tiles = _tiles(ranking, start, rows, width, progress)
        if weight.inputs_first:
            found.append(start + _best_of_columns(tiles, count, width))
        else:
            for first, tile in tiles:
                row, column = np.nonzero(_best(tile, count))
                found.append(start + (first + row) * width + column)
    return np.concatenate(found)


def _tiles(ranking: Ranking, start: int, rows: int, width: int, progress: Progress) -> Iterator[tuple[int, Array]]:
    """The number of the first row, and ranks ``[some, width]``; the ranking's own tiles start at multiples of its grain."""
    step = max(1, TILE // width)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        low, high = start + first * width, start + last * width
        down = low // ranking.grain * ranking.grain
        up = min(-(-high // ranking.grain) * ranking.grain, ranking.size)
        ranks = ranking.tile(down, up, np.empty(up - down, ranking.dtype)).values
        yield first, ranks[low - down : high - down].reshape(-1, width)
        progress((last - first) * width)


def _best(ranks: Array, count: int) -> Array:
    """A mask of the ``count`` largest of each row, ``[r, n]`` from ``[r, n]``; of equal ones the first."""
    if count >= ranks.shape[1]:
        return np.ones(ranks.shape, bool)
    edge = np.partition(ranks, ranks.shape[1] - count, axis=1)[:, ranks.shape[1] - count, None]
    above, equal = ranks > edge, ranks == edge
    wanted = count - np.count_nonzero(above, axis=1, keepdims=True)
    mask: Array = above | (equal & (np.cumsum(equal, axis=1) <= wanted))
    return mask


def _best_of_columns(tiles: Iterator[tuple[int, Array]], count: int, width: int) -> Indices:
    """The flat positions in the matrix of the ``count`` best of each column; the best so far are kept between tiles."""
    best: Array | None = None
    places = np.empty((0, width), np.int64)
    for first, tile in tiles:
        below = np.broadcast_to(np.arange(first, first + len(tile))[:, None], tile.shape)
        best = tile.copy() if best is None else np.concatenate([best, tile])
        places = np.concatenate([places, below])
        kept = _best(best.T, count).T
        # Each column keeps the same number, in the order of its rows.
        best, places = (array.T[kept.T].reshape(width, -1).T for array in (best, places))
    return np.sort((places * width + np.arange(width)).reshape(-1))
