"""What is saved beside an adapter so that a training goes on to the bit: values before rounding, and the optimizer."""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shira_format._core.arrays import file_digest
from shira_format._core.files import open_regular
from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.storage.atomic import atomic_file
from shira_format.storage.paths import digest_of, same_files

_VERSION = 1
_KEYS = frozenset({"version", "adapter", "options", "weights", "optimizer"})


def state_path(path: str | os.PathLike[str]) -> Path:
    """Where the state of an adapter file is."""
    return Path(f"{os.fspath(path)}.state")


def drop_state(path: str | os.PathLike[str]) -> None:
    """Remove the state of an adapter that was replaced; see :func:`check_state`."""
    state_path(path).unlink(missing_ok=True)


def check_state(path: str | os.PathLike[str]) -> None:
    """Refuse to write an adapter beside a file that has the name of its state and is none, since that would be removed.

    Raises:
        SourceError: there is one.
    """
    where = state_path(path)
    if os.path.lexists(where) and not _is_state(where):
        raise SourceError(
            f"{where}: not a training state, and so not removed: move it away, or write to another name"
        )


def _is_state(where: Path) -> bool:
    """Whether :func:`write_state` made a file, by the names in it: its tensors are not read, and no code in it is run."""
    try:
        with io.BufferedReader(open_regular(where)) as file, zipfile.ZipFile(file) as archive:
            content = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            found = {value for _, value, _ in pickletools.genops(archive.read(content)) if isinstance(value, str)}
    except MemoryError:
        raise
    except Exception:
        return False
    return found >= _KEYS


def write_state(path: str | os.PathLike[str], training: Mapping[str, Any], optimizer: Any) -> None:
    """Write the state of an adapter file that was just written.

    Args:
        path: of the adapter.
        training: options and values.
        optimizer: None, anything with ``state_dict()``, or a mapping of such.
    """
    content = dict(training) | {
        "version": _VERSION,
        "adapter": file_digest(Path(path)),
        "optimizer": _states(optimizer),
    }
    with atomic_file(state_path(path)) as file:
        torch.save(content, file)


def load_resumable(path: str | os.PathLike[str]) -> tuple[Adapter, dict[str, Any] | None]:
    """An adapter and the state beside its file; None if there is none. No code in it is run.

    Raises:
        SourceError: the state cannot be read, or is not of this adapter; or the adapter is replaced meanwhile.
        FormatError: the adapter file is damaged.
        OSError: it cannot be read.
    """
    with same_files():
        return load(path), _read_state(path)


def _read_state(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    where = state_path(path)
    if not where.exists():
        return None
    try:
        with io.BufferedReader(open_regular(where)) as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(f"{where}: not a training state: {reason}") from error
    if not isinstance(found, dict) or not found.keys() >= _KEYS:
        raise SourceError(f"{where}: not a training state")
    if found["version"] != _VERSION:
        raise SourceError(f"{where}: is of version {found['version']}; this reads version {_VERSION}")
    if found["adapter"] != digest_of(Path(path)):
        raise SourceError(
            f"{where}: is not the state of {path}: save both together, or remove the state to go on without it"
        )
    return found


def load_states(optimizer: Any, saved: Any) -> None:
    """Give back what :func:`write_state` took from ``optimizer``.

    Raises:
        SourceError: nothing was saved, or something else.
    """
    if saved is None:
        raise SourceError("no optimizer was saved with the adapter: give it to save_state")
    if isinstance(optimizer, Mapping):
        if optimizer.keys() != saved.keys():
            raise SourceError(f"saved were {', '.join(saved)}; asked for are {', '.join(optimizer)}")
        for name, one in optimizer.items():
            one.load_state_dict(saved[name])
    else:
        optimizer.load_state_dict(saved)


def _states(optimizer: Any) -> Any:
    if optimizer is None:
        return None
    if isinstance(optimizer, Mapping):
        return {name: one.state_dict() for name, one in optimizer.items()}
    return optimizer.state_dict()
