"""An adapter file in another profile: plain or compact, with the same content."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.format import AdapterFile, AdapterWriter
from shira_format.storage.outputs import check_not_input


@dataclass(frozen=True)
class RepackReport:
    """What was written.

    Attributes:
        path: the file.
        before: bytes of the file that was read.
        after: bytes of the new one.
        nnz: entries of all sparse tensors.
        features: what a reader must understand to read it.
        needs_base: whether it is read with its base alone.
    """

    path: Path
    before: int
    after: int
    nnz: int
    features: tuple[str, ...]
    needs_base: bool

    @property
    def bits_per_entry(self) -> float | None:
        """Bits of the whole file over its entries; None without entries."""
        return 8 * self.after / self.nnz if self.nnz else None


def repack(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    compact: bool = False,
) -> RepackReport:
    """Write an adapter again, with the same entries, values, base values and provenance, bit for bit.

    One tensor is in memory at a time.

    Args:
        adapter: the file to read.
        out: the file to write, replacing what is there.
        base: the checkpoint that it was made for. With ``compact``, what it tells is not stored in a file that does not hold the base's
            values.
        compact: take as few bytes as possible; otherwise the file is plain, and is read without the base.

    Raises:
        FormatError: the file is no adapter, or is damaged.
        BaseRequired: it can be read with its base alone, and none is given.
        BaseMismatch: ``base`` is another one.
        SourceError: ``base`` is no checkpoint.
        OSError: a file cannot be read or written; nothing is left behind.

    Example:
        >>> repack("step.st", "small.st", base="my-model", compact=True).bits_per_entry
        6.3
    """
    path = Path(out)
    check_not_input(path, [Path(adapter)])
    opened = None if base is None else open_checkpoint(base)
    file = AdapterFile(adapter, base=opened)
    try:
        with AdapterWriter(path, file.manifest.raw, compact=compact, base=opened) as writer:
            for name, entry in file.manifest.tensors.items():
                writer.add(file.sparse(name), entry.raw)
            for name, whole in file.manifest.whole.items():
                writer.add_dense(file.dense(name), whole.raw)
        before = file.streams.size
    finally:
        file.streams.close()
    written = AdapterFile(path)
    try:
        entries = written.manifest.tensors
        return RepackReport(
            path, before, path.stat().st_size, sum(entry.nnz for entry in entries.values()),
            tuple(written.manifest.raw["features"]), any(map(written.needs_base, entries)),
        )  # fmt: skip
    finally:
        written.streams.close()
