"""The folder of an export: the names of its files, and its ``index.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from shira_format._core.dtypes import FLOATS, dtype_name, working_dtype
from shira_format._core.strict_json import is_uint, parse_object
from shira_format._core.system import is_device
from shira_format.errors import FormatError, SourceError
from shira_format.format.items import check_name
from shira_format.format.manifest import DERIVED
from shira_format.storage.output_folder import write_json
from shira_format.storage.paths import read_file
from shira_format.storage.safetensors_header import MAX_HEADER
from shira_format.tensors import MAX_RANK, ValueKind, is_too_large

INDEX = "index.json"
ORIGINAL = "original.st"
FORMAT = "shira-csr"
VERSION = 1

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]{0,250}\.npz")
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
_LONGEST = 120


@dataclass(frozen=True)
class Item:
    """One sparse tensor in ``index.json``.

    Attributes:
        name: the tensor's name.
        file: its matrix, in the same folder.
        shape: its shape in the base.
        dtype: its dtype in the base or, for deltas to a base of any dtype, that of the deltas.
        values: what the data are.
        data_dtype: float32 or float64, the dtype of the data.
        digests: ``indices``: of the flat indices as int64; one named like ``values``: of the data as written; ``base``: of the
            base's values at the entries. Any may lack.
        more: what else is said of it, for people.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: ValueKind
    data_dtype: np.dtype[Any]
    digests: Mapping[str, str]
    more: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The item as JSON values."""
        return {
            "name": self.name, "file": self.file, "shape": list(self.shape), "dtype": dtype_name(self.dtype),
            "values": self.values, "data_dtype": dtype_name(self.data_dtype), **self.more, "digests": dict(self.digests),
        }  # fmt: skip


@dataclass(frozen=True)
class Index:
    """A checked ``index.json``.

    Attributes:
        items: the sparse tensors, in the adapter's order.
        whole: names of the whole tensors, which ``original.st`` holds.
        manifest: the provenance.
        original: whether there is an ``original.st``.
    """

    items: list[Item]
    whole: list[str]
    manifest: dict[str, Any]
    original: bool

    def as_json(self) -> dict[str, Any]:
        """The file as JSON values."""
        return {
            "format": FORMAT, "version": VERSION, **({"original": ORIGINAL} if self.original else {}),
            "manifest": self.manifest, "tensors": [item.as_json() for item in self.items], "whole": self.whole,
        }  # fmt: skip

    def files(self) -> set[str]:
        """Names of all files of the export."""
        return {INDEX, *(item.file for item in self.items), *([ORIGINAL] if self.original else [])}


def provenance(manifest: Mapping[str, Any], chosen: Callable[[str], bool]) -> dict[str, Any]:
    """The manifest without what follows from the tensors; of ``removed`` only the chosen names."""
    kept = {key: value for key, value in manifest.items() if key not in DERIVED}
    if isinstance(kept.get("removed"), list):
        kept["removed"] = [name for name in kept["removed"] if not isinstance(name, str) or chosen(name)]
    return kept


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A file name for each tensor name, safe on every system and distinct even where case does not count.

    Letters, digits and ``-_.`` stay, all else is percent-encoded in UTF-8. Long names are cut; these, and names that differ from an
    earlier one in case only, end in ``~`` and a digest.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = "".join(c if c in _PLAIN else "".join(f"%{b:02X}" for b in c.encode()) for c in name)
        if plain.startswith(".") or is_device(plain):
            plain = f"%{ord(plain[0]):02X}{plain[1:]}"
        if len(plain) > _LONGEST or plain.lower() in taken:
            plain = f"{plain[: _LONGEST - 33]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        taken.add(plain.lower())
        found[name] = f"{plain}.npz"
    return found


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.json``.

    Raises:
        SourceError: it could not be read again.
    """
    try:
        value = index.as_json()
        parse_object(json.dumps(value, allow_nan=False).encode(), "header-json")
    except (TypeError, ValueError) as error:
        reason = error.reason if isinstance(error, FormatError) else error
        raise SourceError(f"the manifest cannot be written into {INDEX}: {reason}") from None
    write_json(folder / INDEX, value, indent=1)


def read_index(folder: Path) -> Index:
    """Read and check the ``index.json`` of a folder.

    Raises:
        SourceError: there is none, or it breaks a rule.
    """
    path = folder / INDEX
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    if not path.is_file():
        raise SourceError(f"{folder}: not a folder of shira_to_csr: it has no {INDEX}")
    content = read_file(path, MAX_HEADER)
    try:
        raw = parse_object(content.strip(), "header-json")
        if raw.get("format") != FORMAT or raw.get("version") != VERSION:
            raise SourceError(f"'format' and 'version' are not {FORMAT!r} and {VERSION}")
        if raw.get("original", ORIGINAL) != ORIGINAL:
            raise SourceError(f"'original' is not {ORIGINAL!r}")
        manifest = _need(raw, "manifest", dict)
        items = [_item(item) for item in _need(raw, "tensors", list)]
        whole = _need(raw, "whole", list)
        for name in whole:
            _check_name(name)
        counts = Counter([*(item.name for item in items), *whole])
        if twice := [name for name, count in counts.items() if count > 1]:
            raise SourceError(f"tensor {twice[0]!r} occurs twice")
        return Index(items, whole, manifest, "original" in raw)
    except FormatError as error:
        raise SourceError(f"{path}: {error.reason}") from None
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None


def inside(folder: Path, file: str) -> Path:
    """The path of a file of the folder.

    Raises:
        SourceError: there is none, or it is a link that leads elsewhere.
    """
    path = folder / file
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if path.resolve().parent != folder.resolve():
        raise SourceError(f"{path}: leads out of the folder")
    return path


def _item(raw: Any) -> Item:
    if not isinstance(raw, dict):
        raise SourceError("an item of 'tensors' is not an object")
    name = _need(raw, "name", str)
    _check_name(name)
    try:
        shape = tuple(_need(raw, "shape", list))
        if len(shape) > MAX_RANK or not all(is_uint(n) for n in shape) or is_too_large(shape):
            raise SourceError("'shape' is not a list of at most 64 dimensions with at most 2^53 - 1 elements")
        dtype = _dtype(_need(raw, "dtype", str))
        file = _need(raw, "file", str)
        if not _FILE.fullmatch(file):
            raise SourceError(f"'file' is not the name of an .npz file in the same folder: {file[:300]!r}")
        values = _need(raw, "values", str)
        if values not in ("target", "delta", "none"):
            raise SourceError(f"'values' is {values[:80]!r}, not 'target', 'delta' or 'none'")
        data_dtype = _dtype(_need(raw, "data_dtype", str)) if "data_dtype" in raw else working_dtype(dtype)
        if data_dtype != working_dtype(data_dtype):
            raise SourceError("'data_dtype' is neither F32 nor F64")
        digests = _need(raw, "digests", dict) if "digests" in raw else {}
        for key, digest in digests.items():
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise SourceError(f"the digest {key[:80]!r} is not 64 hex digits")
    except SourceError as error:
        raise SourceError(f"tensor {name!r}: {error}") from None
    more = {key: raw[key] for key in ("nnz", "from", "rows") if key in raw}
    return Item(name, file, shape, dtype, cast(ValueKind, values), data_dtype, digests, more)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise SourceError("a name is not a string")
    check_name(name, None)


def _dtype(name: str) -> np.dtype[Any]:
    if name not in FLOATS:
        raise SourceError(f"dtype {name[:80]!r} is not a float dtype")
    return FLOATS[name]


def _need(raw: Mapping[str, Any], key: str, kind: type) -> Any:
    if type(raw.get(key)) is not kind:
        reason = f"{key!r} is missing" if key not in raw else f"{key!r} is not of type {kind.__name__}"
        raise SourceError(reason)
    return raw[key]
