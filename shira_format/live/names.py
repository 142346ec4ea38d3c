"""From the names in an adapter to those in a live model, which may differ in one prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shira_format.checkpoints.wrapped import unwrapped_names
from shira_format.errors import BaseMismatch, SourceError
from shira_format.live.loaded import LoadedAdapter
from shira_format.names.prefixes import AmbiguousNames, match_names

# Given an adapter and the live tensors: the function from a name in the adapter to one in the model.
Rename = Callable[[LoadedAdapter, Mapping[str, Any]], Callable[[str], str]]


def renaming(prefix: str | None, rename: Callable[[str], str] | None) -> Rename:
    """The rule for the arguments ``prefix`` and ``rename`` of a switcher; at most one of them is given."""
    if rename is not None:
        return lambda _adapter, _live: rename
    if prefix is not None:
        return lambda adapter, live: _keeping_new_names(adapter, live, prefix.__add__)
    return _found


def _found(adapter: LoadedAdapter, live: Mapping[str, Any]) -> Callable[[str], str]:
    """The change of one prefix under which the model has all names.

    Raises:
        BaseMismatch: there is none.
    """
    needed = [tensor.name for tensor in adapter.tensors]
    needed += [whole.name for whole in adapter.dense if whole.base_digest is not None]
    # By the live name; a dictionary of a wrapped model's tensors has the words of wrappers in names.
    names = {name: name for name in live}
    if not all(name in live for name in needed):
        names = unwrapped_names(live, None, adapter.label)
    shapes = {tensor.name: tensor.shape for tensor in adapter.tensors}

    def fits(name: str, found: str) -> bool:
        shape = getattr(live[names[found]], "shape", None)
        return name not in shapes or shape is None or tuple(shape) == shapes[name]

    try:
        rename = match_names(needed, names, adapter.label, fits=fits, option="prefix=")
    except AmbiguousNames as error:
        raise BaseMismatch(f"{error} or rename=") from None
    except SourceError:
        missing = next(name for name in needed if name not in live)
        raise BaseMismatch(
            f"{adapter.where}tensor {missing!r}: the model has no {missing!r}, but names like "
            f"{next(iter(live), 'none at all')!r} (map them by prefix= or rename=)"
        ) from None
    return _keeping_new_names(adapter, live, lambda name: names.get(rename(name), rename(name)))


def _keeping_new_names(
    adapter: LoadedAdapter, live: Mapping[str, Any], rename: Callable[[str], str]
) -> Callable[[str], str]:
    """As ``rename``, but tensors that are new to the base, such as a head, may keep their names in the model."""
    new = {whole.name for whole in adapter.dense if whole.base_digest is None}
    return lambda name: name if name in new and rename(name) not in live else rename(name)
