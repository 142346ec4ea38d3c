"""What is saved beside an adapter so that a training goes on to the bit: values before rounding, and the optimizer."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shira_format._core.arrays import file_digest
from shira_format._core.files import open_regular
from shira_format.errors import SourceError
from shira_format.storage.atomic import atomic_file

_VERSION = 1


def state_path(path: str | os.PathLike[str]) -> Path:
    """Where the state of an adapter file is."""
    return Path(f"{os.fspath(path)}.state")


def drop_state(path: str | os.PathLike[str]) -> None:
    """Remove the state of an adapter that was replaced."""
    state_path(path).unlink(missing_ok=True)


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


def read_state(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The state beside an adapter file; None if there is none. No code in it is run.

    Raises:
        SourceError: it cannot be read, or is not of this adapter.
    """
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
    if (
        not isinstance(found, dict)
        or not {"version", "adapter", "options", "weights", "optimizer"} <= found.keys()
    ):
        raise SourceError(f"{where}: not a training state")
    if found["version"] != _VERSION:
        raise SourceError(f"{where}: is of version {found['version']}; this reads version {_VERSION}")
    if found["adapter"] != file_digest(Path(path)):
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
