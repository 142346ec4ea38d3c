"""The index of a place: one line of JSON for each version, each in a file of its own that is never changed.

A version exists from the moment that its line does, which is written last. Lines are made only where there is none, so that of
two publishers one is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira_format._core.arrays import file_digest
from shira_format._core.strict_json import is_uint
from shira_format.errors import SourceError
from shira_format.format.fields import is_digest
from shira_format.storage.paths import read_file
from shira_format.storage.places import Place
from shira_format.sync.structure import VERSION, parsed

FOLDER = "index"
_NAME = re.compile(r"(\d{10})(?:-from-(\d{10}))?\.json")
_DATA = re.compile(r"(?:patches|snapshots)/(\d{10})[\w-]*\.(?:st|safetensors)")


@dataclass(frozen=True)
class Stored:
    """A file of a place.

    Attributes:
        file: its name in the place.
        nbytes: its size.
        sha256: its digest, 64 hex digits.
    """

    file: str
    nbytes: int
    sha256: str

    @classmethod
    def of(cls, file: str, path: Path) -> Stored:
        """That of the local file ``path``, to be known as ``file``."""
        return cls(file, path.stat().st_size, file_digest(path))

    def read(self, path: Path, where: str) -> bytes:
        """The bytes of ``path``, read once, so that what was checked is what is used.

        Raises:
            SourceError: it is not that file, whole; the message starts with ``where``, the place.
            OSError: it cannot be read.
        """
        content = read_file(path)
        self._check(len(content), hashlib.sha256(content).hexdigest(), where)
        return content

    def check(self, path: Path, where: str) -> None:
        """As :meth:`read`, of a file that does not fit into memory."""
        self._check(path.stat().st_size, None, where)
        self._check(self.nbytes, file_digest(path), where)

    def _check(self, size: int, digest: str | None, where: str) -> None:
        if size != self.nbytes:
            raise SourceError(
                f"{where}/{self.file}: {size} bytes instead of {self.nbytes}: written in part, or damaged"
            )
        if digest not in (None, self.sha256):
            raise SourceError(f"{where}/{self.file}: damaged (its digest differs)")

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "bytes": self.nbytes, "sha256": self.sha256}


@dataclass(frozen=True)
class Line:
    """What the index says of one version, or of a patch of several steps that leads to it.

    Attributes:
        version: from 0 on.
        state: digest of all tensors of this version; see :meth:`Structure.state`.
        publisher: tells publishers apart.
        base_version: the version that :attr:`patch` is for; None if there is no patch, as of version 0.
        base_state: digest of all tensors of that version.
        patch: what changes.
        encoding: how the patch is encoded: ``"plain"`` or ``"compact"``.
        snapshot: all tensors; None for most versions.
    """

    version: int
    state: str
    publisher: str
    base_version: int | None = None
    base_state: str | None = None
    patch: Stored | None = None
    encoding: str | None = None
    snapshot: Stored | None = None

    @property
    def is_step(self) -> bool:
        """Whether it is the line of a version, and not that of a patch of several steps."""
        return self.base_version is None or self.base_version == self.version - 1

    @property
    def name(self) -> str:
        """The name of its file in the place."""
        several = "" if self.is_step else f"-from-{self.base_version:010d}"
        return f"{FOLDER}/{self.version:010d}{several}.json"

    def to_bytes(self) -> bytes:
        """As one line of JSON."""
        found: dict[str, Any] = {"shira_sync": VERSION, "version": self.version, "state": self.state}
        if self.patch is not None:
            found |= {"base_version": self.base_version, "base_state": self.base_state}
            found["patch"] = self.patch.to_json() | {"encoding": self.encoding}
        if self.snapshot is not None:
            found["snapshot"] = self.snapshot.to_json()
        return json.dumps(found | {"publisher": self.publisher}, separators=(",", ":")).encode("ascii") + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Line:
        """Parse a line.

        Raises:
            SourceError: it is none; the message starts with ``where``.
        """
        raw = parsed(data, where)
        patch, snapshot = raw.get("patch"), raw.get("snapshot")
        try:
            line = cls(
                _version(raw["version"]), _digest(raw["state"]), _text(raw["publisher"]),
                None if patch is None else _version(raw["base_version"]),
                None if patch is None else _digest(raw["base_state"]),
                None if patch is None else _stored(patch),
                None if patch is None else _text(patch["encoding"]),
                None if snapshot is None else _stored(snapshot),
            )  # fmt: skip
            if line.base_version is not None and line.base_version >= line.version:
                raise ValueError
            if line.patch is None and line.snapshot is None:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{where}: is no line of an index") from None
        return line


class Index:
    """The lines of a place, each read once.

    Attributes:
        lines: by version and base version.
        torn: names of files of lines that were written in part: of the newest version, which does not exist yet, and never will
            if its publisher died; or of patches of several steps.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.lines: dict[tuple[int, int | None], Line] = {}
        self.torn: list[str] = []
        self._read: dict[str, Line] = {}

    @property
    def newest(self) -> int | None:
        """The newest version; None if nothing is published."""
        return max((version for version, _ in self.lines), default=None)

    def refresh(self) -> None:
        """Read the lines that are new, and forget those that are gone.

        Raises:
            SourceError: a line is damaged, or lines contradict each other.
        """
        names = [name for name in self._place.names(FOLDER) if _NAME.fullmatch(name)]
        read, torn = {}, []
        for name in names:
            if (line := self._read.get(name)) is None:
                try:
                    data = self._place.read(f"{FOLDER}/{name}")
                except FileNotFoundError:  # pruned in between
                    continue
                if not data.endswith(b"\n") and (name == names[-1] or "-from-" in name):
                    torn.append(f"{FOLDER}/{name}")
                    continue
                line = self._parsed(name, data)
            read[name] = line
        lines = {(line.version, line.base_version): line for line in read.values()}
        self._check(lines)
        self._read, self.lines, self.torn = read, lines, torn

    def _parsed(self, name: str, data: bytes) -> Line:
        where = f"{self._place.label}/{FOLDER}/{name}"
        line = Line.from_bytes(data, where)
        if line.name != f"{FOLDER}/{name}":
            raise SourceError(f"{where}: is the line of {line.name}")
        return line

    def _check(self, lines: dict[tuple[int, int | None], Line]) -> None:
        states: dict[int, tuple[str, str]] = {}
        for line in lines.values():
            for version, state in ((line.version, line.state), (line.base_version, line.base_state)):
                if version is None or state is None:
                    continue
                other, name = states.setdefault(version, (state, line.name))
                if other != state:
                    raise SourceError(
                        f"{self._place.label}/{line.name}: version {version} is another one than in {name} (digest differs)"
                    )


def data_version(file: str) -> int | None:
    """The version in the name of a patch or a snapshot."""
    found = _DATA.fullmatch(file)
    return None if found is None else int(found[1])


def _stored(raw: Any) -> Stored:
    file = _text(raw["file"])
    if data_version(file) is None:  # names lead to no other place
        raise ValueError
    return Stored(file, _version(raw["bytes"]), _digest(raw["sha256"]))


def _version(value: Any) -> int:
    if not is_uint(value):
        raise ValueError
    return int(value)


def _digest(value: Any) -> str:
    if not is_digest(value):
        raise ValueError
    return str(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
