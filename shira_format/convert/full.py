"""Full fine-tunes: what lies between two checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import dtype_name
from shira_format._core.rounding import round_to
from shira_format.checkpoints import open_checkpoint
from shira_format.convert.exact import Exact
from shira_format.convert.jobs import ConversionInputs, DenseCopy, identified
from shira_format.convert.pairing import Pairs, pair
from shira_format.convert.pipeline import convert
from shira_format.convert.report import ConversionReport
from shira_format.entries.changes import Change, CheckpointChange
from shira_format.errors import SourceError
from shira_format.names.filters import name_filter
from shira_format.selection import Progress, TopK
from shira_format.tensors import DenseTensor, numel


@dataclass(frozen=True)
class FullJob:
    """From a base and a fine-tune of it."""

    base: str
    tuned: str
    exact: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def open(self) -> ConversionInputs:
        base, tuned = open_checkpoint(self.base), open_checkpoint(self.tuned)
        pairs = pair(base, tuned, name_filter(self.include, self.exclude), exact=self.exact)

        def copy(name: str, source: str) -> DenseCopy:
            kind = tuned.dtype(source), tuned.shape(source)
            same = name in base and (base.dtype(name), base.shape(name)) == kind
            return DenseCopy(name, tuned, source, base if same else None)

        def wholes(_self_contained: bool) -> Iterator[DenseTensor | DenseCopy]:
            return (copy(name, source) for name, source in pairs.whole.items())

        return ConversionInputs(
            base=base,
            changes=pairs.sparse,
            wholes=wholes,
            copy=lambda change: copy(change.name, change.name),  # exact: names are those of the fine-tune
            frame=_frame,
            removed=pairs.removed,
            structure=pairs.structure,
            unchanged=len(pairs.equal),
            base_model=identified(self.base),
            source={"kind": "full"} | identified(self.tuned),
            files=[*base.files, *tuned.files],
            blamed=tuned.files,
            notices=_notices(pairs),
        )


def full_to_shira(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    rule: TopK | Exact | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    self_contained: bool = False,
    threads: int | None = None,
    resume: bool = False,
    dask: str | None = None,
    progress: Progress = lambda _: None,
) -> ConversionReport:
    """Convert what lies between a base and a fine-tune of it into an adapter, or into an exact patch.

    Memory stays at what is kept of one tensor, whatever the size of the checkpoints. The same input gives the same bytes,
    on any number of threads or workers.

    Args:
        base: the checkpoint before; see :func:`shira_format.checkpoints.open_checkpoint` for what is read.
        tuned: the checkpoint after, in the same layout or another.
        out: the adapter file to write, or None to compute the report only.
        rule: the largest 1 % of each tensor's change by default; :class:`Exact` for all of it, so that
            :func:`shira_format.export.full.shira_to_full` gives ``tuned`` back bit for bit.
        include: regexes; a tensor is looked at only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        self_contained: store the base's values too, so that the file can be undone, scaled and measured alone.
        threads: at most this many.
        resume: keep finished tensors beside ``out`` until all is done, and go on from those that are there.
        dask: address of a scheduler of ``dask.distributed`` whose workers do the work.
        progress: called with numbers of elements done; all passes together make ``passes(rule)`` times the elements.

    Raises:
        SourceError: an input that cannot be converted; nothing is written.
        FormatError: a safetensors file is damaged.
    """
    job = FullJob(os.fspath(base), os.fspath(tuned), isinstance(rule, Exact), tuple(include), tuple(exclude))
    return convert(
        job, out, rule=rule or TopK(), self_contained=self_contained, threads=threads, resume=resume, dask=dask,
        progress=progress,
    )  # fmt: skip


def _frame(change: Change) -> dict[str, Any]:
    """What a pair of tensors says beyond its entries: another name in the base, more rows or fewer."""
    assert isinstance(change, CheckpointChange)
    before, after = change.shape, change.tuned.shape(change.tuned_name)
    frame: dict[str, Any] = {"base_name": change.base_name}
    if before == after:
        return frame
    frame["rows"] = after[0]
    if after[0] > before[0]:
        part = change.tuned.part(change.tuned_name, numel(before), numel(after))
        frame["new_rows"] = _in_dtype(part, change).reshape(after[0] - before[0], *before[1:])
    return frame


def _in_dtype(part: Array, change: Change) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        found = round_to(part, change.weight_dtype)
        lost = np.isfinite(part.astype(change.dtype)) & ~np.isfinite(found.astype(change.dtype))
    if lost.any():
        raise SourceError(f"tensor {change.name!r}: a new row overflows {dtype_name(change.weight_dtype)}")
    return found


def _notices(pairs: Pairs) -> list[str]:
    base, tuned = pairs.base, pairs.tuned
    found = [*dict.fromkeys([*base.notices, *tuned.notices]), *pairs.notices]
    mixed = [p.name for p in pairs.sparse if p.weight_dtype != tuned.dtype(p.tuned_name)]
    if mixed:
        found.append(
            f"{len(mixed)} tensors have another dtype in the fine-tune, {mixed[0]!r} for example: they are rounded to the base's"
        )
    return found
