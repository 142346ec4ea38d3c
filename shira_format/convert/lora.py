"""From a LoRA and its base to an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, array_digest, sum_of_squares
from shira_format._core.dtypes import dtype_name, is_float, working_dtype
from shira_format._core.threads import Progress
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.quantised import quantised_named, refuse_quantised
from shira_format.checkpoints.renamed import rearranged
from shira_format.convert.effect import Effect
from shira_format.convert.inputs import ConversionInputs, DenseCopy, DenseSum
from shira_format.convert.pipeline import convert, location, selection_rule
from shira_format.convert.report import ConversionReport
from shira_format.convert.unused import check_all_used, opened_files
from shira_format.entries.changes import UpdateChange
from shira_format.errors import SourceError
from shira_format.lora import Lora, open_lora
from shira_format.lora.base import Update
from shira_format.names.filters import NOT_CHOSEN, name_filter
from shira_format.storage.paths import digest_of, hub_identity, resolve_path, same_files
from shira_format.tensors import DenseTensor, SparseTensor


@dataclass(frozen=True)
class LoraConversion:
    """From a LoRA and its base."""

    lora: str
    base: str
    dialect: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    prefix: str | None = None
    allow_unused: bool = False
    rank: int | None = None
    alpha: float | None = None

    def open(self, base: Checkpoint | None = None) -> ConversionInputs:
        """Open the LoRA, and the base if it is not open yet."""
        with same_files():
            return self._open(base)

    def _open(self, base: Checkpoint | None) -> ConversionInputs:
        base = open_checkpoint(self.base) if base is None else base
        with quantised_named(base):
            lora = open_lora(
                self.lora, base, dialect=self.dialect, prefix=self.prefix, rank=self.rank, alpha=self.alpha
            )
            lora = filtered(lora, self.include, self.exclude)
        notices = check_all_used(
            resolve_path(self.lora), [*lora.files, *base.files], opened_files(lora.files), allow=self.allow_unused
        )
        return lora_inputs(replace(lora, notices=notices + lora.notices), base, hub_identity(self.base))


def lora_inputs(source: Lora, base: Checkpoint, base_model: dict[str, Any] | None = None) -> ConversionInputs:
    """The inputs of a conversion from an open LoRA; call it in the block of :func:`same_files` in which that was read.

    Args:
        source: the LoRA.
        base: the checkpoint that it adapts.
        base_model: ``id`` and ``revision`` of the base, if they are known; they take precedence over those in ``source``.

    Raises:
        SourceError: a tensor is updated twice, or an updated tensor of the base is quantised or not of a float dtype.
    """
    view = rearranged(base, source.copies, source.removed) if source.copies or source.removed else base
    refuse_quantised(view, [*(update.name for update in source.updates), *source.whole, *source.additions])
    _check_base(source.updates, view)
    renamed = _untouched(source)
    files = [{"name": path.name, "digest": digest_of(path)} for path in source.files]
    return ConversionInputs(
        base=base,
        changes=[UpdateChange(update, view) for update in source.updates],
        dense=lambda self_contained: _dense_tensors(source, base, view, self_contained=self_contained),
        options=lambda change: {"base_name": source.copies.get(change.name)},
        removed=source.removed,
        renamed=[
            _renamed(name, base_name, base)
            for name, base_name in renamed.items()
            if is_float(base.dtype(base_name))
        ],
        structure={name: f"from {base_name}" for name, base_name in source.copies.items()}
        | dict.fromkeys(source.removed, "removed"),
        left_out=source.left_out,
        base_model=source.base_model | (base_model or {}),
        source=source.source | {"files": files},
        files=[*base.files, *source.files],
        source_file=source.files[0] if source.files else None,
        notices=[*base.notices, *source.notices],
    )


def lora_to_shira(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    *,
    density: float | None = None,
    top_k: int | None = None,
    energy: float | None = None,
    min_change: float | None = None,
    scope: str = "tensor",
    dialect: str | None = None,
    prefix: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unused: bool = False,
    self_contained: bool = False,
    compact: bool = False,
    threads: int | None = None,
    resume: bool = False,
    dask: str | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
    on_start: Progress = lambda _: None,
) -> ConversionReport:
    """Convert a LoRA into a sparse adapter: the largest entries of its update, as exact values of the tuned weights.

    Memory stays at about one tensor of the base. The same input gives the same bytes, for any number of threads.

    Args:
        lora: a LoRA file or folder; see :mod:`shira_format.lora` for the dialects.
        base: the checkpoint that it adapts: a path or an open checkpoint.
        out: the adapter file to write, replacing what is there; None for a dry run.
        density: share of the entries to keep, in (0, 1]; 0.01 by default. Give at most one of ``density``, ``top_k`` and ``energy``.
        top_k: number of entries to keep: of each tensor, or of all tensors with the global scope.
        energy: keep the fewest entries that hold this share, in (0, 1], of the update's energy (the sum of squares).
        min_change: leave out changes of a smaller magnitude; given alone, all others are kept.
        scope: ``"tensor"`` for the largest entries of each tensor, ``"global"`` for the largest of all tensors.
        dialect: of the LoRA; detected from its files by default.
        prefix: what the base's names of the adapted weights start with, if several are possible.
        rank: of PEFT's weights without ``adapter_config.json``; all others state their own.
        alpha: likewise; the scale is ``alpha / rank``.
        include: regexes; a tensor is converted only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        allow_unused: convert a source although it has weights that are not used, such as other weight files in its folder.
        self_contained: store the base's values too, so that the adapter can be undone, scaled and measured without the base.
        compact: take as few bytes as possible: what a reader finds in the base is not stored. Such a file is read with its base, or,
            with ``self_contained``, without.
        threads: at most this many; all cores by default.
        resume: keep finished tensors in ``OUT.partial`` until all are done, and start from those that are there.
        dask: address of a ``dask.distributed`` scheduler whose workers compute; needs ``base`` as a path.
        force: write the adapter even if it changes the base by less than a thousandth of what was selected of the update (in norm),
            as a whole or in some tensors.
        progress: called with the number of elements done since the last call.
        on_start: called once with the sum of all calls of ``progress``.

    Raises:
        ValueError: arguments that exclude each other, or are out of range.
        SourceError: an input that cannot be converted exactly; nothing is written.
        FormatError: a safetensors file is damaged.
        WorkError: the cluster fails, or the parts in ``OUT.partial`` are of another conversion.
    """
    rule = selection_rule(density, top_k, energy, min_change, scope)
    conversion = LoraConversion(
        os.fspath(lora),
        location(base, dask),
        dialect,
        tuple(include),
        tuple(exclude),
        prefix,
        allow_unused,
        rank,
        alpha,
    )
    inputs = conversion.open(base if isinstance(base, Checkpoint) else None)
    return convert(
        conversion, out, rule=rule, inputs=inputs, self_contained=self_contained, compact=compact, threads=threads,
        resume=resume,
        dask=dask, force=force, progress=progress, on_start=on_start,
    )  # fmt: skip


def filtered(source: Lora, include: Sequence[str], exclude: Sequence[str]) -> Lora:
    """The part of ``source`` whose tensor names match.

    Raises:
        SourceError: a bad regex, or nothing is left.
    """
    if not include and not exclude and (source.updates or source.whole or source.additions):
        return source
    match = name_filter(include, exclude)
    updates = [update for update in source.updates if match(update.name)]
    whole = {name: array for name, array in source.whole.items() if match(name)}
    additions = {name: array for name, array in source.additions.items() if match(name)}
    # A LoRA has updates; adapters of norms or biases alone have none, and are whole.
    if not updates and (source.updates or not (whole or additions)):
        raise SourceError(f"no adapted weight is left by --include {list(include)} --exclude {list(exclude)}")
    names = [*(update.name for update in source.updates), *source.whole, *source.additions]
    left_out = [name for name in names if not match(name)]
    return Lora(
        updates=updates,
        whole=whole,
        additions=additions,
        copies=source.copies, removed=source.removed,
        source=source.source, base_model=source.base_model, files=source.files, notices=source.notices,
        left_out=source.left_out | ({NOT_CHOSEN: left_out} if left_out else {}),
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
    """Names of tensors that are the base's under another name, and otherwise unchanged; the base's name by the new one."""
    changed = {update.name for update in source.updates} | source.whole.keys() | source.additions.keys()
    return {name: base_name for name, base_name in source.copies.items() if name not in changed}


def _renamed(name: str, base_name: str, base: Checkpoint) -> SparseTensor:
    """The base's tensor under another name: a sparse tensor without entries."""
    nothing = np.empty(0, base.dtype(base_name))
    return SparseTensor(
        name,
        base.shape(base_name),
        np.empty(0, np.int64),
        nothing,
        base_name=base_name,
        base_digest=array_digest(nothing),
    )


def _dense_tensors(
    source: Lora, base: Checkpoint, view: Checkpoint, *, self_contained: bool
) -> Iterator[DenseTensor | DenseCopy | DenseSum]:
    if twice := source.whole.keys() & source.additions.keys():
        raise SourceError(f"tensor {min(twice)!r} is both replaced and added to")
    for name, array in source.whole.items():
        yield _dense(name, array, base, view, self_contained=self_contained)
    for name, addition in source.additions.items():
        weight = view[name]
        work = working_dtype(weight.dtype)
        wide, step = weight.astype(work), addition.astype(work)
        tensor = _dense(name, wide + step, base, view, self_contained=self_contained)
        moved = tensor.values.astype(work) - wide
        yield DenseSum(tensor, Effect(name, sum_of_squares(step), sum_of_squares(moved)))
    for name, base_name in _untouched(source).items():
        if not is_float(base.dtype(base_name)):
            same = name in base and (base.shape(name), base.dtype(name)) == (
                base.shape(base_name),
                base.dtype(base_name),
            )
            yield DenseCopy(name, base, base_name, base if same else None)


def _dense(name: str, array: Array, base: Checkpoint, view: Checkpoint, *, self_contained: bool) -> DenseTensor:
    """A replacement, in the dtype that the tensor has in ``view`` if it is there."""
    if name not in view:
        return DenseTensor(name, array)
    dtype = view.dtype(name)
    if not is_float(dtype):
        raise SourceError(f"tensor {name!r} is of dtype {dtype} in the base, not a float dtype")
    with np.errstate(over="ignore"):
        values = array.astype(dtype)
    if not np.isfinite(values.astype(working_dtype(dtype))).all():
        raise SourceError(f"tensor {name!r} does not fit the base's dtype {dtype_name(dtype)}, or holds NaN")
    # The base's tensor of this name, which may be another layer's, is replaced.
    weight = base.get(name)
    if weight is None or (weight.shape, weight.dtype) != (values.shape, values.dtype):
        return DenseTensor(name, values)
    return DenseTensor(name, values, base=weight if self_contained else None, base_digest=array_digest(weight))
