"""A look at adapter files: what they are, whether they are sound and fit a base, and a report for a browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_format.entries.inspection import inspect
from shira_format.format import AdapterFile
from shira_format.names.filters import name_filter

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint


def inspect_files(
    paths: Sequence[Path],
    *,
    base: Checkpoint | None = None,
    base_name: str | None = None,
    verify: bool = False,
    order: str = "file",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """What each file is, as plain JSON values.

    Args:
        paths: adapter files.
        base: a checkpoint: does the adapter fit it?
        base_name: what to call it (default: its path).
        verify: read everything and check all digests and every rule of the format.
        order: of the tensors: ``"file"`` or a key of :data:`shira_format.entries.inspection.ORDERS`.
        include: regexes; a tensor is listed only if one of them is found in its name.
        exclude: regexes; a tensor is not listed if one of them is found in its name.

    Raises:
        FormatError: a file is no adapter, or is damaged.
        SourceError: an invalid regex.
        OSError: a file cannot be read.
    """
    found = []
    for path in paths:
        info = inspect(path, base, verify=verify, order=order, include=include, exclude=exclude)
        if base is not None and base_name is not None:
            info["base"]["path"] = base_name
        found.append(info)
    return found


def html_report(
    infos: Sequence[dict[str, Any]],
    base: Checkpoint | None = None,
    moments: Path | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int], object] = lambda _: None,
    on_start: Callable[[int], object] = lambda _: None,
) -> str:
    """A page on all files and on how each two go together.

    Args:
        infos: what :func:`inspect_files` returned, with the same ``include`` and ``exclude``.
        base: the checkpoint that they were made for.
        moments: a file of second moments of the layers' inputs.
        include: as there.
        exclude: as there.
        progress: called with the number of tensors that were read since the last call.
        on_start: called with what all calls of ``progress`` will add up to.

    Raises:
        FormatError: a file is damaged.
        SourceError: the moments do not fit.
        OSError: a file cannot be read.
    """
    from shira_analysis.measures.deltas import DeltaFile
    from shira_analysis.reports.html import look, report

    read = None
    if moments is not None:
        from shira_format.calibration.moments import Moments

        read = Moments.read(moments)
    keep = name_filter(include, exclude)
    listed = [tuple(row["name"] for row in info["tensors"]) for info in infos]
    on_start(sum(map(len, listed)) + (len(set().union(*listed)) if len(infos) > 1 else 0))
    looks = []
    for info, names in zip(infos, listed, strict=True):
        file = AdapterFile(info["file"], separate_maps=True)
        fitting = base if "base" in info and info["base"]["fits"] else None
        whole = tuple(name for name in file.manifest.whole if keep(name))
        looks.append(look(DeltaFile(file, fitting, names, whole), info, progress))
    return report(looks, read, progress=lambda _: progress(1))
