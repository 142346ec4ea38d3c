"""From a full fine-tune and its base to an adapter or an exact patch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.arrays import Array
from shira_format._core.dtypes import dtype_name, round_to
from shira_format._core.threads import Progress
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.peft_model import refuse_unmerged
from shira_format.checkpoints.quantised import refuse_quantised
from shira_format.checkpoints.wrapped import unwrapped
from shira_format.convert.exact import Exact
from shira_format.convert.inputs import ConversionInputs, DenseCopy
from shira_format.convert.pairing import Pairs, pair
from shira_format.convert.pipeline import convert, location, selection_rule
from shira_format.convert.report import ConversionReport
from shira_format.convert.unused import check_all_used
from shira_format.entries.changes import Change, CheckpointChange
from shira_format.errors import SourceError
from shira_format.names.filters import NOT_CHOSEN, name_filter
from shira_format.selection import TopK
from shira_format.storage.paths import hub_identity, resolve_path
from shira_format.tensors import numel


@dataclass(frozen=True)
class FullConversion:
    """From a fine-tune and its base."""

    tuned: str
    base: str
    exact: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_unused: bool = False

    def open(self, base: Checkpoint | None = None) -> ConversionInputs:
        """Open the fine-tune, and the base if it is not open yet, and pair their tensors."""
        base = open_checkpoint(self.base) if base is None else base
        tuned = open_checkpoint(self.tuned, wrapped=self.exact)  # exact restores its very names
        unused = check_all_used(
            resolve_path(self.tuned), [*tuned.files, *base.files], [tuned], allow=self.allow_unused
        )
        refuse_unmerged(tuned, base)
        refuse_unmerged(base, tuned)
        if not self.exact:
            tuned = unwrapped(tuned, base)
        chosen = name_filter(self.include, self.exclude)
        for checkpoint in () if self.exact else (base, tuned):
            refuse_quantised(checkpoint, filter(chosen, checkpoint))
        pairs = pair(base, tuned, chosen, exact=self.exact)
        if unchosen := [name for name in tuned if not chosen(name)]:
            pairs.left_out[NOT_CHOSEN] = unchosen
        view = pairs.tuned  # under the base's names, where it holds the same tensors in another form

        def copy(name: str, tuned_name: str) -> DenseCopy:
            kind = view.dtype(tuned_name), view.shape(tuned_name)
            replaces = name in base and (base.dtype(name), base.shape(name)) == kind
            return DenseCopy(name, view, tuned_name, base if replaces else None)

        return ConversionInputs(
            base=base,
            changes=pairs.sparse,
            dense=lambda _: (copy(name, tuned_name) for name, tuned_name in pairs.whole.items()),
            copy=lambda change: copy(change.name, change.name),  # exact: names are those of the fine-tune
            options=_options,
            removed=pairs.removed,
            structure=pairs.structure,
            unchanged=len(pairs.equal),
            left_out=pairs.left_out,
            base_model=hub_identity(self.base),
            source={"kind": "full"} | hub_identity(self.tuned),
            files=[*base.files, *tuned.files],
            source_file=tuned.files[0] if tuned.files else None,
            notices=_notices(pairs, unused),
        )


def full_to_shira(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str] | None,
    *,
    density: float | None = None,
    top_k: int | None = None,
    energy: float | None = None,
    min_change: float | None = None,
    scope: str = "tensor",
    exact: bool = False,
    digests: bool = True,
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
    """Convert the difference between a fine-tune and its base into an adapter, or into an exact patch.

    Memory stays at what is kept of one tensor, whatever the size of the checkpoints. The same input gives the same bytes,
    for any number of threads or workers.

    Args:
        tuned: the fine-tuned checkpoint; see :func:`shira_format.checkpoints.open_checkpoint` for the layouts.
        base: the checkpoint that it was tuned from, in the same layout or another: a path or an open checkpoint.
        out: the adapter file to write, replacing what is there; None for a dry run.
        density: see :func:`shira_format.convert.lora.lora_to_shira`, also for the arguments that are not listed here.
        top_k: likewise.
        energy: likewise.
        min_change: likewise.
        scope: likewise.
        exact: keep every entry whose bits differ, so that :func:`shira_format.export.full.shira_to_full` restores ``tuned`` bit
            for bit; without any of the five arguments above.
        digests: with ``exact``: record the digest of each whole tensor of the result, which detects a base that differs
            anywhere; reads ``tuned`` once more.
        include: regexes; a tensor is compared only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        allow_unused: likewise, of ``tuned``.
        self_contained: likewise.
        compact: likewise.
        threads: likewise.
        resume: likewise.
        dask: likewise.
        force: likewise.
        progress: likewise.
        on_start: likewise.

    Raises:
        ValueError: arguments that exclude each other, or are out of range.
        SourceError: an input that cannot be converted; nothing is written.
        FormatError: a safetensors file is damaged.
        WorkError: the cluster fails, or the parts in ``OUT.partial`` are of another conversion.
    """
    rule = _rule(density, top_k, energy, min_change, scope, exact=exact, digests=digests)
    conversion = FullConversion(
        os.fspath(tuned),
        location(base, dask),
        exact,
        include=tuple(include),
        exclude=tuple(exclude),
        allow_unused=allow_unused,
    )
    inputs = conversion.open(base if isinstance(base, Checkpoint) else None)
    return convert(
        conversion, out, rule=rule, inputs=inputs, self_contained=self_contained, compact=compact, threads=threads,
        resume=resume,
        dask=dask, force=force, progress=progress, on_start=on_start,
    )  # fmt: skip


def _rule(
    density: float | None, top_k: int | None, energy: float | None, min_change: float | None, scope: str, *,
    exact: bool, digests: bool,
) -> TopK | Exact:  # fmt: skip
    if not exact:
        if not digests:
            raise ValueError("only an exact patch has digests to leave out")
        return selection_rule(density, top_k, energy, min_change, scope)
    given = {"density": density, "top-k": top_k, "energy": energy, "min-change": min_change}
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"an exact patch keeps every difference: {option} has no meaning with it")
    if scope != "tensor":
        raise ValueError("an exact patch keeps every difference: scope has no meaning with it")
    return Exact(digests)


def _options(change: Change) -> dict[str, Any]:
    """What a pair of tensors has beyond its entries: another name in the base, more rows or fewer."""
    assert isinstance(change, CheckpointChange)
    before, after = change.shape, change.tuned.shape(change.tuned_name)
    options: dict[str, Any] = {"base_name": change.base_name}
    if before == after:
        return options
    options["rows"] = after[0]
    if after[0] > before[0]:
        part = change.tuned.part(change.tuned_name, numel(before), numel(after))
        options["new_rows"] = _in_dtype(part, change).reshape(after[0] - before[0], *before[1:])
    return options


def _in_dtype(part: Array, change: Change) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        found = round_to(part, change.weight_dtype)
        lost = np.isfinite(part.astype(change.dtype)) & ~np.isfinite(found.astype(change.dtype))
    if lost.any():
        raise SourceError(f"tensor {change.name!r}: a new row overflows {dtype_name(change.weight_dtype)}")
    return found


def _notices(pairs: Pairs, unused: list[str]) -> list[str]:
    base, tuned = pairs.base, pairs.tuned
    found = [*dict.fromkeys([*base.notices, *tuned.notices, *unused]), *pairs.notices]
    mixed = [p.name for p in pairs.sparse if p.weight_dtype != tuned.dtype(p.tuned_name)]
    if mixed:
        found.append(
            f"{len(mixed)} tensors have another dtype in the fine-tune, {mixed[0]!r} for example: they are rounded to the base's"
        )
    return found
