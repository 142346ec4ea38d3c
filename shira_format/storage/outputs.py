"""What may be written: one rule for all commands, so that no input, and nothing that was not asked for, is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable
from itertools import combinations
from pathlib import Path

from shira_format._core.system import is_usable
from shira_format.errors import ShiraError, SourceError
from shira_format.storage.atomic import LITTER, restore
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.storage.safetensors_header import METADATA_KEY
from shira_format.storage.weight_files import SHARD, is_index

# Endings of what commands write and no program reads as a part of a model: these may be replaced in an input's folder.
_OURS = frozenset({".st", ".masks", ".html", ".png", ".svg", ".pdf", ".csv"})
# What lies beside weights and is read with them, whether or not it is named.
_BESIDE = frozenset(
    {
        "config.json", "adapter_config.json", "model_index.json", "generation_config.json", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt",
    }
)  # fmt: skip


def check_output_files(*outputs: Path | None, inputs: Iterable[object], force: bool) -> None:
    """Check that files may be written.

    Args:
        outputs: the files; None is one that is not asked for.
        inputs: all that is read: files, folders, other locations, which need no check, and None.
        force: whether files that exist may be replaced.

    Raises:
        SourceError: one is a folder, its folder does not exist, it exists and ``force`` is not set, it is an input or a part of
            one, or two are the same, but for
            the case of letters.
    """
    written, read = [path for path in outputs if path is not None], list(inputs)
    for path in written:
        if path.is_dir():
            raise SourceError(f"{path}: is a folder, not a file to write")
        _check_place(path)
        if os.path.lexists(path) and not force:
            raise SourceError(f"{path}: exists; --force replaces it")
        check_not_input(path, read)
    for one, other in combinations(written, 2):
        # Names that differ in case only are one name on Windows and macOS.
        if _folded(one) == _folded(other) or (one.exists() and other.exists() and one.samefile(other)):
            raise SourceError(f"{other}: two files to write need two names")


def check_not_input(out: Path, inputs: Iterable[object]) -> None:
    """Refuse to replace an input, or a file of a model.

    Raises:
        SourceError: ``out`` exists, and is one of ``inputs``, in a folder that is one, or read together with weights.
    """
    if not out.exists():
        return
    read = _local(inputs)
    if any(out.samefile(path) for path in read):
        raise SourceError(f"{out}: is one of the inputs")
    for path in read:
        if any(mask.exists() and out.samefile(mask) for mask in _mask_files(path)):
            raise SourceError(f"{out}: is a mask file of {path}, and is not replaced")
    for path in read:
        folder = path.parent if is_index(path.name) else path
        if folder.is_dir() and folder.resolve() in out.resolve().parents and out.suffix.lower() not in _OURS:
            raise SourceError(f"{out}: is in {folder}, which is one of the inputs, and is not replaced")
    if out.name in _BESIDE or is_index(out.name) or SHARD.search(out.name):
        raise SourceError(f"{out}: is a part of a model, and is not replaced")


def check_output_folder(
    path: Path | None,
    inputs: Iterable[object],
    *,
    force: bool,
    writer: str = "",
    own_files: Callable[[Path], Collection[str]] | None = None,
) -> None:
    """Check that a folder may be written at ``path``; None is a dry run.

    A folder that holds an input, that is in one, or the working directory, is never replaced.

    Args:
        path: the folder.
        inputs: see :func:`check_output_files`.
        force: replace what exists.
        writer: the export that writes the folder, for messages.
        own_files: names of the files of such an export in a folder. If given, only a folder that holds these and nothing else
            is replaced. It raises OSError or ShiraError if the folder holds no such export.

    Raises:
        SourceError: the folder must not be written.
    """
    if path is None:
        return
    _check_place(path)
    restore(path)
    if not os.path.lexists(path):
        return
    if not force:
        raise SourceError(f"{path}: exists; --force replaces it")
    if not path.is_dir():
        if own_files is None:
            raise SourceError(f"{path}: is a file, not a folder to write")
        raise SourceError(f"{path}: not a folder that {writer} wrote, and so not replaced")
    read = list(inputs)
    check_holds_none(path, [*read, Path.cwd()])
    for other in _local(read) if own_files is None else ():
        if other.is_dir() and other.resolve() in path.resolve().parents and other != Path.cwd():
            raise SourceError(f"{path}: is in {other}, which is one of the inputs, and is not replaced")
    if own_files is not None:
        _check_own(path, writer, own_files)


def check_holds_none(folder: Path, inputs: Iterable[object]) -> None:
    """Refuse to replace or remove a folder that is an input, or holds one.

    Raises:
        SourceError: it does.
    """
    here = folder.resolve()
    for other in _local(inputs):
        there = other.resolve()
        if here == there or here in there.parents:
            raise SourceError(f"{folder}: holds {other}, and is not replaced")


def _mask_files(path: Path) -> list[Path]:
    """The mask files that an adapter says it needs; what else is wrong with it is said when it is read."""
    if not path.is_file():
        return []
    try:
        file = SafetensorsFile(path)
        file.close()
        names = json.loads(file.metadata.get(METADATA_KEY, "{}"))["mask_files"]
        return [path.parent / name for name in names]
    except (ShiraError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _local(inputs: Iterable[object]) -> list[Path]:
    """The inputs that are files and folders of this machine."""
    found = [Path(one) for one in inputs if isinstance(one, str | Path) and one != ""]
    return [path for path in found if path.exists()]


def _folded(path: Path) -> str:
    return str(path.resolve()).casefold()


def _check_place(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise SourceError(f"{path}: the folder {path.parent} does not exist")
    if not is_usable(path.name):
        raise SourceError(f"{path}: Windows allows no file of this name")


def _check_own(folder: Path, writer: str, own_files: Callable[[Path], Collection[str]]) -> None:
    refused = f"{folder}: not a folder that {writer} wrote, and so not replaced"
    if folder.is_symlink():
        raise SourceError(refused)
    try:
        own = own_files(folder)
    except (OSError, ShiraError) as error:
        raise SourceError(f"{refused} ({error})") from None
    others = (p.name for p in folder.iterdir() if p.name not in LITTER and (p.name not in own or p.is_dir()))
    if other := min(others, default=None):
        raise SourceError(f"{folder}: holds {other!r}, which {writer} did not write, and so is not replaced")
