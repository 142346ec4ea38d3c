"""What a source holds that its conversion does not use: weight files in its folder, and entries of its files.

A conversion that succeeds has used every tensor of its source. What it did not use is named, and refused unless the user allows
it. A copy counts as used if its tensors are proven to be those that were read, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.checkpoints.beside import is_part, names_in, not_read, weight_files_beside
from shira_format.checkpoints.index import some
from shira_format.checkpoints.same import same_tensor
from shira_format.errors import ShiraError, SourceError
from shira_format.storage.paths import naming_remote
from shira_format.storage.weight_files import is_in_other_dtype

_WAY_OUT = "name the file to convert, or allow unused tensors (--allow-unused)"


def check_all_used(path: Path, read: Sequence[Path], opened: Sequence[Checkpoint], *, allow: bool) -> list[str]:
    """Refuse a source with weights that were not read; returns what to tell the user.

    Args:
        path: what the user named: a folder or a file. Beside a file that was named, other files are of no concern.
        read: the files that were read, and those of the base, which may lie in the same folder.
        opened: their tensors, by the files' own names as far as possible.
        allow: name what is not used, and do not refuse it.

    Raises:
        SourceError: there are such files or entries; the message names them.
    """
    with naming_remote(path):
        return _all_used(path, read, opened, allow=allow)


def _all_used(path: Path, read: Sequence[Path], opened: Sequence[Checkpoint], *, allow: bool) -> list[str]:
    entries = [f"{found.path.name}: {some(list(found.unused))}" for found in opened if found.unused]
    beside = weight_files_beside(path, read)
    parts = [file for file in beside if is_part(path, file) and not is_in_other_dtype(file.name)]
    copies = _copies(parts, opened)
    unused = [file for file in parts if file not in copies]
    if (unused or entries) and not allow:
        raise SourceError(f"{path}: weights that were not used: {', '.join(names_in(path, unused) + entries)}; {_WAY_OUT}")  # fmt: skip
    notices = [*not_read(path, beside)]
    if copies:
        names = some(names_in(path, copies))
        notices.append(f"{path.name}: {names}: the same tensors as in the files that are read")
    return notices + [f"not read, of {entry}" for entry in entries]


def opened_files(files: Iterable[Path]) -> list[Checkpoint]:
    """The tensors of each file that is a checkpoint or a LoRA by itself."""
    return [found for file in files if (found := _opened(file)) is not None]


def _opened(file: Path) -> Checkpoint | None:
    """The tensors of one file by its own names; None if it is not a checkpoint, such as a LoRA as GGUF, or a configuration."""
    try:
        return open_checkpoint(file, wrapped=True)
    except ShiraError:
        return None


def _copies(files: Iterable[Path], read: Sequence[Checkpoint]) -> list[Path]:
    """Those of ``files`` that hold tensors of ``read`` and nothing else."""
    found: list[Path] = []
    refuted: set[Path] = set()
    for file in files:
        if file in found or file in refuted:
            continue
        other = _opened(file)
        if other is not None and not other.unused and all(_is_in(other, name, read) for name in other):
            found += other.files  # of shards all
        else:
            refuted.update([file] if other is None else other.files)
    return found


def _is_in(other: Checkpoint, name: str, read: Sequence[Checkpoint]) -> bool:
    """Whether ``read`` has the tensor: under its name or, of tied weights that are saved once, under another."""
    for checkpoint in read:
        if name in checkpoint:
            return same_tensor(checkpoint, name, other, name)
    return any(same_tensor(checkpoint, twin, other, name) for checkpoint in read for twin in checkpoint)
