"""Changes of prefixes: of all names alike, or of each group of names in its own way."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shira_format._core.notices import NamesNotice

DEPTH = 3  # parts of a name that a prefix may have
_MOST_WORDS = 8  # groups in a message


@dataclass(frozen=True)
class Renaming:
    """Removes the prefix ``old`` from a name, where it has it, and puts ``new`` in front.

    Attributes:
        old: the prefix that is removed.
        new: the prefix that is added.
        because: what decided for it where others were possible; for messages.
    """

    old: str = ""
    new: str = ""
    because: str = field(default="", compare=False)

    def __call__(self, name: str) -> str:
        """The new name."""
        return self.new + name.removeprefix(self.old)

    @property
    def words(self) -> str:
        """What it does, for messages; "" for nothing."""
        found = ""
        if self.old and self.new:
            found = f"the prefix {self.old!r} becomes {self.new!r}"
        elif self.old:
            found = f"the prefix {self.old!r} is left out"
        elif self.new:
            found = f"the prefix {self.new!r} is added"
        return f"{found} (as {self.because})" if found and self.because else found

    def notices(self, source: str, component: str = "") -> list[str]:
        """What to tell the user: one notice, or none if no name changes.

        Args:
            source: the file whose names are renamed, such as "the LoRA".
            component: of a pipeline, if only its names are.
        """
        words = [component, self.words] if component else [self.words]
        told = f"names of {source} are not those of the base: {', '.join(words)}"
        return [NamesNotice(told)] if self.words else []

    def reasoned(self, because: str) -> Renaming:
        """The same with a reason."""
        return replace(self, because=because)


@dataclass(frozen=True)
class GroupedRenaming(Renaming):
    """A renaming for each group of names, such as those of two towers.

    A name that is of no group keeps its name if the base has it, and else changes as the only group does that brings it to a
    name of the base.

    Attributes:
        groups: the first name of each group, and the renaming of the group.
        by_lead: the renaming by leading parts of names.
        known: the base's names.
    """

    groups: tuple[tuple[str, Renaming], ...] = ()
    by_lead: Mapping[tuple[str, ...], Renaming] = field(default_factory=dict, compare=False, repr=False)
    known: Collection[str] = field(default=(), compare=False, repr=False)

    def __call__(self, name: str) -> str:
        """The new name."""
        lead = leading(name)
        for depth in range(len(lead), 0, -1):
            if rename := self.by_lead.get(lead[:depth]):
                return rename(name)
        if name in self.known:
            return name
        found = {new for _, rename in self.groups if (new := rename(name)) in self.known}
        return found.pop() if len(found) == 1 else name

    @property
    def words(self) -> str:
        """What it does, for messages."""
        found = [f"of names like {first!r} {rename.words}" for first, rename in self.groups if rename.words]
        more = (
            [] if len(found) <= _MOST_WORDS else [f"and {len(found) - _MOST_WORDS} other groups change likewise"]
        )
        return ", ".join(found[:_MOST_WORDS] + more)


def grouped(groups: Sequence[tuple[Sequence[str], Renaming]], known: Collection[str]) -> Renaming:
    """The renaming of several groups of names, each in its own way; of one group, its renaming.

    Args:
        groups: names, none of which has the same leading parts as one of another group, and their renaming.
        known: the base's names.
    """
    if len({rename for _, rename in groups}) == 1:
        return groups[0][1]
    by_lead: dict[tuple[str, ...], Renaming | None] = {}
    for names, rename in groups:
        for lead in {leading(name)[:depth] for name in names for depth in range(1, DEPTH + 1)}:
            # Parts that several groups begin with decide nothing.
            by_lead[lead] = rename if by_lead.get(lead, rename) == rename else None
    certain = {lead: rename for lead, rename in by_lead.items() if rename is not None}
    return GroupedRenaming(
        groups=tuple((names[0], rename) for names, rename in groups), by_lead=certain, known=known
    )


@dataclass(frozen=True)
class RenamingWithOthers(Renaming):
    """A renaming, and what it does not tell of some names.

    Attributes:
        rename: of all other names.
        others: new names of some.
    """

    rename: Renaming = field(default_factory=Renaming)
    others: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __call__(self, name: str) -> str:
        """The new name."""
        return self.others[name] if name in self.others else self.rename(name)

    @property
    def words(self) -> str:
        """What it does, for messages."""
        found = [self.rename.words] if self.rename.words else []
        found += [f"{name!r} is {new!r}" for name, new in list(self.others.items())[:_MOST_WORDS]]
        more = [] if len(self.others) <= _MOST_WORDS else [f"and {len(self.others) - _MOST_WORDS} others likewise"]
        return ", ".join(found + more)


def leading(name: str) -> tuple[str, ...]:
    """The first parts of a name before its first number and without its last part, at most three."""
    found: list[str] = []
    for part in name.split(".")[:-1][:DEPTH]:
        if part.isdecimal():
            break
        found.append(part)
    return tuple(found)


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
        for depth in range(1, min(DEPTH, len(parts) - rest) + 1):
            found[separator.join(parts[:depth]) + separator] = None
    return list(found)


def numbers(prefix: str) -> list[str]:
    """The parts of a prefix that are numbers."""
    return [part for part in re.split(r"[./]", prefix) if part.isdecimal()]
