"""Where tensors are in a checkpoint: under one name, or by way of tensors of a third name space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from shira_format.names.row_blocks import Location, RowBlock


def whole(name: str, shape: tuple[int, ...]) -> Location:
    """A tensor that the checkpoint has under this name."""
    return Location(shape, (RowBlock(name, 0, ((0, shape[0]),)),))


def through(location: Location, hub: Mapping[str, Location]) -> Location:
    """Where a tensor is in the checkpoint, given where it is in the tensors of ``hub``, and these in the checkpoint."""
    pieces = [
        piece
        for block in location.blocks
        for piece in _pieces(block, hub[block.name].blocks)
    ]  # fmt: skip
    by_tensor: dict[str, list[tuple[int, int, int]]] = {}
    for name, at, start, stop in pieces:
        by_tensor.setdefault(name, []).append((at, start, stop))
    blocks = [block for name, parts in by_tensor.items() for block in _merged(name, sorted(parts))]
    return Location(location.shape, tuple(blocks))


def _pieces(block: RowBlock, blocks: Iterable[RowBlock]) -> Iterator[tuple[str, int, int, int]]:
    """The rows of ``block`` as tensor of the checkpoint, row in it, and the range of rows of the tensor that is sought."""
    for inner in blocks:
        at = inner.start
        for low, high in inner.rows:  # rows of the tensor of the hub, which are at ``at`` in the checkpoint
            here = block.start
            for start, stop in block.rows:  # the same tensor's rows from ``here`` on are these of the sought one
                first, last = max(low, here), min(high, here + stop - start)
                if first < last:
                    yield inner.name, at + first - low, start + first - here, start + last - here
                here += stop - start
            at += high - low


def _merged(name: str, parts: Sequence[tuple[int, int, int]]) -> Iterator[RowBlock]:
    """Ranges that are neighbours in the checkpoint as one block."""
    ranges: list[tuple[int, int]] = []
    first = end = parts[0][0]
    for at, start, stop in parts:
        if at != end:
            yield RowBlock(name, first, tuple(ranges))
            ranges, first = [], at
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
        end = at + stop - start
    yield RowBlock(name, first, tuple(ranges))
