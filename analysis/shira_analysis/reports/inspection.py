"""What adapter files are, whether they are valid, and whether they fit a base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shira_format.entries.inspection import inspect

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint


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
        order: of the tensors: ``"file"``, or a key of :data:`shira_format.entries.inspection.ORDERS`.
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
