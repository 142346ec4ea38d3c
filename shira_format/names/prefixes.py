"""Names that differ in one prefix.

A model with a head on top (``BertForSequenceClassification``) calls its weights ``bert.encoder...`` where the checkpoint
of the bare model says ``encoder...``, or the other way round; ``model.layers...`` in memory may be ``backbone.layers...``
on disk. The renamings tried are: none, one prefix removed, added or replaced. Nothing else is guessed: a renaming never
changes, adds or drops a number, nor does it turn the name of a tower (text, vision) into that of another. If several
renamings are possible, shapes decide, or the user (``prefix``); the first is never taken for being the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from shira_format.errors import SourceError

_DEPTH = 3  # parts of a name that a prefix may have
_MOST_SHOWN = 4  # renamings in a message
# Words in prefixes that name a tower of a model; a tower's words are interchangeable.
_TOWERS = [
    {"text", "language", "llm"}, {"vision", "visual", "image", "img", "video"}, {"audio", "speech"}, {"encoder"}, {"decoder"},
]  # fmt: skip

# Whether a tensor of the base, the second name, has the shape that the adapter needs for the first.
Fits = Callable[[str, str], bool]


class AmbiguousNames(SourceError):
    """Names fit the base in several ways."""


@dataclass(frozen=True)
class Renaming:
    """Removes the prefix ``old`` from a name, where it has it, and puts ``new`` in front."""

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        """The new name."""
        return self.new + name.removeprefix(self.old)

    @property
    def words(self) -> str:
        """What it does, for messages; "" for nothing."""
        if self.old and self.new:
            return f"the prefix {self.old!r} becomes {self.new!r}"
        if self.old:
            return f"the prefix {self.old!r} is left out"
        return f"the prefix {self.new!r} is added" if self.new else ""

    def notices(self, source: str, component: str = "") -> list[str]:
        """What to tell the user: one notice, or none if no name changes.

        Args:
            source: the file whose names are renamed, such as "the LoRA".
            component: of a pipeline, if only its names are.
        """
        words = [component, self.words] if component else [self.words]
        return [f"names of {source} are not those of the base: {': '.join(words)}"] if self.words else []


def leading_parts(names: Iterable[str], separator: str = ".", *, rest: int = 1) -> list[str]:
    """The first one to three parts of names (``"model."``, ``"model.layers."``), shortest first, otherwise in the names' order.

    Args:
        names: parts are joined by ``separator``.
        rest: how many parts of a name must be left after its prefix.
    """
    return sorted(leading_parts_by_name(names, separator, rest=rest), key=lambda prefix: prefix.count(separator))


def leading_parts_by_name(names: Iterable[str], separator: str = ".", *, rest: int = 1) -> list[str]:
    """As :func:`leading_parts`, all prefixes of one name before those of the next."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(separator)
        for depth in range(1, min(_DEPTH, len(parts) - rest) + 1):
            found[separator.join(parts[:depth]) + separator] = None
    return list(found)


def numbers(prefix: str) -> list[str]:
    """The parts of a prefix that are numbers."""
    return [part for part in re.split(r"[./]", prefix) if part.isdecimal()]


def renamings(removed: Iterable[str], added: Iterable[str]) -> Iterator[Renaming]:
    """Each way that changes at most one prefix: none, one of ``removed`` left out, one of ``added`` put in front.

    Prefixes with numbers are left out.
    """
    yield Renaming()
    yield from (Renaming(old=prefix) for prefix in removed if not numbers(prefix))
    yield from (Renaming(new=prefix) for prefix in added if not numbers(prefix))


def match_names(
    needed: Collection[str],
    base: Collection[str],
    where: object,
    *,
    fits: Fits | None = None,
    prefix: str | None = None,
    option: str = "--prefix",
) -> Renaming:
    """The renaming under which every needed name is in ``base``; none is needed if all names are.

    Args:
        needed: the adapter's names.
        base: the base's names.
        where: the adapter, for messages.
        fits: decides if several renamings are possible.
        prefix: the user's choice: what the names in the base start with.
        option: how the user gives it, for messages.

    Raises:
        AmbiguousNames: there are several, and nothing decides; the message names them.
        SourceError: there is none; the message names keys that did not match.
    """
    known = set(base)
    if prefix is None and all(name in known for name in needed):
        return Renaming()
    found = list(_candidates(needed, known, prefix))
    if prefix is not None:
        exact = [rename for rename in found if rename.new == prefix]
        found = exact or [rename for rename in found if all(rename(name).startswith(prefix) for name in needed)]
    distinct = list({tuple(map(rename, needed)): rename for rename in reversed(found)}.values())[::-1]
    if distinct:
        return only_one(distinct, needed, where, fits=fits, option=option)
    # Under the renaming that finds most: what is missing then is missing.
    nearest = max(
        _possible(needed, known, prefix), key=lambda rename: sum(rename(name) in known for name in needed)
    )
    missing = [name for name in needed if nearest(name) not in known] or list(needed)
    among = "" if prefix is None else f" under {option} {prefix}"
    raise SourceError(
        f"{where}: {len(missing)} of {len(needed)} adapted weights are not in the base{among}, for example "
        f"{missing[0]!r}; the base has names like {next(iter(base), 'none at all')!r}"
    )


def prefix_of(prefix: str | None, component: str) -> str | None:
    """The part of the user's prefix, ``TEXT`` or ``COMPONENT/TEXT``, that is about names of a component.

    Args:
        prefix: the user's.
        component: how names of the component begin in the base, such as ``"text_encoder/"``; "" if there are none.
    """
    if prefix is None or "/" not in prefix:
        return prefix
    return prefix.removeprefix(component) if component and prefix.startswith(component) else None


def only_one(
    found: Sequence[Renaming],
    needed: Collection[str],
    where: object,
    *,
    fits: Fits | None = None,
    option: str = "--prefix",
) -> Renaming:
    """The only one of several renamings, or the only one that fits.

    Raises:
        AmbiguousNames: there are several.
    """
    if len(found) > 1 and fits is not None:
        found = [rename for rename in found if all(fits(name, rename(name)) for name in needed)] or found
    if len(found) == 1:
        return found[0]
    first = next(iter(needed))
    ways = [f"{rename.words or 'no prefix changes'} ({rename(first)!r})" for rename in found[:_MOST_SHOWN]]
    more = "" if len(found) <= _MOST_SHOWN else f", or {len(found) - _MOST_SHOWN} other ways"
    choices = [f"{option} {rename.new or leading_parts([rename(first)])[0]}" for rename in found[:_MOST_SHOWN]]
    choice = f"; choose with {' or '.join(choices)}" if option else ""
    raise AmbiguousNames(
        f"{where}: {first!r} and the others fit the base in several ways: {', or '.join(ways)}{more}{choice}"
    )


def _candidates(needed: Collection[str], known: set[str], prefix: str | None) -> Iterator[Renaming]:
    """Each renaming that finds all names."""
    return (rename for rename in _possible(needed, known, prefix) if all(rename(name) in known for name in needed))


def _possible(needed: Collection[str], known: set[str], prefix: str | None) -> list[Renaming]:
    """Each renaming that keeps numbers and towers, those that change least first."""
    ours, theirs = (leading_parts(sorted(names), rest=2) for names in (needed, known))
    removed = ["", *(old for old in ours if all(name.startswith(old) for name in needed))]
    added = list(dict.fromkeys(["", *theirs, *([prefix] if prefix else [])]))
    pairs = [
        (old, new) for old in removed for new in added if numbers(old) == numbers(new) and _same_tower(old, new)
    ]
    return [
        Renaming(*pair) for pair in sorted(pairs, key=lambda pair: bool(pair[0] and pair[1]))
    ]  # replacements last


def _same_tower(old: str, new: str) -> bool:
    """False if both prefixes name towers, and different ones."""
    ours, theirs = (
        {place for place, words in enumerate(_TOWERS) if words & set(re.split(r"[._/]", prefix))}
        for prefix in (old, new)
    )
    return not ours or not theirs or bool(ours & theirs)
