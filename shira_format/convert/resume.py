"""Finished parts of a long conversion, kept beside its output until it is done, for ``--resume``."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar, cast

import numpy as np

from shira_format._core import system
from shira_format._core.dtypes import DTYPES, dtype_name
from shira_format._core.files import open_regular
from shira_format._core.threads import Progress
from shira_format.convert.exact import DifferingEntries, Exact
from shira_format.convert.given import Given
from shira_format.convert.inputs import Conversion, ConversionInputs
from shira_format.entries.changes import Entries
from shira_format.errors import WorkError
from shira_format.selection import Engine, Pending, TopK
from shira_format.selection.radix import Survey
from shira_format.selection.stages import Stage
from shira_format.storage import owners
from shira_format.storage.atomic import LITTER, atomic_file
from shira_format.version import __version__

_C = TypeVar("_C")
_R = TypeVar("_R")

_NOTE = "conversion"  # the file in the folder that says of which conversion the parts are
_OWN = re.compile(rf"{_NOTE}|[0-9]+-[0-9]{{6,}}\.npz")  # the files that are made here
_BYTES_PER_ENTRY = 16  # of a part: index, value, base, target
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (DifferingEntries, Entries, Survey)}


def partial_folder(out: Path) -> Path:
    """Where the parts of a conversion to ``out`` are kept."""
    return out.with_name(f"{out.name}.partial")


class ResumableEngine:
    """An engine that keeps the results of another one on disk and does not compute them again; a context manager.

    The folder is deleted if the block ends without an exception; one that holds anything else is refused.
    """

    def __init__(
        self,
        engine: Engine,
        out: Path,
        conversion: Conversion,
        rule: TopK | Exact | Given,
        inputs: ConversionInputs,
        progress: Progress,
    ) -> None:
        """Raises WorkError if the folder holds parts of something else, or another run works in it."""
        self._engine = engine
        self._progress = progress
        self._maps = 0
        self.folder = partial_folder(out)
        self._begin(_fingerprint(conversion, rule, inputs))

    def _begin(self, fingerprint: str) -> None:
        """Make the folder, or take over the one that is there, and lock its note."""
        while True:
            if not os.path.lexists(self.folder) or self._is_left_behind():
                self._make(fingerprint)
            try:
                handle = io.BufferedReader(open_regular(self.folder / _NOTE))  # locked until the end
            except (FileNotFoundError, NotADirectoryError):
                if not os.path.lexists(self.folder):  # another run has just finished
                    continue
                raise WorkError(f"{self.folder}: is no folder of a conversion's parts") from None
            with ExitStack() as opened:
                opened.enter_context(handle)
                if not system.lock(handle.fileno()):
                    raise WorkError(f"{self.folder}: another conversion to this file is running")
                if not _is_still_there(
                    handle, self.folder / _NOTE
                ):  # another run has finished while it was opened
                    continue
                if handle.read() != fingerprint.encode():
                    raise WorkError(
                        f"{self.folder}: holds parts of a conversion of other inputs or by another rule: delete it, or convert "
                        "without resuming"
                    )
                if others := self._others():
                    raise WorkError(f"{others[0]}: not a part of a conversion, and so not deleted: move it away")
                self._note = opened.pop_all()
                return

    def _others(self) -> list[Path]:
        """What is in the folder and was not made here."""
        return [
            path
            for path in sorted(self.folder.iterdir())
            if not (_OWN.fullmatch(path.name) or path.name in LITTER or owners.is_hidden(path))
        ]

    def _make(self, fingerprint: str) -> None:
        """The folder appears with its note, so that at no time it is one without."""
        owners.clean(self.folder.absolute().parent)
        made = owners.hidden(self.folder)
        try:
            made.mkdir()
            with owners.naming_visible(self.folder, made), atomic_file(made / _NOTE) as file:
                file.write(fingerprint.encode())
            made.rename(self.folder)  # fails if another run was faster, whose folder is not empty
        except OSError:
            if not (self.folder / _NOTE).is_file():
                raise
        finally:
            owners.remove(made)

    def _is_left_behind(self) -> bool:
        """Whether the folder is empty but for what a killed writer left: then it is replaced."""
        if not self.folder.is_dir():
            return False
        owners.clean(self.folder)
        with suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._others():  # put there meanwhile
                for path in [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]:
                    owners.remove(path)
            elif kind is None:
                # Renamed first: what is left if this is interrupted is no folder of parts any more.
                done = owners.hidden(self.folder)
                if not system.MOVES_OPEN_FILES:
                    self._note.close()
                system.replace(self.folder, done)
                owners.remove(done)
        finally:
            self._note.close()

    def map(self, stage: Stage[_C, _R], changes: Sequence[_C]) -> Iterator[Pending[_R]]:
        """See :class:`shira_format.selection.stages.Engine`."""
        self._maps += 1
        paths = [self.folder / f"{self._maps}-{place:06d}.npz" for place in range(len(changes))]
        kept = [path.exists() for path in paths]
        missing = [change for change, is_kept in zip(changes, kept, strict=True) if not is_kept]
        computed = self._engine.map(stage, missing)
        for path, change, is_kept in zip(paths, changes, kept, strict=True):
            if is_kept:
                self._progress(cast(Any, change).size * stage.passes)
                yield path.stat().st_size // _BYTES_PER_ENTRY, partial(_read, path)
                continue
            held, result = next(computed)
            task = partial(_keep, path, result)
            del result  # not to be held while the next one is computed
            yield held, task
            del task


def _is_still_there(handle: BinaryIO, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle.fileno())
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _keep(path: Path, result: Callable[[], _R]) -> _R:
    found = result()
    with atomic_file(path) as file:
        file.write(_packed(found))
    return found


def _fingerprint(conversion: Conversion, rule: TopK | Exact | Given, inputs: ConversionInputs) -> str:
    """A digest of the inputs, the rule and the writer's version."""
    changes = [(change.name, list(change.shape), change.size) for change in inputs.changes]
    what = [
        __version__,
        repr(conversion),
        type(rule).__name__,
        asdict(rule),
        inputs.states(),
        changes,
        inputs.source,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _packed(value: Any) -> bytes:
    """A dataclass of arrays, numbers, strings and such dataclasses as an ``.npz`` without pickle."""
    arrays: dict[str, Any] = {}

    def plain(item: Any) -> Any:
        if is_dataclass(item):
            return {"kind": type(item).__name__} | {f.name: plain(getattr(item, f.name)) for f in fields(item)}
        if isinstance(item, np.ndarray):
            arrays[f"a{len(arrays)}"] = np.ascontiguousarray(item).view(np.uint8)
            return {"array": f"a{len(arrays) - 1}", "dtype": dtype_name(item.dtype)}
        return item

    text = json.dumps(plain(value)).encode()
    out = io.BytesIO()
    np.savez(out, text=np.frombuffer(text, np.uint8), **arrays)
    return out.getvalue()


def _read(path: Path) -> Any:
    """What :func:`_packed` has written."""
    try:
        # Opened here: numpy forgets to close a file that is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:

            def full(item: Any) -> Any:
                if not isinstance(item, dict):
                    return item
                if "array" in item:
                    return found[item["array"]].view(DTYPES[item["dtype"]])
                kind = _KINDS[item["kind"]]
                return kind(**{key: full(value) for key, value in item.items() if key != "kind"})

            return full(json.loads(found["text"].tobytes()))
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise WorkError(f"{path}: a damaged part: {error}; delete the folder to begin anew") from None
