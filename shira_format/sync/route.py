"""The way from what a model holds to another version, by the fewest bytes."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from shira_format.errors import SourceError
from shira_format.sync.index import Line

Start = Literal["here", "undo", "snapshot"]


@dataclass(frozen=True)
class Route:
    """How to come to a version.

    Attributes:
        start: where from: the version that is there, one that an undo leads to, or one that has a snapshot.
        version: the version to start from.
        patches: lines whose patches lead on from it, one after the other.
    """

    start: Start
    version: int
    patches: tuple[Line, ...] = ()


def find_route(lines: Collection[Line], target: int, here: int | None, held: Iterable[int] = ()) -> Route | None:
    """The way to version ``target`` that reads the fewest bytes; None if there is none.

    Args:
        lines: the index.
        target: where to.
        here: the version that is there; None if it is not known.
        held: earlier versions, to which an undo leads without reading anything.
    """
    onward: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        if line.base_version is not None:
            onward[line.base_version].append(line)
    starts = [(line.snapshot.nbytes, 2, line.version) for line in lines if line.snapshot is not None]
    starts += [(0, 1, version) for version in held] + ([(0, 0, here)] if here is not None else [])
    kinds: tuple[Start, ...] = ("here", "undo", "snapshot")
    # Bytes, number of patches, a number that makes ties arbitrary but fixed; then the version and how it was reached.
    waiting = [
        (nbytes, 0, number, version, Route(kinds[kind], version))
        for number, (nbytes, kind, version) in enumerate(sorted(starts))
    ]
    number, done = len(waiting), set()
    while waiting:
        nbytes, hops, _, version, route = heapq.heappop(waiting)
        if version == target:
            return route
        if version in done:
            continue
        done.add(version)
        for line in onward[version]:
            assert line.patch is not None
            number += 1
            longer = Route(route.start, route.version, (*route.patches, line))
            heapq.heappush(waiting, (nbytes + line.patch.nbytes, hops + 1, number, line.version, longer))
    return None


def no_route(where: str, lines: Collection[Line], target: int, here: int | None) -> SourceError:
    """The error for a version that nothing leads to."""
    known = {line.version for line in lines}
    if target not in known:
        return SourceError(f"{where}: has no version {target}; versions: {_words(sorted(known))}")
    after = max(
        (line.version for line in lines if line.snapshot is not None and line.version <= target), default=None
    )
    start = here if here is not None and here < target else after
    first = 0 if start is None else start + 1
    missing = next((version for version in range(first, target) if version not in known), None)
    lost = "" if missing is None else f": version {missing} is missing"
    held = "a model of none of these versions" if here is None else f"version {here}"
    return SourceError(f"{where}: nothing leads from {held} to version {target}{lost}, and no snapshot helps")


def _words(versions: list[int]) -> str:
    if not versions:
        return "none"
    return f"{versions[0]} to {versions[-1]}" if len(versions) > 1 else str(versions[0])
