"""From the names in an adapter to those in a live model, which may have a prefix more, or less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shira_format.errors import BaseMismatch, SourceError
from shira_format.live.loaded import LoadedAdapter
from shira_format.names.match import match_names

# Of an adapter and the live tensors: the function from a name in the adapter to one in the model.
Rename = Callable[[LoadedAdapter, Mapping[str, Any]], Callable[[str], str]]


def renaming(prefix: str | None, rename: Callable[[str], str] | None) -> Rename:
    """The rule that the arguments of a switcher ask for."""
    if rename is not None:
        return lambda _adapter, _live: rename
    if prefix is not None:
        return lambda adapter, live: _new_as_they_are(adapter, live, prefix.__add__)
    return _found


def _found(adapter: LoadedAdapter, live: Mapping[str, Any]) -> Callable[[str], str]:
    """With the one prefix that makes all names fit.

    Raises:
        BaseMismatch: there is none.
    """
    needed = [tensor.name for tensor in adapter.tensors]
    needed += [whole.name for whole in adapter.dense if whole.base_digest is not None]
    try:
        rename, _ = match_names(needed, live, adapter.label)
    except SourceError:
        missing = next(name for name in needed if name not in live)
        raise BaseMismatch(
            f"{adapter.where}tensor {missing!r}: the weights have no {missing!r}, but names like "
            f"{next(iter(live), 'none at all')!r} (prefix= or rename= maps names)"
        ) from None
    return _new_as_they_are(adapter, live, rename)


def _new_as_they_are(
    adapter: LoadedAdapter, live: Mapping[str, Any], rename: Callable[[str], str]
) -> Callable[[str], str]:
    """Tensors that are new to the base, such as a head, are those of the live model, which has no prefix for them."""
    new = {whole.name for whole in adapter.dense if whole.base_digest is None}
    return lambda name: name if name in new and rename(name) not in live else rename(name)
