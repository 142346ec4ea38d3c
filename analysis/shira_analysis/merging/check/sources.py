"""What should have been merged: the updates of a LoRA or the entries of an adapter, in one form."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import working_dtype
from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.quantised import quantised_named
from shira_format.checkpoints.renamed import RenamedCheckpoint
from shira_format.convert.unused import check_all_used, opened_files
from shira_format.entries.base_check import base_values
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import AdapterFile
from shira_format.format.manifest import METADATA_KEY
from shira_format.lora import open_lora
from shira_format.lora.base import Update
from shira_format.lora.decomposed import Decomposed
from shira_format.names.prefixes import Renaming, match_names
from shira_format.storage.paths import resolve_path
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.tensors import SparseTensor, matrix_shape


@dataclass(frozen=True)
class Addition:
    """A small dense delta, such as of a bias."""

    name: str
    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        return working_dtype(self.values.dtype)

    @property
    def columns(self) -> int:
        """Its size: it has one row."""
        return self.values.size

    def tile(self, start: int, stop: int, out: Array) -> None:
        """As :meth:`shira_format.lora.base.Update.tile`."""
        out[...] = self.values.reshape(1, -1)[start:stop]


class AdapterUpdate:
    """A sparse tensor of an adapter as an update that is 0 except at its entries."""

    def __init__(
        self, name: str, shape: tuple[int, ...], base: Checkpoint, read: Callable[[], SparseTensor]
    ) -> None:
        """Args: ``name`` is the weight's in the base; ``read`` returns the tensor, cached."""
        self.name, self.shape = name, shape
        self.dtype = working_dtype(base.dtype(name))
        self.columns = max(1, matrix_shape(shape)[1])
        self._base, self._read = base, read

    def tile(self, start: int, stop: int, out: Array) -> None:
        """As :meth:`shira_format.lora.base.Update.tile`."""
        first, last = start * self.columns, stop * self.columns
        before = self._base.part(self.name, first, last)
        with np.errstate(over="ignore", invalid="ignore"):
            after = self.exact(first, before, 1.0).astype(self.dtype)
            out.reshape(-1)[...] = after - before.astype(self.dtype)

    def exact(self, start: int, before: Array, strength: float) -> Array:
        """The expected values of the part ``before`` of the base, from flat index ``start`` on."""
        tensor = self._read()
        first, last = np.searchsorted(tensor.indices, [start, start + before.size])
        where = tensor.indices[first:last] - start
        due = before.copy()
        due[where] = tensor.applied(before[where], strength, int(first))
        return due


@dataclass(frozen=True)
class ExpectedChange:
    """The expected change of one weight.

    Attributes:
        kind: ``"weight"``, ``"bias"`` (added as a whole) or ``"entries"`` (of an adapter).
        update: the change at strength 1.
        base_name: the weight's name in the base.
    """

    kind: str
    update: Update
    base_name: str

    @property
    def exact(self) -> Any:
        """See :class:`shira_analysis.merging.check.scan.MergedWeight`."""
        return self.update.exact if isinstance(self.update, AdapterUpdate) else None

    @property
    def scales(self) -> bool:
        """Whether it scales the weight itself and so is not linear in the strength."""
        return _scales(self.update)


def _scales(update: Any) -> bool:
    return isinstance(update, Decomposed) or any(map(_scales, getattr(update, "parts", ())))


@dataclass(frozen=True)
class Source:
    """The content of a LoRA or an adapter.

    Attributes:
        changes: of weights.
        whole: tensors that replace the base's, by their names in the result.
        strength: the default strength.
        facts: provenance, such as rank and alpha.
        removed: names of base tensors that are not in the result.
        notices: remarks for the user.
    """

    changes: list[ExpectedChange]
    whole: dict[str, Array] = field(default_factory=dict)
    strength: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def open_source(
    path: str | os.PathLike[str],
    base: Checkpoint,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    allow_unused: bool = False,
) -> Source:
    """Open a LoRA of any dialect, or an adapter file.

    Args:
        path: the file or folder.
        base: the checkpoint that it adapts.
        dialect: of a LoRA; detected by default.
        prefix: what the base's names of the adapted weights start with, if several are possible.
        rank: of PEFT's weights without their configuration.
        alpha: likewise.
        allow_unused: open it although its folder has weight files that are not used.

    Raises:
        SourceError: neither, or it does not fit the base.
        FormatError: a safetensors file is damaged.
        BaseMismatch: an adapter was made for another base.
    """
    if dialect is None and _is_adapter(path):
        if rank is not None or alpha is not None:
            raise SourceError(f"{path}: an adapter file has no rank: leave out rank and alpha")
        return _of_adapter(AdapterFile(resolve_path(path)), base, prefix)
    with quantised_named(base):
        lora = open_lora(path, base, dialect=dialect, prefix=prefix, rank=rank, alpha=alpha)
    notices = check_all_used(
        resolve_path(path), [*lora.files, *base.files], opened_files(lora.files), allow=allow_unused
    )
    changes = [
        ExpectedChange("weight", update, lora.copies.get(update.name, update.name)) for update in lora.updates
    ]
    changes += [
        ExpectedChange("bias", Addition(name, values), lora.copies.get(name, name))
        for name, values in lora.additions.items()
    ]
    names = [*(change.update.name for change in changes), *lora.whole]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SourceError(f"{path}: tensor {min(twice)!r} is changed twice")
    return Source(changes, lora.whole, 1.0, lora.source, list(lora.removed), notices + lora.notices)


def _is_adapter(path: str | os.PathLike[str]) -> bool:
    found = resolve_path(path)
    if not found.is_file() or found.suffix not in {".st", ".safetensors"}:
        return False
    file = SafetensorsFile(found)
    try:
        return METADATA_KEY in file.metadata
    finally:
        file.close()


def _of_adapter(file: AdapterFile, base: Checkpoint, prefix: str | None) -> Source:
    read = lru_cache(maxsize=1)(file.sparse)
    for name, entry in file.manifest.tensors.items():
        if entry.values == "none":
            raise SourceError(f"{file.path}: tensor {name!r} is a mask, without values")
        if entry.base_name != name or entry.result_shape != entry.shape:
            raise SourceError(
                f"{file.path}: tensor {name!r} is renamed or resized by this patch: make the result with shira_to_full, "
                "which checks it by its digest"
            )
    rename = _renaming(file, base, prefix, read)
    changes = []
    for name, entry in file.manifest.tensors.items():
        try:
            base_values(read(name), _renamed(base, name, rename(name)))
        except BaseMismatch as error:
            raise BaseMismatch(f"{file.path}: {error}") from None
        update = AdapterUpdate(rename(name), entry.shape, base, partial(read, name))
        changes.append(ExpectedChange("entries", update, rename(name)))
    # A new tensor, which the base lacks, has its own name.
    whole = {
        rename(name) if rename(name) in base else name: file.dense(name).values for name in file.manifest.whole
    }
    alpha = float(file.manifest.raw.get("alpha", 1.0))
    removed = [rename(name) for name in file.manifest.removed]
    return Source(changes, whole, alpha, removed=removed, notices=rename.notices("the adapter"))


def _renaming(
    file: AdapterFile, base: Checkpoint, prefix: str | None, read: Callable[[str], SparseTensor]
) -> Renaming:
    """From the adapter's names to the base's; shapes and the base's values at the entries decide between several."""
    entries = file.manifest.tensors

    def fits(name: str, found: str) -> bool:
        if base.shape(found) != entries[name].shape:
            return False
        try:
            base_values(read(name), _renamed(base, name, found))
        except BaseMismatch:
            return False
        return True

    if not entries or (prefix is None and any(name in base for name in entries)):
        return Renaming()  # what is missing is reported as such
    return match_names(entries, base, file.path, fits=fits, prefix=prefix)


def _renamed(base: Checkpoint, name: str, found: str) -> Checkpoint:
    return base if name == found else RenamedCheckpoint(base, {name: found})
