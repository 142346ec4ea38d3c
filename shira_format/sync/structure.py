"""What stays the same over all versions: names, dtypes and shapes of the tensors, and which are tied; digests of states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core import fits
from shira_format._core.dtypes import DTYPES, dtype_name
from shira_format.checkpoints import Checkpoint
from shira_format.errors import BaseMismatch, FormatError, SourceError
from shira_format.storage.places import Place
from shira_format.storage.safetensors_file import is_uint, parse_object
from shira_format.tensors import MAX_RANK

NAME = "structure.json"
VERSION = 1  # of what is written to a place


@dataclass(frozen=True)
class Structure:
    """The tensors of every version.

    Attributes:
        tensors: dtype and shape by name, in order.
        tied: further names of tensors, each with the name under which the tensor is published.
    """

    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, tied: Mapping[str, str]) -> Structure:
        """That of a checkpoint."""
        return cls({name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint}, dict(tied))

    @classmethod
    def read(cls, place: Place) -> Structure:
        """That of a place.

        Raises:
            SourceError: nothing is published there, or it cannot be read.
            OSError: it cannot be read.
        """
        try:
            return cls.from_bytes(place.read(NAME), f"{place.label}/{NAME}")
        except FileNotFoundError:
            raise SourceError(f"{place.label}: nothing is published there: it has no {NAME}") from None

    def names_of(self, name: str) -> list[str]:
        """All names of a tensor, the one that it is published under first."""
        return [name, *(other for other, first in self.tied.items() if first == name)]

    def check(self, what: str, found: Checkpoint, names: Iterable[str] | None = None) -> None:
        """Raise BaseMismatch unless a checkpoint, which messages call ``what``, has these tensors, or those of ``names``."""
        for name in self.tensors if names is None else names:
            dtype, shape = self.tensors[name]
            if name not in found:
                raise fits.missing(f"tensor {name!r}", name, what)
            if (found.shape(name), found.dtype(name)) != (shape, dtype):
                raise BaseMismatch(
                    f"tensor {name!r}: published as {_kind(dtype, shape)}, {what} has "
                    f"{_kind(found.dtype(name), found.shape(name))}"
                )

    def check_equal(self, found: Structure, where: str) -> None:
        """Raise BaseMismatch unless a model, whose structure is ``found``, can go on with what is published at ``where``."""
        for name in (*self.tensors, *found.tensors):
            here, there = self.tensors.get(name), found.tensors.get(name)
            if here != there:
                raise BaseMismatch(
                    f"{where}: tensor {name!r} is published as {_kind(*here) if here else 'nothing'}, the model has "
                    f"{_kind(*there) if there else 'none'}: publish it to another place"
                )
        if self.tied != found.tied:
            name = min(self.tied.items() ^ found.tied.items())[0]
            raise BaseMismatch(f"{where}: tensor {name!r} is tied otherwise than it was: publish to another place")

    def state(self, digests: Mapping[str, str]) -> str:
        """The digest of all tensors together, as 64 hex digits.

        SHA-256 of one line for each tensor, in the order of their names' code points: the JSON list of name, dtype, shape and
        the SHA-256 of the tensor's bytes, in ASCII, without spaces.
        """
        found = hashlib.sha256()
        for name in sorted(self.tensors):
            dtype, shape = self.tensors[name]
            line = json.dumps([name, dtype_name(dtype), list(shape), digests[name]], separators=(",", ":"))
            found.update(line.encode("ascii") + b"\n")
        return found.hexdigest()

    def to_bytes(self) -> bytes:
        """As JSON."""
        tensors = [
            {"name": name, "dtype": dtype_name(dtype), "shape": list(shape)}
            for name, (dtype, shape) in self.tensors.items()
        ]
        found = {"shira_sync": VERSION, "tensors": tensors, "tied": dict(self.tied)}
        return json.dumps(found, separators=(",", ":")).encode("ascii") + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Structure:
        """Parse what :meth:`to_bytes` made.

        Raises:
            SourceError: it is something else; the message starts with ``where``.
        """
        raw = parsed(data, where)
        try:
            tensors = {item["name"]: (DTYPES[item["dtype"]], _shape(item["shape"])) for item in raw["tensors"]}
            tied = dict(raw["tied"])
            distinct = len(tensors) == len(raw["tensors"]) and all(isinstance(name, str) for name in tensors)
            if not distinct or not all(name in tensors for name in tied.values()) or tensors.keys() & tied.keys():
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{where}: does not say what is published") from None
        return cls(tensors, tied)


def parsed(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a file of a place.

    Raises:
        SourceError: it is no JSON, or is of a later version; the message starts with ``where``.
    """
    try:
        raw = parse_object(data, "json")
    except FormatError as error:
        raise SourceError(f"{where}: {error.reason}") from None
    if (version := raw.get("shira_sync")) != VERSION:
        raise SourceError(f"{where}: shira_sync {version!r:.80}; this reader knows {VERSION}")
    return raw


def _shape(dimensions: Any) -> tuple[int, ...]:
    if not isinstance(dimensions, list) or len(dimensions) > MAX_RANK or not all(map(is_uint, dimensions)):
        raise ValueError
    return tuple(dimensions)


def _kind(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"{dtype_name(dtype)}{list(shape)}"
