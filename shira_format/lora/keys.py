"""Keys of LoRA files taken apart: which module a tensor belongs to, and which part of the module's LoRA it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

from shira_format.errors import SourceError

Module = TypeVar("Module", bound=Hashable)


def group_keys(
    keys: Iterable[str],
    parse: Callable[[str], tuple[Module, str] | None],
    where: object,
    unmatched: str | Callable[[str], str],
) -> dict[Module, dict[str, str]]:
    """The keys of a file by module and part.

    Args:
        keys: all keys of the file.
        parse: the module and the part that a key means, or None if it is not of the dialect.
        where: the file, for messages.
        unmatched: why a key is not of the dialect, for messages; may depend on the key.

    Raises:
        SourceError: a key that is not of the dialect, two keys of the same part, or no key at all.
    """
    found: dict[Module, dict[str, str]] = {}
    for key in keys:
        if (parsed := parse(key)) is None:
            reason = unmatched if isinstance(unmatched, str) else unmatched(key)
            raise SourceError(f"{where}: unmatched key {key!r}: {reason}")
        module, part = parsed
        if (other := found.setdefault(module, {}).setdefault(part, key)) != key:
            raise SourceError(f"{where}: {other!r} and {key!r} are the same part of one LoRA")
    if not found:
        raise SourceError(f"{where}: it holds no tensors")
    return found


def by_pattern(pattern: re.Pattern[str]) -> Callable[[str], tuple[str, str] | None]:
    """A parser for :func:`group_keys` from a pattern with the groups ``module`` and ``part``."""

    def parse(key: str) -> tuple[str, str] | None:
        match = pattern.fullmatch(key)
        return None if match is None else (match["module"], match["part"])

    return parse


def check_pairs(groups: Iterable[Mapping[str, str]], where: object) -> None:
    """Check that each module has both factors, ``down`` and ``up``.

    Raises:
        SourceError: one is missing.
    """
    for parts in groups:
        for part, partner in (("down", "up"), ("up", "down")):
            if partner not in parts:
                key = parts.get(part) or next(iter(parts.values()))
                raise SourceError(f"{where}: {key!r} has no partner, the factor {partner!r}")
