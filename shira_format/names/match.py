"""From the names of a training-time model to those of a checkpoint.

A model with a head on top (``BertForSequenceClassification``) calls its weights ``bert.encoder...``, where the
checkpoint of the bare model says ``encoder...``, or the other way round; or ``model.layers...`` in memory is
``backbone.layers...`` on disk. One prefix, the same for all, makes the difference; anything else is not guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from shira_format.errors import SourceError


def match_names(needed: Collection[str], base: Collection[str], where: object) -> tuple[Callable[[str], str], str]:
    """The mapping under which every needed name is in ``base``, and what it does, in words ("" for nothing).

    Raises:
        SourceError: there is none; the message names keys that did not match.
    """
    known = set(base)
    for rename, words in _candidates(needed, known):
        if all(rename(name) in known for name in needed):
            return rename, words
    if len(found := _replaced(needed, known)) == 1:
        return found[0]
    missing = [name for name in needed if name not in known]
    raise SourceError(
        f"{where}: {len(missing)} of {len(needed)} adapted weights are not in the base, for example "
        f"{missing[0]!r}; the base has names like {next(iter(base), 'none at all')!r}"
    )


def _candidates(needed: Collection[str], base: set[str]) -> Iterator[tuple[Callable[[str], str], str]]:
    yield (lambda name: name), ""
    for prefix in _leading(needed):
        if all(name.startswith(prefix) for name in needed):
            yield (lambda name, p=prefix: name.removeprefix(p)), f"the prefix {prefix!r} is left out"  # type: ignore[misc]
    for prefix in _leading(base):
        yield (lambda name, p=prefix: p + name), f"the prefix {prefix!r} is added"  # type: ignore[misc]


def _replaced(needed: Collection[str], base: set[str]) -> list[tuple[Callable[[str], str], str]]:
    """All ways to put one prefix for another; a base may have several stacks of like names (text, vision)."""
    for old in _leading(needed):
        if all(name.startswith(old) for name in needed):
            rests = [name.removeprefix(old) for name in needed]
            found = [new for new in _leading(base) if all(new + rest in base for rest in rests)]
            if found:  # longer prefixes say the same
                return [(partial(_put, old, new), f"the prefix {old!r} becomes {new!r}") for new in found]
    return []


def _put(old: str, new: str, name: str) -> str:
    return new + name.removeprefix(old)


def _leading(names: Iterable[str]) -> list[str]:
    """The first one, two and three parts of the names, ``"model."`` and the like, shortest first."""
    found: dict[str, None] = {}
    for depth in (1, 2, 3):
        for name in sorted(names):
            parts = name.split(".")
            if len(parts) > depth + 1:
                found[".".join(parts[:depth]) + "."] = None
    return list(found)
