"""Every entry whose bits differ between two checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shira_format._core.arrays import Array, as_bytes, bits_differ, scratch, where_true
from shira_format._core.threads import Progress, Workers
from shira_format.checkpoints import Checkpoint
from shira_format.entries.changes import TILE, CheckpointChange, Entries
from shira_format.selection.stages import Pending
from shira_format.tensors import numel

_INDEX = 1.03  # bytes an index takes at the usual densities
_PIECES, _PIECE = 8, 1 << 12  # of a large tensor, which are looked at first


@dataclass(frozen=True)
class Exact:
    """The rule: keep every difference.

    Attributes:
        digests: record the digest of each whole float tensor of the result, changed or not, so that applying the patch
            verifies the whole result; reads the fine-tune once more.
    """

    digests: bool = True


@dataclass(frozen=True)
class DifferingEntries:
    """The differences of one tensor.

    Attributes:
        entries: the entries, or None if the whole tensor takes fewer bytes.
        digest: of the whole tuned tensor; None if it is not recorded.
    """

    entries: Entries | None
    digest: str | None


@dataclass
class CompareStage:
    """The stage that compares; see :class:`shira_format.selection.stages.Stage`."""

    rule: Exact
    passes: int = 1

    def __call__(
        self, change: CheckpointChange, workers: Workers, progress: Progress
    ) -> Pending[DifferingEntries]:
        """All that differs between the two tensors, which have one dtype."""
        nothing = np.empty(0, change.dtype)  # the sizes of the differences are not needed

        def work(start: int, stop: int) -> Entries:
            base, tuned = change.both(start, stop)
            found = where_true(bits_differ(base, tuned))
            return Entries(found + start, nothing, base[found], tuned[found])

        limit = _whole_from(change)
        if self._many(change, limit, workers):
            progress(change.size)
            return 0, lambda: DifferingEntries(None, None)
        parts = list(workers.ranges(change.size, TILE, work, progress))
        held = sum(part.size for part in parts)
        if held >= limit:  # the sample was misleading
            return 0, lambda: DifferingEntries(None, None)

        def rest() -> DifferingEntries:
            digest = tensor_digest(change.tuned, change.tuned_name) if self.rule.digests else None
            return DifferingEntries(Entries.concatenated(parts, change), digest)

        return held, rest

    @staticmethod
    def _many(change: CheckpointChange, limit: float, workers: Workers) -> bool:
        """Whether at least ``limit`` entries differ: counted without collecting them, and only if a sample suggests it."""

        def count(start: int, stop: int) -> int:
            return int(np.count_nonzero(bits_differ(*change.both(start, stop))))

        if change.size <= TILE:
            return False
        starts = [i * (change.size - _PIECE) // (_PIECES - 1) for i in range(_PIECES)]
        if sum(count(start, start + _PIECE) for start in starts) < limit / change.size * _PIECES * _PIECE / 2:
            return False
        seen = 0
        for found in workers.ranges(change.size, TILE, count):
            seen += found
            if seen >= limit:
                return True
        return seen >= limit


def _whole_from(change: CheckpointChange) -> float:
    """The number of differing entries from which the whole tensor takes fewer bytes."""
    each = change.weight_dtype.itemsize
    return max(1.0, change.size * each / (each + _INDEX))


def read_parts(checkpoint: Checkpoint, name: str, step: int = TILE) -> Iterator[Array]:
    """The flat tensor in parts, each good until the next."""
    size, dtype = numel(checkpoint.shape(name)), checkpoint.dtype(name)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield checkpoint.part(name, start, stop, scratch("part", stop - start, dtype))


def tensor_digest(checkpoint: Checkpoint, name: str) -> str:
    """SHA-256 of a tensor's bytes, in bounded memory."""
    found = hashlib.sha256()
    for part in read_parts(checkpoint, name):
        found.update(as_bytes(part).data)
    return found.hexdigest()
