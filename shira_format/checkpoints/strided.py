"""Parts of tensors as boxes, and reading of tensors with strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from shira_format._core.arrays import Array
from shira_format.tensors import numel

_SMALL = 2**16  # bytes that are read at once even if only a few are needed
_LARGE = 2**25  # most bytes that are read at once

# Offsets and sizes, one of each for every dimension.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Divide the flat range from ``start`` to ``stop`` of a tensor into contiguous boxes, in order.

    Each box has size 1 in all dimensions before one of them, and the full size in all after it.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = numel(shape[1:])
    row, last = start // inner, stop // inner
    if head := start - row * inner:  # it begins within a row
        for offsets, sizes in boxes(shape[1:], head, min(stop - row * inner, inner)):
            yield (row, *offsets), (1, *sizes)
        row += 1
    if row < last:
        yield (row, *(0 for _ in shape[1:])), (last - row, *shape[1:])
    if last >= row:  # it may end within a row
        for offsets, sizes in boxes(shape[1:], 0, stop - last * inner):
            yield (last, *offsets), (1, *sizes)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements with these strides (in elements) are in row-major order without gaps."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return numel(shape) == 0
        expected *= size
    return True


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements from the first to the last, both included, of a tensor with these strides."""
    if numel(shape) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def gather(read: Callable[[int, memoryview], None], first: int, strides: tuple[int, ...], out: Array) -> None:
    """Fill ``out``, of any shape, with the elements at ``first`` plus multiples of ``strides``.

    Takes at most twice the memory of ``out`` in addition, and no more than 32 MiB.

    Args:
        read: fills a buffer with the bytes from an element on.
        first: the first element.
        strides: in elements, at least 0, one for each dimension of ``out``.
        out: the array to fill.
    """
    span = extent(out.shape, strides)
    if span == 0:
        return
    if span * out.itemsize <= max(min(2 * out.nbytes, _LARGE), _SMALL):
        buffer = np.empty(span, out.dtype)
        read(first, buffer.view(np.uint8).data)
        out[...] = np.ndarray(out.shape, out.dtype, buffer, 0, tuple(stride * out.itemsize for stride in strides))
        return
    # Too much memory, or most of it for elements in between: halve the longest axis.
    axis = max(range(out.ndim), key=lambda n: (out.shape[n] - 1) * strides[n])
    half = out.shape[axis] // 2
    lower, upper = np.split(out, [half], axis)
    gather(read, first, strides, lower)
    gather(read, first + half * strides[axis], strides, upper)
