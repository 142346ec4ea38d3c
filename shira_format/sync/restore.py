"""A version of a place as a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from shira_format.storage.atomic import atomic_folder
from shira_format.storage.outputs import check_output_folder
from shira_format.storage.places import Place, open_place
from shira_format.sync.structure import Structure
from shira_format.sync.subscriber import Subscriber
from shira_format.sync.whole import mapped


def restore(
    where: str | os.PathLike[str] | Place,
    out: str | os.PathLike[str],
    *,
    version: int | None = None,
    force: bool = False,
    threads: int | None = None,
) -> int:
    """Write a published version as a folder with a safetensors file, verified by the digest of all its tensors.

    Args:
        where: the publisher's place.
        out: the folder, which appears whole.
        version: which; the newest by default.
        force: replace ``out`` and all that is in it.
        threads: at most this many; all cores by default.

    Returns:
        The version.

    Raises:
        SourceError: the place has no such version, cannot be read, or is damaged; or ``out`` must not be replaced.
        OSError: a file cannot be read or written.
    """
    place = open_place(where)
    check_output_folder(Path(out), [Path(where)] if isinstance(where, (str, os.PathLike)) else [], force=force)
    structure = Structure.read(place)
    with atomic_folder(Path(out)) as folder:
        return _fill(folder / "model.safetensors", place, structure, version, threads)


def _fill(path: Path, place: Place, structure: Structure, version: int | None, threads: int | None) -> int:
    """On return the file is not mapped any more, so that its folder can be renamed on Windows, too."""
    subscriber = Subscriber(mapped(path, structure), place, history=0, verify="all", threads=threads)
    found = subscriber.update(version).version
    assert found is not None
    return found
