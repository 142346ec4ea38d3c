"""A page on adapter files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shira_analysis.measures.deltas import DeltaFile
from shira_analysis.reports.html.adapter_facts import read_facts
from shira_analysis.reports.html.adapters import adapters_page
from shira_analysis.reports.inspection import inspect_files
from shira_format.calibration.moments import Moments
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.format import AdapterFile
from shira_format.names.filters import name_filter

# Tensors that are measured: more take longer than anyone waits for a page.
MOST_MEASURED = 20_000


def report(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | Checkpoint | None = None,
    moments: str | os.PathLike[str] | Moments | None = None,
    *,
    infos: Sequence[dict[str, Any]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int], object] = lambda _: None,
    on_start: Callable[[int], object] = lambda _: None,
) -> str:
    """An HTML page on adapter files and on how each two of them interfere, as text.

    Of more than :data:`MOST_MEASURED` tensors a sample is measured, and the page says so.

    Args:
        adapters: one file or several.
        base: the checkpoint that they were made for.
        moments: second moments of the layers' inputs, to measure the interference of two adapters on them.
        infos: what :func:`shira_analysis.reports.inspection.inspect_files` returned for these files, if it was called
            already, with the same ``include`` and ``exclude``.
        include: regexes; a tensor is in the report only if one of them is found in its name.
        exclude: regexes; a tensor is not in the report if one of them is found in its name.
        progress: called with the number of tensors that were read since the last call.
        on_start: called with what all calls of ``progress`` will add up to.

    Raises:
        FormatError: a file is no adapter, or is damaged.
        SourceError: an invalid regex, or the moments are of none of the adapted weights.
        OSError: a file cannot be read.
    """
    if base is not None:
        base = open_checkpoint(base)
    if infos is None:
        paths = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
        infos = inspect_files(paths, base=base, include=include, exclude=exclude)
    if moments is not None and not isinstance(moments, Moments):
        moments = Moments.read(Path(moments))
    keep = name_filter(include, exclude)
    sample = _sample(infos)
    listed = [tuple(row["name"] for row in info["tensors"] if row["name"] in sample) for info in infos]
    on_start(sum(map(len, listed)) + (len(set().union(*listed)) if len(infos) > 1 else 0))
    facts = []
    for info, names in zip(infos, listed, strict=True):
        file = AdapterFile(info["file"])
        fitting = base if "base" in info and info["base"]["fits"] else None
        whole = tuple(name for name in file.manifest.whole if keep(name))
        facts.append(read_facts(DeltaFile(file, fitting, names, whole), info, progress))
    return adapters_page(facts, moments, progress=lambda _: progress(1))


def _sample(infos: Sequence[dict[str, Any]]) -> set[str]:
    """The tensors to measure, the same in all files: every n-th by the number of entries, from the largest on."""
    entries: dict[str, int] = {}
    for row in (row for info in infos for row in info["tensors"]):
        entries[row["name"]] = max(row["nnz"], entries.get(row["name"], 0))
    step = max(1, -(-len(entries) // MOST_MEASURED))
    return set(sorted(entries, key=lambda name: -entries[name])[::step])
