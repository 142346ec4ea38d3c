"""Every entry whose bits differ between two checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from shira_format.arrays import Array, bits, positions, scratch
from shira_format.changes import TILE, Difference, Entries
from shira_format.checkpoints import Checkpoint
from shira_format.convert.finish import different
from shira_format.selection import Progress, Workers
from shira_format.tensors import numel

_INDEX = 1.03  # bytes an index takes at the usual densities


@dataclass(frozen=True)
class Exact:
    """The rule: keep every difference.

    Attributes:
        digests: record the digest of each whole float tensor of the result, changed or not, so that whoever applies
            the patch can tell that all of it is as it was meant; reads the fine-tune once more.
    """

    digests: bool = True


@dataclass(frozen=True)
class Differences:
    """What differs in one tensor.

    Attributes:
        entries: the entries, or None if the whole tensor takes fewer bytes.
        digest: of the whole tuned tensor, or None if nobody asked for it.
    """

    entries: Entries | None
    digest: str | None


@dataclass
class Differing:
    """The stage that compares; see :class:`shira_format.selection.stages.Stage`."""

    rule: Exact
    passes: int = 1

    def __call__(self, change: Difference, workers: Workers, progress: Progress) -> Differences:
        """All that differs between the two tensors, which have one dtype."""
        seen = (
            workers.submit(lambda: tensor_digest(change.tuned, change.tuned_name)) if self.rule.digests else None
        )

        def work(start: int, stop: int) -> Entries:
            base, tuned = change.both(start, stop)
            found = positions(different(base, tuned))
            target = tuned[found]
            return Entries(found + start, target, base[found], target)

        parts: list[Entries] = []
        whole = False
        size, each, looked = 0, change.weight_dtype.itemsize, 0

        def told(elements: int) -> None:
            nonlocal looked
            looked += elements
            progress(elements)

        for entries in workers.ranges(change.size, TILE, work, told):
            size += entries.size
            parts.append(entries)
            if size * (each + _INDEX) >= change.size * each:
                whole = True
                progress(change.size - looked)  # which nobody has to look at
                break
        digest = seen.result() if seen is not None else None
        return Differences(None if whole else Entries.joined(parts, change), digest)


def parts_of(checkpoint: Checkpoint, name: str, step: int = TILE) -> Iterator[Array]:
    """The flat tensor in parts, each good until the next."""
    size, dtype = numel(checkpoint.shape(name)), checkpoint.dtype(name)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield checkpoint.part(name, start, stop, scratch("part", stop - start, dtype))


def tensor_digest(checkpoint: Checkpoint, name: str) -> str:
    """SHA-256 of a tensor's bytes, in bounded memory."""
    found = hashlib.sha256()
    for part in parts_of(checkpoint, name):
        found.update(bits(part).data)
    return found.hexdigest()
