"""What adapter files are, whether they are valid, and whether they fit a base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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
    paths: Sequence[str | os.PathLike[str]],
    *,
    base: Checkpoint | None = None,
    base_name: str | None = None,
    verify: bool = False,
    order: str = "file",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Describe each file, as plain JSON values.

    Args:
        paths: adapter files.
        base: a checkpoint, to check whether the adapters fit it.
        base_name: its name in the result (default: its path).
        verify: read the whole files and check all digests and every rule of the format.
        order: of the tensors: ``"file"``, or a key of :data:`ORDERS`.
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
