"""Entries that were chosen and valued elsewhere, such as by a fit, as the rule of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import round_to
from shira_format._core.threads import Progress, Workers
from shira_format.entries.changes import Change, Entries, Tile
from shira_format.selection import Pending
from shira_format.selection.topk import check_energy, tiles


@dataclass(frozen=True)
class Given:
    """The rule: these entries, with these values.

    Attributes:
        entries: by the change's name, int64 ``[n]`` flat indices, strictly increasing, and ``[n]`` new values of the weight, which
            are rounded to its dtype; a change that is not here keeps no entry.
        selection: what the manifest says of how they were chosen.
        provenance: what it says beyond that.
    """

    entries: Mapping[str, tuple[Indices, Array]]
    selection: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


_NONE: tuple[Indices, Array] = np.empty(0, np.int64), np.empty(0, np.float32)


@dataclass
class GivenStage:
    """The stage that looks up what the source changes at the given entries; see :class:`shira_format.selection.stages.Stage`."""

    rule: Given
    passes: int = 1

    def __call__(self, change: Change, workers: Workers, progress: Progress) -> Pending[Entries]:
        """The given entries of one change, and the energy of all of it."""
        indices, targets = self.rule.entries.get(change.name, _NONE)
        update = np.zeros(indices.size, change.dtype)

        def work(start: int, tile: Tile, energy: float) -> float:
            size = tile.values.size if tile.where is None else int(tile.where[-1]) + 1 if tile.where.size else 0
            first, last = np.searchsorted(indices, [start, start + size])
            here = indices[first:last] - start
            if tile.where is None:
                update[first:last] = tile.values[here]
            elif here.size:
                at = np.searchsorted(tile.where, here)
                update[first:last] = np.where(tile.where[at] == here, tile.values[at], 0)
            return energy

        energy = sum(tiles(workers, change, work, progress))
        check_energy(change, energy)

        def rest() -> Entries:
            base, _ = change.completed(indices, update)
            return Entries(indices, update, base, round_to(targets, change.weight_dtype), energy)

        return indices.size, rest
