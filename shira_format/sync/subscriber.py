"""A live model that follows what a publisher publishes."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shira_format._core.threads import Threads
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.same import same_tensor
from shira_format.entries.loaded import LoadedAdapter, load_adapter
from shira_format.errors import BaseMismatch, SourceError
from shira_format.live.lock import ReadWriteLock
from shira_format.live.memory import Places
from shira_format.live.models import weights_of
from shira_format.live.switcher import Switcher
from shira_format.live.weights import live_weight
from shira_format.names.layouts import Rename
from shira_format.names.prefixes import match_names
from shira_format.storage.places import Place, open_place
from shira_format.sync.index import Index, Line, Stored
from shira_format.sync.live import LiveCheckpoint, digests_of
from shira_format.sync.patches import check_patch, composed, renamed
from shira_format.sync.route import Route, find_route, no_route
from shira_format.sync.structure import Structure
from shira_format.sync.whole import open_whole
from shira_format.tensors import same_bits

Verify = Literal["entries", "all"]
Names = Mapping[str, list[str]]  # those of the model, one for each memory, by published name


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        version: that the model has now; None if nothing is published yet.
        before: that it had; None if it was not known.
        undone: number of earlier updates that were taken back.
        snapshot: the version whose snapshot was written to the model; None if there was none.
        patches: number of patches, applied as one.
        entries: number of entries that these changed; whole: of tensors that these replaced.
        nbytes: that were read from the place.
    """

    version: int | None
    before: int | None
    undone: int = 0
    snapshot: int | None = None
    patches: int = 0
    entries: int = 0
    whole: int = 0
    nbytes: int = 0

    @property
    def changed(self) -> bool:
        """Whether the model was written to."""
        return bool(self.undone or self.patches) or self.snapshot is not None


@dataclass(frozen=True)
class _Version:
    """A version and the digest of all its tensors."""

    number: int
    state: str


@dataclass(frozen=True)
class _Applied:
    """A patch that is on the model, with what it takes to undo it."""

    switcher: Switcher
    patch: LoadedAdapter
    before: _Version
    after: _Version


class Subscriber:
    """Keeps a live model at a published version: in place, in order, bit for bit, in memory proportional to the patches.

    The model is first compared with the published versions by the digest of all its tensors. If it is none of them, or too old,
    the nearest snapshot is written to it; else patches lead on, each after a check that the entries that it changes hold
    what it was made for. Several patches are composed, and written at once. Everything is read and checked before the first
    weight is written; if writing fails, it is undone.

    Threads: one updates at a time; within ``with subscriber.serving():`` the model does not change. Nobody else may write to the
    published tensors; what does not fit is refused, not overwritten.

    Args:
        model: see :class:`shira_format.live.Switcher`. It may have more tensors than are published, such as buffers that are not
            persistent. Tied weights may be untied in it; and weights that are tied in it
            may be published apart, as long as they are equal.
        where: the publisher's place: a folder, a URL of fsspec, or a ``UPath``. It may still be empty.
        prefix: what names in the model start with; by default the one prefix under which all published names fit.
        rename: instead of a prefix, a function from a published name to one in the model.
        version: that the model holds, if it is known: the model is then not compared.
        history: number of updates that can be undone without reading anything; each is held in memory.
        verify: ``"entries"``: those that a patch changes, before it; ``"all"``: the digest of all tensors after each update, too, which
            is always checked after a snapshot.
        threads: at most this many; all cores by default.

    Example:
        >>> subscriber = Subscriber(model, "s3://bucket/run-7")
        >>> subscriber.update().version
        12
        >>> with subscriber.serving():
        ...     answer = model(**request)
    """

    def __init__(
        self,
        model: Any,
        where: str | os.PathLike[str] | Place,
        *,
        prefix: str | None = None,
        rename: Callable[[str], str] | None = None,
        version: int | None = None,
        history: int = 1,
        verify: Verify = "entries",
        threads: int | None = None,
    ) -> None:
        """Raises: TypeError: not a model; ValueError: an argument out of range; SourceError: the URL cannot be meant."""
        if prefix is not None and rename is not None:
            raise TypeError("prefix or rename, not both")
        if history < 0 or verify not in ("entries", "all"):
            raise ValueError(f"history {history}, verify {verify!r}")
        self._model = model
        self._weights = weights_of(model)
        self._place = open_place(where)
        self._rename: Rename | None = rename if prefix is None else prefix.__add__
        self._verify = verify
        self._threads = Threads(threads)
        self._index = Index(self._place)
        self._structure: Structure | None = None
        self._applied: deque[_Applied] = deque(maxlen=history)
        self._claimed = version
        self._known: _Version | None = None
        self._broken = False
        self._lock = ReadWriteLock()
        self._turn = threading.RLock()

    @property
    def version(self) -> int | None:
        """The version that the model holds; None if it is not known yet."""
        return None if self._known is None else self._known.number

    @property
    def newest(self) -> int | None:
        """The newest version at the last update; None if nothing was published."""
        return self._index.newest

    @contextmanager
    def serving(self) -> Iterator[int | None]:
        """The model does not change within this ``with`` block: for forward passes, on any number of threads.

        Yields:
            The version that the model holds.

        Raises:
            BaseMismatch: writing a snapshot failed half-way, so that the model is of no version: update it first.
        """
        with self._lock.reading():
            if self._broken:
                raise BaseMismatch(
                    f"{self._place.label}: a snapshot was written in part only: update the model first"
                )
            yield self.version

    def update(self, version: int | None = None) -> Update:
        """Bring the model to the newest version, or to this one, which may be earlier.

        If nothing leads there, or anything fails, the model stays as it is, and the next call tries again.

        Raises:
            SourceError: the place cannot be read, a file is damaged or written in part, or nothing leads to the version.
            BaseMismatch: the model has other tensors than are published, or holds something else than the patch is for.
            FormatError: a patch breaks a rule of the format.
            OSError: a file cannot be read.
        """
        with self._turn:
            self._index.refresh()
            before, target = self.version, self.newest if version is None else version
            if target is None or target == before:
                return Update(before, before)
            structure, names = self._opened()
            if self._known is None:
                self._identify(structure, names)
            lines = self._index.lines.values()
            route = find_route(lines, target, self.version, (one.before.number for one in self._applied))
            if route is None:
                raise no_route(self._place.label, lines, target, self.version)
            return replace(self._go(route, structure, names), before=before)

    def back(self) -> Update:
        """Undo the last update: the weights are restored bit for bit.

        Raises:
            BaseMismatch: no update is held, or the model lost or resized a tensor, or entries that the update changed have changed
                since; no weight was changed.
        """
        with self._turn:
            if not self._applied:
                raise BaseMismatch(
                    f"{self._place.label}: no earlier update is held (history=): update to a version"
                )
            self._opened()  # the model still has what was published
            before = self.version
            with self._lock.writing(), ExitStack() as rollback:
                undone = self._undo_to(self._applied[-1].before.number, rollback)
                rollback.pop_all()
            return Update(self.version, before, undone)

    def verify(self) -> None:
        """Compare the digest of all tensors with that of the version.

        Raises:
            BaseMismatch: the model holds something else, or no version yet.
        """
        with self._turn:
            self._check_all(*self._opened())

    def _opened(self) -> tuple[Structure, Names]:
        """The structure, and the names that each tensor has in the model: one for each memory."""
        if self._structure is None:
            self._structure = Structure.read(self._place)
        structure, live = self._structure, self._weights.tensors()
        first, rename = Places(live).first, self._names(structure, live)
        names = {
            name: list(dict.fromkeys(first[new] for new in map(rename, structure.names_of(name)) if new in live))
            for name in structure.tensors
        }
        structure.check("the model", self._live(names))
        return structure, names

    def _names(self, structure: Structure, live: Mapping[str, Any]) -> Rename:
        if self._rename is not None:
            return self._rename
        if all(any(other in live for other in structure.names_of(name)) for name in structure.tensors):
            return str

        def fits(name: str, found: str) -> bool:
            return tuple(live[found].shape) == structure.tensors[name][1]

        try:
            return match_names(list(structure.tensors), live, self._place.label, fits=fits, option="prefix=")
        except SourceError as error:
            raise BaseMismatch(f"{error} (map names by prefix= or rename=)") from None

    def _live(self, names: Names, number: int = 0) -> LiveCheckpoint:
        """The model by published names; with a ``number`` the tensors that have that many names more."""
        live = self._weights.tensors()
        return LiveCheckpoint({name: live[found[number]] for name, found in names.items() if len(found) > number})

    def _identify(self, structure: Structure, names: Names) -> None:
        """Find the version that the model holds, if it is one of those in the index."""
        lines = self._index.lines.values()
        if self._claimed is not None:
            found = next((line for line in lines if line.version == self._claimed), None)
            if found is None:
                raise no_route(self._place.label, lines, self._claimed, None)
        else:
            state = self._model_state(structure, names)
            alike = (line for line in lines if line.state == state)
            found = max(alike, key=lambda line: line.version, default=None)
        if found is not None:
            self._set(_Version(found.version, found.state))

    def _model_state(self, structure: Structure, names: Names) -> str | None:
        """The digest of all tensors; None if those that were tied differ."""
        digests = digests_of(self._live(names), structure.tensors, self._threads.map)
        for number in range(1, max(map(len, names.values()), default=0)):
            more = self._live(names, number)
            if any(digests[name] != digest for name, digest in digests_of(more, more, self._threads.map).items()):
                return None
        return structure.state(digests)

    def _check_all(self, structure: Structure, names: Names) -> None:
        if self._known is None:
            raise BaseMismatch(f"{self._place.label}: the model holds no version: update it first")
        if self._model_state(structure, names) != self._known.state:
            raise BaseMismatch(
                f"{self._place.label}: the model differs from version {self.version} (digest of all tensors differs)"
            )

    def _go(self, route: Route, structure: Structure, names: Names) -> Update:
        """Follow a route; what is read is checked before the first weight is written, and what fails is undone."""
        whole, undone = None, 0
        with ExitStack() as held, ExitStack() as rollback:
            base: Checkpoint = self._live(names)
            if route.start == "snapshot":
                whole = next(
                    one for one in self._index.lines.values() if one.version == route.version and one.snapshot
                )
                base = held.enter_context(self._snapshot(whole, structure))
            elif route.start == "undo":
                held.enter_context(self._lock.writing())
                undone = self._undo_to(route.version, rollback)
            patch = None
            if route.patches:
                patch = composed(route.patches, lambda line, before: self._read(line, before, structure), base)
                patch = renamed(patch, names)
            held.enter_context(self._lock.writing())
            if whole is not None:
                rollback.callback(self._lose)
                self._fill(base, whole, names)
            applied = None if patch is None else self._apply(patch, route.patches, rollback)
            if whole is not None or self._verify == "all":
                self._check_all(structure, names)
            rollback.pop_all()
            if applied is not None:
                self._applied.append(applied)
        read = [line.patch for line in route.patches] + ([whole.snapshot] if whole is not None else [])
        return Update(
            self.version,
            None,
            undone,
            None if whole is None else whole.version,
            len(route.patches),
            0 if patch is None else sum(tensor.nnz for tensor in patch.tensors),
            0 if patch is None else len(patch.dense),
            sum(one.nbytes for one in read if one is not None),
        )

    def _read(self, line: Line, before: Checkpoint, structure: Structure) -> LoadedAdapter:
        """A patch for ``before``, whole and checked, in memory."""
        assert line.patch is not None
        with self._file(line.patch) as path:
            content = line.patch.read(path, self._place.label)
            found = load_adapter(path, self._threads.executor, base=before, content=content)
        patch = LoadedAdapter(f"{self._place.label}/{line.patch.file}", found.tensors, found.dense, found.alpha)
        check_patch(patch, structure)
        return patch

    @contextmanager
    def _snapshot(self, line: Line, structure: Structure) -> Iterator[Checkpoint]:
        """All tensors of a version, checked."""
        assert line.snapshot is not None
        where = f"{self._place.label}/{line.snapshot.file}"
        with self._file(line.snapshot) as path:
            line.snapshot.check(path, self._place.label)
            found = open_whole(path, structure, where)
            if structure.state(digests_of(found, structure.tensors, self._threads.map)) != line.state:
                raise SourceError(f"{where}: is not version {line.version} (digest of all tensors differs)")
            yield found

    @contextmanager
    def _file(self, stored: Stored) -> Iterator[Path]:
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self._place.local(stored.file))
            except FileNotFoundError:
                raise SourceError(f"{self._place.label}/{stored.file}: is missing") from None
            yield path

    def _fill(self, found: Checkpoint, line: Line, names: Names) -> None:
        """Write all tensors of a version to the model, one at a time."""
        live = self._weights.tensors()
        self._check_one(found, names)
        Places(live).check_apart({one for several in names.values() for one in several})
        weights = {name: [live_weight(one, live[one]) for one in several] for name, several in names.items()}
        self._lose()
        for name, several in weights.items():
            values = found[name]
            for weight in several:
                weight.fill(values)
        self._set(_Version(line.version, line.state))

    def _check_one(self, found: Checkpoint, names: Names) -> None:
        """Raise BaseMismatch if published tensors that are one in the model differ."""
        first: dict[str, str] = {}
        for name, several in names.items():
            for one in several:
                other = first.setdefault(one, name)
                if other != name and not same_tensor(found, other, found, name):
                    raise BaseMismatch(
                        f"tensors {other!r} and {name!r} are published apart, and one in the model, {one!r}"
                    )

    def _apply(self, patch: LoadedAdapter, lines: tuple[Line, ...], rollback: ExitStack) -> _Applied:
        before, after = self._known, _Version(lines[-1].version, lines[-1].state)
        assert before is not None
        if lines[0].base_state != before.state:
            raise SourceError(
                f"{self._place.label}/{lines[0].name}: is for another version {before.number} (digest differs)"
            )
        switcher = Switcher(self._model, rename=str)
        rollback.callback(self._set, before)
        switcher.load(patch)
        rollback.callback(switcher.revert)
        self._set(after)
        return _Applied(switcher, patch, before, after)

    def _undo_to(self, version: int, rollback: ExitStack) -> int:
        """Take back patches, if their entries are as they left them; returns how many."""
        undone = 0
        while self.version != version:
            step = self._applied[-1]
            self._check_untouched(step.patch)
            step.switcher.revert()
            self._applied.pop()
            self._set(step.before)
            rollback.callback(self._redo, step)
            undone += 1
        return undone

    def _redo(self, step: _Applied) -> None:
        step.switcher.load(step.patch)
        self._applied.append(step)
        self._set(step.after)

    def _check_untouched(self, patch: LoadedAdapter) -> None:
        live = self._weights.tensors()
        found = [
            (one.name, live_weight(one.name, live[one.name]).get(one.indices), one.values) for one in patch.tensors
        ]
        found += [(one.name, live_weight(one.name, live[one.name]).whole(), one.values) for one in patch.dense]
        for name, here, left in found:
            if not same_bits(here, left):
                raise BaseMismatch(f"tensor {name!r}: changed after version {self.version} was written to it")

    def _set(self, known: _Version) -> None:
        self._known, self._broken = known, False

    def _lose(self) -> None:
        """The model is of no version, until it has been written whole."""
        self._known, self._claimed, self._broken = None, None, True
        self._applied.clear()
