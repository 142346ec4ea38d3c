"""LoRAs: low-rank updates of a base."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, digest, file_digest
from shira_format._core.dtypes import dtype_name, is_float, working_dtype
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.renamed import rearranged
from shira_format.convert.jobs import ConversionInputs, DenseCopy, identified
from shira_format.convert.pipeline import convert
from shira_format.convert.report import ConversionReport
from shira_format.entries.changes import AddedTo
from shira_format.errors import SourceError
from shira_format.lora import Lora, open_lora
from shira_format.lora.base import Update
from shira_format.names.filters import name_filter
from shira_format.selection import Progress, TopK
from shira_format.tensors import DenseTensor, SparseTensor


@dataclass(frozen=True)
class LoraJob:
    """From a LoRA and its base."""

    lora: str
    base: str
    dialect: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def open(self) -> ConversionInputs:
        base = open_checkpoint(self.base)
        return lora_inputs(
            filtered(open_lora(self.lora, base, dialect=self.dialect), self.include, self.exclude),
            base,
            identified(self.base),
        )


def lora_inputs(source: Lora, base: Checkpoint, base_model: dict[str, Any] | None = None) -> ConversionInputs:
    """A LoRA that is open already, as the pipeline takes it."""
    view = rearranged(base, source.copies, source.removed)
    _check_base(source.updates, view)
    files = [{"name": path.name, "digest": file_digest(path)} for path in source.files]
    return ConversionInputs(
        base=base,
        changes=[AddedTo(update, view) for update in source.updates],
        wholes=lambda self_contained: _whole_tensors(source, base, view, self_contained),
        frame=lambda change: {"base_name": source.copies.get(change.name)},
        removed=source.removed,
        copies=[
            _copy(name, origin, base)
            for name, origin in _untouched(source).items()
            if is_float(base.dtype(origin))
        ],
        structure={name: f"from {origin}" for name, origin in source.copies.items()}
        | dict.fromkeys(source.removed, "removed"),
        base_model=source.base_model | (base_model or {}),
        source=source.source | {"files": files},
        files=[*base.files, *source.files],
        blamed=source.files,
        notices=[*base.notices, *source.notices],
    )


def lora_to_shira(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    rule: TopK | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    self_contained: bool = False,
    dialect: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    dask: str | None = None,
    progress: Progress = lambda _: None,
) -> ConversionReport:
    """Convert a LoRA into an adapter of target values, exact top-k by magnitude of the update.

    Memory stays at about one tensor of the base. The same input gives the same bytes, whatever ``threads`` is.

    Args:
        lora: a LoRA file or folder; see :mod:`shira_format.lora` for the dialects.
        base: the checkpoint that it adapts.
        out: the adapter file to write, or None to compute the report only.
        rule: what to keep; the largest 1 % of each tensor by default.
        include: regexes; a tensor is converted only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        self_contained: store the base's values too, so that the file can be undone, scaled and measured alone.
        dialect: of the LoRA; recognised by default.
        threads: at most this many.
        resume: keep finished tensors beside ``out`` until all is done, and go on from those that are there.
        dask: address of a scheduler of ``dask.distributed`` whose workers do the work.
        progress: called with numbers of elements done; all passes together make ``passes(rule)`` times the elements.

    Raises:
        SourceError: an input that cannot be converted exactly; nothing is written.
        FormatError: a safetensors file is damaged.
    """
    job = LoraJob(os.fspath(lora), os.fspath(base), dialect, tuple(include), tuple(exclude))
    return convert(
        job, out, rule=rule or TopK(), self_contained=self_contained, threads=threads, resume=resume, dask=dask,
        progress=progress,
    )  # fmt: skip


def filtered(source: Lora, include: Sequence[str], exclude: Sequence[str]) -> Lora:
    """The part of ``source`` whose tensor names match.

    Raises:
        SourceError: a bad regex, or no update is left.
    """
    match = name_filter(include, exclude)
    updates = [update for update in source.updates if match(update.name)]
    if not updates:
        raise SourceError(f"no adapted weight is left by --include {list(include)} --exclude {list(exclude)}")
    return Lora(
        updates=updates,
        whole={name: array for name, array in source.whole.items() if match(name)},
        additions={name: array for name, array in source.additions.items() if match(name)},
        copies=source.copies, removed=source.removed,
        source=source.source, base_model=source.base_model, files=source.files, notices=source.notices,
    )  # fmt: skip


def _check_base(updates: Iterable[Update], base: Checkpoint) -> None:
    names = set()
    for update in updates:
        if update.name in names:
            raise SourceError(f"two updates of tensor {update.name!r}")
        names.add(update.name)
        if not is_float(base.dtype(update.name)):
            raise SourceError(
                f"{base.path}: tensor {update.name!r} is of dtype {base.dtype(update.name)}, not a float dtype "
                "(a quantised base cannot take exact targets)"
            )


def _untouched(source: Lora) -> dict[str, str]:
    """What the result has under another name than the base, and else unchanged."""
    changed = {update.name for update in source.updates} | source.whole.keys() | source.additions.keys()
    return {name: origin for name, origin in source.copies.items() if name not in changed}


def _copy(name: str, origin: str, base: Checkpoint) -> SparseTensor:
    """The base's tensor, under another name, without an entry."""
    nothing = np.empty(0, base.dtype(origin))
    return SparseTensor(
        name, base.shape(origin), np.empty(0, np.int64), nothing, base_name=origin, base_digest=digest(nothing)
    )


def _whole_tensors(
    source: Lora, base: Checkpoint, view: Checkpoint, self_contained: bool
) -> Iterator[DenseTensor | DenseCopy]:
    if twice := source.whole.keys() & source.additions.keys():
        raise SourceError(f"tensor {min(twice)!r} is both replaced and added to")
    for name, array in source.whole.items():
        yield _whole(name, array, base, view, self_contained)
    for name, addition in source.additions.items():
        weight = view[name]
        work = working_dtype(weight.dtype)
        yield _whole(name, weight.astype(work) + addition.astype(work), base, view, self_contained)
    for name, origin in _untouched(source).items():
        if not is_float(base.dtype(origin)):
            same = name in base and (base.shape(name), base.dtype(name)) == (
                base.shape(origin),
                base.dtype(origin),
            )
            yield DenseCopy(name, base, origin, base if same else None)


def _whole(name: str, array: Array, base: Checkpoint, view: Checkpoint, self_contained: bool) -> DenseTensor:
    """A replacement in the dtype that the tensor has in ``view``, if it is there and of floats."""
    if name not in view:
        return DenseTensor(name, array)
    dtype = view.dtype(name)
    if not is_float(dtype):
        raise SourceError(f"tensor {name!r} is of dtype {dtype} in the base, not a float dtype")
    with np.errstate(over="ignore"):
        values = array.astype(dtype)
    if not np.isfinite(values.astype(working_dtype(dtype))).all():
        raise SourceError(f"tensor {name!r} does not fit the base's dtype {dtype_name(dtype)}, or holds NaN")
    # What the base has under this name, which may be another layer's: it is replaced.
    weight = base.get(name)
    if weight is None or (weight.shape, weight.dtype) != (values.shape, values.dtype):
        return DenseTensor(name, values)
    return DenseTensor(name, values, base=weight if self_contained else None, base_digest=digest(weight))
