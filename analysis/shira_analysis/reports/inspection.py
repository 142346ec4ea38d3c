"""A look at adapter files: what they are, whether they are sound and fit a base, and a report for a browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.reports.summary import describe, misfits_with
from shira_format.format import AdapterFile
from shira_format.names.filters import name_filter

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint

ORDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda row: row["name"],
    "nnz": lambda row: -row["nnz"],
    "density": lambda row: -row["density"],
    "bytes": lambda row: -row["bytes"],
    "energy": lambda row: row["energy_kept"] if row["energy_kept"] is not None else 2,
}


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
        order: of the tensors: ``"file"`` or a key of :data:`ORDERS`.
        include: regexes; a tensor is listed only if one of them is found in its name.
        exclude: regexes; a tensor is not listed if one of them is found in its name.

    Raises:
        FormatError: a file is no adapter, or is damaged.
        SourceError: an invalid regex.
        OSError: a file cannot be read.
    """
    keep = name_filter(include, exclude)
    found = []
    for path in paths:
        file = AdapterFile(path)
        info = describe(file)
        info["tensors"] = [row for row in info["tensors"] if keep(row["name"])]
        if order != "file":
            info["tensors"].sort(key=ORDERS[order])
        if verify:
            file.verify()
            info["verified"] = True
        if base is not None:
            misfits = misfits_with(file, base)
            info["base"] = {"path": base_name or str(base.path), "fits": not misfits, "reasons": misfits}
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
