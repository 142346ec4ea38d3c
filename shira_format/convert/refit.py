"""From adapters to one adapter of fewer entries: the source is what the adapters together make of their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices
from shira_format._core.dtypes import round_to, working_dtype
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.convert.inputs import ConversionInputs
from shira_format.entries.aligned import AlignedEntries, Contribution
from shira_format.entries.base_check import base_values, dense_with_base
from shira_format.entries.changes import Tile
from shira_format.entries.mixing import mix_values
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import AdapterFile
from shira_format.names.filters import NOT_CHOSEN, name_filter
from shira_format.storage.paths import hub_identity, resolve_path
from shira_format.tensors import DenseTensor, numel, same_bits


@dataclass(frozen=True)
class EntriesChange:
    """A change of some entries of one weight; see :class:`shira_format.entries.changes.Change`.

    Attributes:
        name: of the weight in ``base``.
        base: the checkpoint.
        indices: ``[n]``, flat, strictly increasing.
        before: ``[n]``, the base's values there.
        after: ``[n]``, the new values, in the same dtype.
    """

    name: str
    base: Checkpoint
    indices: Indices = field(repr=False)
    before: Array = field(repr=False)
    after: Array = field(repr=False)
    grain: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape(self.name)

    @property
    def weight_dtype(self) -> np.dtype[Any]:
        return self.before.dtype

    @property
    def dtype(self) -> np.dtype[Any]:
        return working_dtype(self.weight_dtype)

    @property
    def size(self) -> int:
        return numel(self.shape)

    def tile(self, start: int, stop: int, out: Array) -> Tile:
        first, last = np.searchsorted(self.indices, [start, stop])
        before, after = self.before[first:last], self.after[first:last]
        out = out[: last - first]
        out[...] = after
        out -= before.astype(self.dtype)
        return Tile(out, self.indices[first:last] - start, lambda found: (before[found], after[found]))

    def completed(self, indices: Indices, values: Array) -> tuple[Array, Array]:
        before = self.base.at(self.name, indices)
        return before, round_to(before.astype(self.dtype) + values, before.dtype)


@dataclass(frozen=True)
class AdapterConversion:
    """From adapters and their base.

    Attributes:
        adapters: paths of adapter files.
        base: the path of their base.
        strengths: of each adapter, beside its own alpha; empty: 1.
        include: regexes; a tensor is taken only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
    """

    adapters: tuple[str, ...]
    base: str
    strengths: tuple[float, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def alone(self) -> list[AdapterConversion]:
        """Each adapter by itself, at its strength."""
        strengths = self.strengths or (1.0,) * len(self.adapters)
        return [
            replace(self, adapters=(path,), strengths=(strength,))
            for path, strength in zip(self.adapters, strengths, strict=True)
        ]

    def open(self, base: Checkpoint | None = None) -> ConversionInputs:
        """Open the adapters, and the base if it is not open yet, and check that they are of it.

        Raises:
            ValueError: not one strength for each adapter.
            SourceError: no adapter, one that live weights cannot take, or two that replace a tensor differently.
            BaseMismatch: an adapter is of another base.
            FormatError: a file is damaged.
        """
        if self.strengths and len(self.strengths) != len(self.adapters):
            raise ValueError(f"{len(self.strengths)} strengths for {len(self.adapters)} adapters")
        if not self.adapters:
            raise SourceError("there is no adapter")
        base = open_checkpoint(self.base) if base is None else base
        files = [AdapterFile(resolve_path(path), base=base) for path in self.adapters]
        opened = [file.adapter() for file in files]
        strengths = [
            strength * adapter.alpha
            for strength, adapter in zip(self.strengths or [1.0] * len(files), opened, strict=True)
        ]
        chosen = name_filter(self.include, self.exclude)
        names = list(dict.fromkeys(name for adapter in opened for name in adapter))
        labels = [str(file.path) for file in files]
        changes = [_change(name, opened, strengths, labels, base) for name in names if chosen(name)]
        dense = _dense(opened, labels, base)
        left_out = [name for name in (*names, *dense) if not chosen(name)]
        kept = [tensor for name, tensor in dense.items() if chosen(name)]
        if not changes and not kept:
            raise SourceError(f"{labels[0]}: no tensor is left by the choice of names")
        sources = [{"name": file.path.name, "digest": file.streams.digest()} for file in files]
        source: dict[str, Any] = {"kind": "adapter" if len(files) == 1 else "adapters", "files": sources}
        if any(strength != 1 for strength in strengths):
            source["strengths"] = strengths
        known = opened[0].manifest.get("base_model", {})
        identity = {key: known[key] for key in ("id", "revision") if key in known}
        return ConversionInputs(
            base=base,
            changes=changes,
            dense=lambda self_contained: map(partial(_dense_tensor, self_contained=self_contained), kept),
            left_out={NOT_CHOSEN: left_out} if left_out else {},
            base_model=identity | hub_identity(self.base),
            source=source,
            files=[*base.files, *(file.path for file in files)],
            source_file=files[0].path,
            notices=list(base.notices),
        )


def _change(
    name: str, adapters: Sequence[Adapter], strengths: Sequence[float], labels: Sequence[str], base: Checkpoint
) -> EntriesChange:
    parts = []
    for adapter, strength, label in zip(adapters, strengths, labels, strict=True):
        if name not in adapter:
            continue
        tensor = adapter[name]
        if tensor.value_kind == "none":
            raise SourceError(f"{label}: tensor {name!r} is a mask, without values")
        if tensor.is_patch:
            raise SourceError(
                f"{label}: tensor {name!r} renames or resizes a tensor of the base: such a patch cannot be fitted"
            )
        try:
            base_values(tensor, base)
        except BaseMismatch as error:
            raise BaseMismatch(f"{label}: {error}") from None
        parts.append(Contribution(tensor, strength, label))
    aligned = AlignedEntries.of(parts)
    before = base.at(name, aligned.indices)
    after, _ = mix_values(aligned, before)
    return EntriesChange(name, base, aligned.indices, before, after)


def _dense(adapters: Sequence[Adapter], labels: Sequence[str], base: Checkpoint) -> dict[str, DenseTensor]:
    """The tensors that are replaced whole.

    Raises:
        SourceError: two adapters replace one differently, or one replaces what another changes.
    """
    found: dict[str, DenseTensor] = {}
    for adapter, label in zip(adapters, labels, strict=True):
        for name in adapter.dense:
            tensor = dense_with_base(adapter.dense[name], base)
            if any(name in other for other in adapters):
                raise SourceError(
                    f"{label}: tensor {name!r}: one adapter changes entries of it, another one replaces it"
                )
            if name in found and not same_bits(found[name].values, tensor.values):
                raise SourceError(f"{label}: tensor {name!r}: another adapter replaces it by other values")
            found[name] = tensor
    return found


def _dense_tensor(tensor: DenseTensor, *, self_contained: bool) -> DenseTensor:
    """``tensor``, with the base's tensor or its digest."""
    if self_contained or tensor.base is None:
        return tensor
    return DenseTensor(tensor.name, tensor.values, base_digest=tensor.base_digest)
