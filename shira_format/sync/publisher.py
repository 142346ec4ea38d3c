"""Publishes the versions of weights that a trainer changes."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.threads import Threads
from shira_format.checkpoints import Checkpoint
from shira_format.convert.report import ConversionReport
from shira_format.entries.loaded import load_adapter
from shira_format.errors import BaseMismatch, SourceError
from shira_format.live.switcher import Switcher
from shira_format.storage.places import Place, open_place
from shira_format.sync.index import Index, Line, Stored, data_version
from shira_format.sync.live import LiveCheckpoint, Model, digests_of, open_source
from shira_format.sync.patches import ENCODINGS, write_patch
from shira_format.sync.structure import NAME, Structure
from shira_format.sync.subscriber import Subscriber
from shira_format.sync.whole import fill, mapped, write_whole


@dataclass(frozen=True)
class Published:
    """A version that was published.

    Attributes:
        version: its number.
        base_version: what its patch is for; None for version 0.
        entries: number of changed entries; whole: of tensors that are stored whole.
        nbytes: of the patch.
        snapshot_nbytes: of the snapshot; 0 without one.
    """

    version: int
    base_version: int | None = None
    entries: int = 0
    whole: int = 0
    nbytes: int = 0
    snapshot_nbytes: int = 0


class Publisher:
    """Writes what changed since the last version that it published to a place, from which subscribers follow.

    It holds one copy of the last version. A version is the bits of all tensors: the parameters and persistent buffers of a
    module, each tied tensor once. Their names, dtypes and shapes stay the same over all versions of a place.

    A version exists from the moment that its line is in the index, which is written after everything else. A publisher that
    is started at a place with versions goes on from the newest, which it restores and verifies by its digest; of two
    publishers the one that published last goes on, and the other is refused.

    Args:
        model: a ``torch.nn.Module``, a pipeline, a dictionary of arrays or tensors; or a checkpoint, which is opened again at
            each :meth:`publish`. If the place is empty, it is published as version 0, with a snapshot.
        where: a folder, a URL of fsspec, or a ``UPath``.
        snapshot_every: write all tensors, too, at versions that this divides; None: at version 0 alone.
        encoding: of patches: ``"plain"``, or ``"compact"``: as few bytes as possible, given what is there before.
        copy: a local file for the copy, which may be there from an earlier run; by default the copy is in memory.
        threads: at most this many; all cores by default.

    Attributes:
        version: the last version.

    Raises:
        BaseMismatch: the model cannot be read, or has other tensors than the place.
        SourceError: the place cannot be read, or its newest version cannot be restored.
        OSError: it cannot be read or written.

    Example:
        >>> publisher = Publisher(model, "s3://bucket/run-7")
        >>> for batch in batches:
        ...     train(model, batch)
        ...     print(publisher.publish().nbytes)
    """

    version: int

    def __init__(
        self,
        model: Model,
        where: str | os.PathLike[str] | Place,
        *,
        snapshot_every: int | None = 100,
        encoding: str = "plain",
        copy: str | os.PathLike[str] | None = None,
        threads: int | None = None,
    ) -> None:
        if snapshot_every is not None and snapshot_every < 1:
            raise ValueError(f"snapshot_every {snapshot_every}: at least 1")
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
        self._model = model
        self._place = open_place(where)
        self._snapshot_every, self._encoding, self._threads = snapshot_every, encoding, threads
        self._pool = Threads(threads)
        self._turn = threading.Lock()
        self._token = secrets.token_hex(8)
        self._index = Index(self._place)
        source, tied = open_source(model)
        self._structure = self._agreed(Structure.of(source, tied))
        self._copy = mapped(Path(copy), self._structure) if copy is not None else self._in_memory()
        self._digests: dict[str, str] = {}
        self._state = ""
        self._index.refresh()
        for name in self._index.torn:  # by a publisher that died
            self._place.remove(name)
        if self._index.newest is None:
            fill(self._copy, source, self._structure.tensors)
            self._digests = self._digests_of(self._structure.tensors)
            self._first()
        else:
            if copy is None:  # the model may hold the newest version
                fill(self._copy, source, self._structure.tensors)
            self._restore()

    def publish(self, model: Model = None) -> Published:
        """Publish the weights as they are now as the next version, whether or not they changed.

        If it fails, the version does not exist, unless its line had been written: the next call finds that out, and goes on.

        Args:
            model: instead of the one that the publisher was made with, such as the path of the next checkpoint.

        Raises:
            SourceError: another publisher published meanwhile; or the place cannot be written.
            BaseMismatch: the model cannot be read, or has other tensors.
            OSError: the place cannot be written.
        """
        with self._turn:
            self._catch_up()
            source, tied = open_source(self._model if model is None else model)
            self._structure.check_equal(Structure.of(source, tied), self._place.label)
            version = self.version + 1
            with ExitStack() as undo, ExitStack() as written:
                file = self._file("patches", version, "st", written)
                with self._place.writing(file) as path:
                    report = self._convert(self._held(), source, path, version, self.version)
                    patch = Stored.of(file, path)
                    self._apply(path, undo)  # to the copy: what is published is what can be read back
                digests = self._digests | self._digests_of([one.name for one in report.tensors] + report.whole)
                snapshot = self._write_snapshot(version, written) if self._is_due(version) else None
                line = Line(
                    version, self._structure.state(digests), self._token, self.version, self._state, patch,
                    self._encoding, snapshot,
                )  # fmt: skip
                self._create(line, written)
                undo.pop_all()
            self._digests, self._state, self.version = digests, line.state, version
            return _published(line, report)

    def compose(self, base_version: int) -> Published:
        """Write one patch that leads from an earlier version to the last one, for subscribers that are late.

        The earlier version is restored in a temporary file. Subscribers take the patch where that reads fewer bytes.

        Raises:
            SourceError: nothing leads to ``base_version``, or the patch is there.
            OSError: the place cannot be written.
        """
        with self._turn:
            self._catch_up()
            if not 0 <= base_version < self.version - 1:
                raise SourceError(
                    f"{self._place.label}: no steps to compose from version {base_version} to {self.version}"
                )
            if (self.version, base_version) in self._index.lines:
                raise SourceError(
                    f"{self._place.label}: a patch from version {base_version} to {self.version} is there already"
                )
            # After an exception the file may still be mapped, and cannot be removed on Windows.
            with tempfile.TemporaryDirectory(prefix="shira-", ignore_cleanup_errors=True) as folder:
                return self._composed(Path(folder) / "base.safetensors", base_version)

    def _composed(self, path: Path, base_version: int) -> Published:
        """Write the patch; ``path``: a temporary file for the earlier version, mapped until this returns."""
        before = mapped(path, self._structure)
        Subscriber(before, self._place, verify="all", threads=self._threads).update(base_version)
        base = LiveCheckpoint(before)
        state = self._structure.state(digests_of(base, self._structure.tensors, self._pool.map))
        with ExitStack() as written:
            file = self._file("patches", self.version, "st", written, f"from-{base_version:010d}-")
            with self._place.writing(file) as patch_path:
                report = self._convert(base, self._held(), patch_path, self.version, base_version)
                patch = Stored.of(file, patch_path)
            line = Line(self.version, self._state, self._token, base_version, state, patch, self._encoding)
            self._create(line, written)
        return _published(line, report)

    def prune(self, oldest: int) -> None:
        """Remove the versions before the newest snapshot that is not after version ``oldest``, and files of no version.

        Raises:
            SourceError: there is no such snapshot; or another publisher published meanwhile.
            OSError: a file cannot be removed.
        """
        with self._turn:
            self._catch_up()
            lines = self._index.lines
            whole = [
                line.version for line in lines.values() if line.snapshot is not None and line.version <= oldest
            ]
            if not whole:
                raise SourceError(f"{self._place.label}: no snapshot of version {oldest} or before it")
            first = max(whole)
            gone = [
                line
                for line in lines.values()
                if (line.version if line.is_step else line.base_version or 0) < first
            ]
            for line in gone:  # first the lines: what a line names is there
                self._place.remove(line.name)
            self._index.refresh()
            named = {one.file for line in self._index.lines.values() for one in (line.patch, line.snapshot) if one}
            for folder in ("patches", "snapshots"):
                for name in self._place.names(folder):
                    number = data_version(file := f"{folder}/{name}")
                    # What has a later number may be that of a version that is being written.
                    if number is not None and number <= self.version and file not in named:
                        self._place.remove(file)

    def _agreed(self, found: Structure) -> Structure:
        """The structure of the place, which is that of the model."""
        if not found.tensors:
            raise BaseMismatch("the model has no tensors to publish")
        with suppress(FileExistsError):
            self._place.create(NAME, found.to_bytes())
        there = Structure.read(self._place)
        there.check_equal(found, self._place.label)
        return there

    def _in_memory(self) -> dict[str, Array]:
        return {name: np.empty(shape, dtype) for name, (dtype, shape) in self._structure.tensors.items()}

    def _held(self) -> LiveCheckpoint:
        return LiveCheckpoint(self._copy)

    def _digests_of(self, names: Iterable[str]) -> dict[str, str]:
        """Of tensors of the copy."""
        return digests_of(self._held(), names, self._pool.map)

    def _first(self) -> None:
        """Publish version 0."""
        with ExitStack() as written:
            snapshot = self._write_snapshot(0, written)
            line = Line(0, self._structure.state(self._digests), self._token, snapshot=snapshot)
            self._create(line, written)
        self.version, self._state = 0, line.state

    def _restore(self) -> None:
        """Bring the copy to the newest version, and verify it."""
        follower = Subscriber(self._copy, self._place, history=0, verify="all", threads=self._threads)
        version = follower.update().version
        assert version is not None
        follower.verify()
        self._digests = self._digests_of(self._structure.tensors)
        self.version, self._state = version, self._structure.state(self._digests)

    def _is_due(self, version: int) -> bool:
        return self._snapshot_every is not None and version % self._snapshot_every == 0

    def _file(self, folder: str, version: int, ending: str, written: ExitStack, more: str = "") -> str:
        """The name of a file that nobody else writes, and that is removed unless it is published."""
        file = f"{folder}/{version:010d}-{more}{self._token}.{ending}"
        written.callback(self._place.remove, file)
        return file

    def _convert(
        self, before: Checkpoint, after: Checkpoint, path: Path, version: int, base_version: int
    ) -> ConversionReport:
        return write_patch(
            before,
            after,
            path,
            version=version,
            base_version=base_version,
            encoding=self._encoding,
            threads=self._threads,
        )

    def _apply(self, path: Path, undo: ExitStack) -> None:
        switcher = Switcher(self._copy, rename=str, threads=self._threads)
        switcher.load(load_adapter(path, self._pool.executor, base=self._held()))
        undo.callback(switcher.revert)

    def _write_snapshot(self, version: int, written: ExitStack) -> Stored:
        file = self._file("snapshots", version, "safetensors", written)
        with self._place.writing(file) as path:
            write_whole(path, self._held(), self._structure)
            return Stored.of(file, path)

    def _create(self, line: Line, written: ExitStack) -> None:
        """Make the line: from then on the version exists. If it was made cannot be told after an error, its files stay."""
        files = written.pop_all()
        try:
            self._place.create(line.name, line.to_bytes())
        except FileExistsError:
            # A store's client may have tried twice, and refused itself.
            if self._place.read(line.name) == line.to_bytes():
                return
            files.close()
            raise self._other(line.version) from None

    def _catch_up(self) -> None:
        """Find out whether the last line was written after all; refuse to go on after another publisher."""
        self._index.refresh()
        later = [line for line in self._index.lines.values() if line.version > self.version]
        for line in later:
            if line.publisher != self._token:
                raise self._other(line.version)
        if later:
            self._restore()
            self._index.refresh()
        if self._index.newest != self.version:
            raise SourceError(f"{self._place.label}: version {self.version} is gone: start a new publisher")

    def _other(self, version: int) -> SourceError:
        return SourceError(
            f"{self._place.label}: another publisher wrote version {version}: this one, at version {self.version}, is refused"
        )


def _published(line: Line, report: ConversionReport) -> Published:
    assert line.patch is not None
    return Published(
        line.version, line.base_version, sum(tensor.nnz for tensor in report.tensors), len(report.whole),
        line.patch.nbytes, 0 if line.snapshot is None else line.snapshot.nbytes,
    )  # fmt: skip
