"""A checkpoint that also has the tensors of other name spaces: rows of its own."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.notices import NamesNotice
from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.names.layouts import elsewhere
from shira_format.names.prefixes import AmbiguousNames
from shira_format.names.row_blocks import Location

_T = TypeVar("_T")


class _Run(NamedTuple):
    """Consecutive rows of a tensor, from ``first`` to ``stop``, that are rows of the base's ``name`` from ``start`` on."""

    first: int
    stop: int
    name: str
    start: int


class LocatedCheckpoint(Checkpoint):
    """``base`` with further tensors, which are read from its own.

    Attributes:
        base: the checkpoint.
        locations: where the further tensors are, by name.
    """

    def __init__(self, base: Checkpoint, locations: Mapping[str, Location], hidden: Collection[str] = ()) -> None:
        """Args: ``locations``: those of a tensor with several dtypes are left out; ``hidden``: tensors of ``base`` to leave out."""
        self.base = base
        self._hidden = set(hidden)
        self.locations = {
            name: location
            for name, location in locations.items()
            if name not in base and len({base.dtype(block.name) for block in location.blocks}) == 1
        }
        self.path, self.files, self.components, self.notices = base.path, base.files, base.components, base.notices
        self._runs: dict[str, list[_Run]] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self.locations:
            return self.base[name]
        shape = self.shape(name)
        found = self.part(name, 0, math.prod(shape)).reshape(shape)
        found.flags.writeable = False
        return found

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self.base if name not in self._hidden)
        yield from self.locations

    def __len__(self) -> int:
        return len(self.base) - len(self._hidden) + len(self.locations)

    def __contains__(self, name: object) -> bool:
        return (name in self.base and name not in self._hidden) or name in self.locations

    def shape(self, name: str) -> tuple[int, ...]:
        location = self.locations.get(name)
        return self.base.shape(name) if location is None else location.shape

    def dtype(self, name: str) -> np.dtype[Any]:
        location = self.locations.get(name)
        return self.base.dtype(name if location is None else location.blocks[0].name)

    def part(self, name: str, start: int, stop: int, out: Array | None = None) -> Array:
        if name not in self.locations:
            return self.base.part(name, start, stop, out)
        runs = self._runs_of(name)
        columns = math.prod(self.shape(name)) // runs[-1].stop  # of a row of the matrix view
        found = np.empty(stop - start, self.dtype(name)) if out is None else out[: stop - start]
        place = bisect_right(runs, start, key=lambda run: run.first * columns) - 1
        while start < stop and place < len(runs):
            run = runs[place]
            until = min(stop, run.stop * columns)
            offset = (run.start - run.first) * columns
            target = found[found.size - (stop - start) :][: until - start]
            target[...] = self.base.part(run.name, start + offset, until + offset)
            start, place = until, place + 1
        return found

    def is_quantised(self, name: str) -> bool:
        location = self.locations.get(name)
        names = [name] if location is None else [block.name for block in location.blocks]
        return any(map(self.base.is_quantised, names))

    def at(self, name: str, indices: Array) -> Array:
        return super().at(name, indices) if name in self.locations else self.base.at(name, indices)

    @property
    def folder(self) -> Path | None:
        return self.base.folder

    def _runs_of(self, name: str) -> list[_Run]:
        if name not in self._runs:
            runs = []
            for block in self.locations[name].blocks:
                start = block.start
                for first, stop in block.rows:
                    runs.append(_Run(first, stop, block.name, start))
                    start += stop - first
            self._runs[name] = sorted(runs)
        return self._runs[name]


def in_any_names(read: Callable[[Checkpoint], _T], base: Checkpoint) -> tuple[Checkpoint, _T]:
    """What ``read`` makes of the base or, if its names do not fit, of the base with other programs' names for its tensors.

    Returns:
        The base, or a :class:`LocatedCheckpoint` of it, and the result.

    Raises:
        AmbiguousNames: there are several ways.
        SourceError: neither fits; the message is that of the base.
    """
    try:
        return base, read(base)
    except AmbiguousNames:
        raise
    except SourceError as error:
        located = LocatedCheckpoint(base, elsewhere(base, base.shape))
        if not located.locations:
            raise
        try:
            return located, read(located)
        except AmbiguousNames:
            raise
        except SourceError:
            raise error from None


def check_location(base: Checkpoint, location: Location, where: object) -> None:
    """Check that the blocks have all rows of the tensor once, and are of tensors with as many columns and one dtype.

    Raises:
        SourceError: they do not; the message begins with ``where``.
    """
    ranges = sorted(rows for block in location.blocks for rows in block.rows)
    end = 0
    for start, stop in ranges:
        if start != end or stop <= start:
            raise SourceError(f"{where}: the base does not have all rows of the module once")
        end = stop
    columns = math.prod(location.shape) // end if end else 0
    names = dict.fromkeys(block.name for block in location.blocks)
    shapes = [base.shape(name) for name in names]
    fit = all(columns in (math.prod(shape[1:]), shape[-1] if shape else 0) for shape in shapes)
    if columns * end != math.prod(location.shape) or not fit or len({base.dtype(name) for name in names}) > 1:
        raise SourceError(f"{where}: the base's {', '.join(map(repr, names))} differ in columns or dtype")


def other_names(places: Sequence[tuple[str, Location]]) -> NamesNotice:
    """The notice that a source has another program's names for what the base has: how many, and where one is."""
    name, location = places[0]
    tensors = list(dict.fromkeys(block.name for block in location.blocks))
    what = " and ".join(map(repr, tensors[:2])) + (f" and {len(tensors) - 2} more" if len(tensors) > 2 else "")
    count = "1 name in the LoRA is" if len(places) == 1 else f"{len(places)} names in the LoRA are"
    return NamesNotice(f"{count} another program's for this model: {name!r} is in the base's {what}")
