"""The inner loops of sparse products, compiled with numba; imported only if numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    return cast("F", njit(nogil=True, cache=True)(function))


@_compiled
def measure(
    left: Any, left_columns: Any, left_values: Any, right: Any, right_columns: Any, right_values: Any, columns: int
) -> tuple[float, int, int]:
    """Energy, nonzero cells and reached cells of the product of two CSR matrices, one row in memory at a time.

    Args:
        left: row pointers of the left matrix; ``left_columns`` and ``left_values`` are its entries.
        left_columns: see above.
        left_values: see above.
        right: row pointers of the right matrix; ``right_columns`` and ``right_values`` are its entries.
        right_columns: see above.
        right_values: see above.
        columns: number of columns of the product.
    """
    row = np.zeros(columns, np.float64)
    seen = np.full(columns, -1, np.int64)
    touched = np.empty(columns, np.int64)
    energy, nonzero, reached = 0.0, 0, 0
    for i in range(left.size - 1):
        count = 0
        for k in range(left[i], left[i + 1]):
            value, inner = left_values[k], left_columns[k]
            for at in range(right[inner], right[inner + 1]):
                j = right_columns[at]
                if seen[j] != i:
                    seen[j] = i
                    touched[count] = j
                    count += 1
                    row[j] = 0.0
                row[j] += value * right_values[at]
        of_row = 0.0
        for k in range(count):
            cell = row[touched[k]]
            of_row += cell * cell
            nonzero += cell != 0
        energy += of_row
        reached += count
    return energy, nonzero, reached


@_compiled
def bilinear(
    first: Any,
    first_at: Any,
    first_values: Any,
    second: Any,
    second_at: Any,
    second_values: Any,
    squares: Any,
    which: Any,
) -> float:
    """The sum over all segments of ``first_values^T squares[which] second_values``.

    Args:
        first: start and stop of each segment of the first, ``[segments, 2]``; ``first_at`` are its positions in the square.
        first_at: see above.
        first_values: see above.
        second: the same for the second; ``second_at`` and ``second_values`` likewise.
        second_at: see above.
        second_values: see above.
        squares: ``[n, size, size]``.
        which: the index of each segment's square.
    """
    total = 0.0
    for segment in range(which.size):
        of_segment = 0.0
        for k in range(first[segment, 0], first[segment, 1]):
            row = 0.0
            for at in range(second[segment, 0], second[segment, 1]):
                row += squares[which[segment], first_at[k], second_at[at]] * second_values[at]
            of_segment += first_values[k] * row
        total += of_segment
    return total
