"""Merging, combining and comparing adapters: one call from files (or adapters in memory) to a file and a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shira_format._core.compiled import union
from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.format import AdapterWriter
from shira_format.merging import algebra
from shira_format.merging.inputs import NO_TENSOR, Base, Input, Source, open_base, open_input, read_files
from shira_format.merging.report import MergedTensor, MergeReport
from shira_format.merging.run import open_merge
from shira_format.names.filters import name_filter
from shira_format.storage.outputs import check_not_input
from shira_format.tensors import SparseTensor

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint

Out = str | os.PathLike[str] | None
Progress = Callable[[str], object]


def _no_progress(_: str) -> None:
    """The default of ``progress``."""


def merge(
    adapters: Sequence[Source],
    out: Out = None,
    *,
    method: str = "linear",
    base: Base = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    max_density: float | None = None,
    self_contained: bool | None = None,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = _no_progress,
) -> MergeReport:
    """Merge adapters of one base into one adapter file; one weight of each is in memory at a time, never a dense one.

    The same adapters and settings give the same bytes, on any number of threads.

    Args:
        adapters: adapters, or the paths of their files.
        out: the file to write, which appears complete or not at all, and replaces an existing one; None: report only.
        method: a key of :data:`shira_format.merging.METHODS`.
        base: the checkpoint that they were made for, a path or an open one, checked by digests; needed for targets without
            their base's values.
        weights: of the adapters, each multiplied by the adapter's alpha; 1 by default.
        options: of the method; ``density``, ``gamma`` and ``epsilon`` may be a sequence with one for each adapter.
        layers: pairs of a regex and the options (and ``"weights"``) of tensors whose names it matches.
        max_density: the greatest density of a tensor of the result, whose largest deltas are kept; not the density of a method,
            which is one of its ``options``.
        self_contained: keep the base's values in the result; by default, if all adapters have them.
        compact: take as few bytes as possible; with ``base``, a result that is not self-contained is read with its base.
        include: regexes; only tensors whose names match one are merged.
        exclude: regexes; tensors whose names match one are left out.
        threads: at most this many.
        progress: called with the name of each tensor that is done.

    Raises:
        SourceError: an unknown method, invalid options or weights; what the method refuses; ``out`` is an input.
        BaseRequired: the base's values are needed and not known.
        BaseMismatch: adapters of different bases, or not of ``base``; masks and patches.
        FormatError: a file is no adapter, or is damaged.
        OSError: a file cannot be read or written.

    Example:
        >>> merge(["a.st", "b.st"], "ab.st", method="ties", weights=[0.7, 0.3]).nnz
        2903
    """
    job = open_merge(
        adapters, method=method, weights=weights, options=options, layers=layers, base=base, max_density=max_density,
        self_contained=self_contained, compact=compact, include=include, exclude=exclude,
    )  # fmt: skip
    return job.write(out, threads=threads, progress=progress)


def subtract(
    first: Source,
    second: Source,
    out: Out,
    *,
    base: Base = None,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = _no_progress,
) -> MergeReport:
    """Write the adapter whose deltas are those of ``first`` minus those of ``second``.

    See :func:`shira_format.merging.algebra.subtract` for the rules and what is raised, and :func:`merge` for the arguments.
    """
    checkpoint = open_base(base)
    result = algebra.subtract(first, second, checkpoint)
    return _write(
        "subtract", [first, second], result, out, checkpoint, include, exclude, progress, compact=compact
    )


def compose(
    adapters: Sequence[Source],
    out: Out,
    *,
    base: Base = None,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = _no_progress,
) -> MergeReport:
    """Write one adapter that gives what two or more give applied one after the other.

    See :func:`shira_format.merging.algebra.compose` for the rules and what is raised, and :func:`merge` for the arguments.
    """
    if len(adapters) < 2:
        raise SourceError(f"compose takes 2 adapters or more, not {len(adapters)}")
    checkpoint = open_base(base)
    result = algebra.compose(*adapters, base=checkpoint)
    return _write("compose", adapters, result, out, checkpoint, include, exclude, progress, compact=compact)


def invert(
    adapter: Source,
    out: Out,
    *,
    base: Base = None,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = _no_progress,
) -> MergeReport:
    """Write the adapter that restores the base from the weights with ``adapter`` applied.

    See :func:`shira_format.merging.algebra.invert` for the rules and what is raised, and :func:`merge` for the arguments.
    """
    checkpoint = open_base(base)
    result = algebra.invert(adapter, checkpoint)
    return _write("invert", [adapter], result, out, checkpoint, include, exclude, progress, compact=compact)


def intersect(
    adapters: Sequence[Source],
    out: Out,
    *,
    base: Base = None,
    compact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = _no_progress,
) -> MergeReport:
    """Write the entries that all adapters have, with the values of the first; see :func:`merge`."""
    return merge(
        adapters, out, method="intersect", options={"priority": "first"}, base=base, compact=compact,
        include=include, exclude=exclude, progress=progress,
    )  # fmt: skip


def _write(
    method: str,
    sources: Sequence[Source],
    result: Adapter,
    out: Out,
    base: Checkpoint | None,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Progress,
    *,
    compact: bool,
) -> MergeReport:
    """Write the chosen tensors of ``result`` one by one, and report on them."""
    inputs = [open_input(source, base, number) for number, source in enumerate(sources, 1)]
    path = None if out is None else Path(out)
    if path is not None:
        check_not_input(path, read_files(inputs))
    chosen = name_filter(include, exclude)
    names = list(filter(chosen, dict.fromkeys([*(name for one in inputs for name in one.adapter), *result])))
    whole = [name for name in result.dense if chosen(name)]
    removed = [name for name in result.removed if chosen(name)]
    if not names and not whole and not removed:
        raise SourceError(NO_TENSOR)
    manifest = {key: value for key, value in result.manifest.items() if key != "removed"}
    report = MergeReport([one.label for one in inputs], method, whole=whole)
    if removed:
        manifest["removed"] = removed
        report.notices.append(
            f"removes {len(removed)} tensors that the adapter added (for example {removed[0]}): apply it with shira-convert "
            "shira_to_full; live models cannot remove tensors and refuse it"
        )
    with ExitStack() as stack:
        known = None if method == "invert" else base  # it is made for other weights
        writer = (
            None
            if path is None
            else stack.enter_context(AdapterWriter(path, manifest, compact=compact, base=known))
        )
        for name in names:
            tensor = result.get(name)
            if writer is not None and tensor is not None:
                writer.add(tensor)
            report.tensors.append(_row(name, inputs, tensor))
            progress(name)
        for name in whole:
            if writer is not None:
                writer.add_dense(result.dense[name])
            progress(name)
    if path is not None:
        report.file_bytes = path.stat().st_size
    return report


def _row(name: str, inputs: Sequence[Input], result: SparseTensor | None) -> MergedTensor:
    """The report on one tensor."""
    parts = [one.adapter.get(name) for one in inputs]
    known = result if result is not None else next(part for part in parts if part is not None)
    _, places = union([part.indices for part in parts if part is not None])
    counts = np.bincount(np.concatenate(places)) if places else np.empty(0, np.int64)
    nnz = 0 if result is None else result.nnz
    entries = tuple(0 if part is None else part.nnz for part in parts)
    return MergedTensor(name, known.shape, nnz, known.numel, entries, int(np.count_nonzero(counts > 1)))
