"""Names that differ in a prefix.

A model with a head on top (``BertForSequenceClassification``) calls its weights ``bert.encoder...`` where the checkpoint
of the bare model says ``encoder...``, or the other way round; ``model.layers...`` in memory may be ``backbone.layers...``
on disk. The renamings tried are: none, one prefix removed, added or replaced. Nothing else is guessed: a renaming never
changes, adds or drops a number, nor does it turn the name of a tower (text, vision) into that of another.

Where no renaming suits all names, they are divided: by tower, then by their leading parts, as little as is needed. So a
vision-language model is found in another's names (``model.visual....`` and ``model.language_model....`` for ``visual....`` and
``model.layers....``), and a causal LM with its head in a wrapper of it. Names that tell no tower all go to one tower, and
never to another than text that other names tell.

If several renamings are possible, those that keep the name of a tower come first; then shapes decide, or what the adapter states, or the user (``prefix``); the first is never
taken for being the first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from shira_format.errors import SourceError
from shira_format.names.renaming import (
    DEPTH,
    Renaming,
    RenamingWithOthers,
    grouped,
    leading,
    leading_parts,
    leading_parts_by_name,
    numbers,
)
from shira_format.names.towers import towers_in

__all__ = [
    "AmbiguousNames", "Fits", "Renaming", "Statement", "leading_parts", "leading_parts_by_name", "match_names", "match_others", "numbers",
    "only_one", "prefix_of", "renamings",
]  # fmt: skip

_MOST_SHOWN = 4  # renamings in a message
_MOST_GROUPS = 64  # of names that change in different ways
_MOST_WAYS = 1000  # in which one group may change
_SAMPLE = 20  # names by which the nearest renaming is found, for messages

# Whether a tensor of the base, the second name, has the shape that the adapter needs for the first.
Fits = Callable[[str, str], bool]


class AmbiguousNames(SourceError):
    """Names fit the base in several ways."""


@dataclass(frozen=True)
class Statement:
    """What an adapter says about the model that it was trained for.

    Attributes:
        words: what says so, for messages.
        allows: whether a tensor of the base, the second name, can be the adapter's first.
        is_about_base: whether it contradicts a base of whose tensors it allows none; if not, it then tells nothing.
    """

    words: str
    allows: Fits
    is_about_base: bool = True


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
    statements: Sequence[Statement] = (),
) -> Renaming:
    """The renaming under which every needed name is in ``base``; none is needed if all names are.

    Args:
        needed: the adapter's names.
        base: the base's names.
        where: the adapter, for messages.
        fits: decides if several renamings are possible.
        prefix: the user's choice: what the names in the base start with; of the names, if they are of several groups, for which
            that is possible.
        option: how the user gives it, for messages.
        statements: decide if shapes do not.

    Raises:
        AmbiguousNames: there are several, and nothing decides; the message names them.
        SourceError: there is none; the message names keys that did not match.
    """
    known = base if isinstance(base, Mapping | set | frozenset) else set(base)
    if prefix is None and all(name in known for name in needed):
        return Renaming()
    search = _Search(known, prefix, where)
    groups = search.groups(list(needed))
    among = ""
    if groups and prefix is not None and not any(group.is_chosen for group in groups):
        among, groups = f" under {option} {prefix}", []
    groups = _apart(groups)
    if groups and all(group.found for group in groups):
        if fits is not None:
            groups = [replace(group, found=group.fitting(fits)) for group in groups]
        groups = _in_one_tower(groups)
        decided = [
            (group.names, only_one(group.found, group.names, where, option=option, statements=statements))
            for group in groups
        ]
        towers = {
            (group.towers, added)
            for group, (_, r) in zip(groups, decided, strict=True)
            if (added := group.added(r))
        }
        found = grouped(decided, known)
        if len(dict(towers)) == len(towers) and len({found(name) for name in needed}) == len(set(needed)):
            return found
    # Under the renaming that finds most: what is missing then is missing.
    nearest = search.nearest(list(needed))
    missing = [name for group in groups if not group.found for name in group.names if nearest(name) not in known]
    missing = missing or [name for name in needed if nearest(name) not in known] or list(needed)
    raise SourceError(
        f"{where}: {len(missing)} of {len(needed)} adapted weights are not in the base{among}, for example "
        f"{missing[0]!r}; the base has names like {next(iter(base), 'none at all')!r}"
    )


def match_others(
    rename: Renaming,
    needed: Collection[str],
    others: Collection[str],
    base: Collection[str],
    where: object,
    *,
    fits: Fits,
    prefix: str | None = None,
) -> Renaming:
    """``rename``, and for other names that it does not bring to the base's, the change that does, if there is one.

    So a head that is saved whole beside the LoRA of a language model is found, although the base's name of it has changed in another
    way; one that is new to the base is not.

    Args:
        rename: the renaming of ``needed``.
        needed: the adapter's names that are in the base.
        others: its names that may be new to the base.
        base: the base's names.
        where: the adapter, for messages.
        fits: whether a tensor of the base, the second name, can be the first.
        prefix: the user's, as in :func:`match_names`.

    Raises:
        AmbiguousNames: one of ``others`` could be several of the base's.
    """
    lacking = [name for name in others if rename(name) not in base]
    if lacking:
        tails = {".".join(name.split(".")[-2:]) for name in base}
        lacking = [name for name in lacking if ".".join(name.split(".")[-2:]) in tails]
    if len(lacking) > _MOST_GROUPS:
        raise AmbiguousNames(
            f"{where}: {len(lacking)} whole tensors are not in the base, {lacking[0]!r} for example, and many could be"
        )
    found = {}
    for name in lacking:
        try:
            joint = match_names([*needed, name], base, where, fits=fits, prefix=prefix)
        except AmbiguousNames:
            raise
        except SourceError:  # new to the base
            continue
        if fits(name, joint(name)):
            found[name] = joint(name)
    taken = {rename(name) for name in (*needed, *others)}
    if twice := [name for name, new in found.items() if new in taken]:
        raise AmbiguousNames(
            f"{where}: {twice[0]!r} could be {found[twice[0]]!r} of the base, which another tensor is"
        )
    return RenamingWithOthers(rename=rename, others=found) if found else rename


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
    statements: Sequence[Statement] = (),
) -> Renaming:
    """The only one of several renamings, the only one that fits, or the only one that all statements allow.

    Raises:
        AmbiguousNames: there are several.
    """
    if len(found) > 1 and fits is not None:
        found = [rename for rename in found if all(fits(name, rename(name)) for name in needed)] or found
    if len(found) > 1:
        found = _stated(found, needed, statements)
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


def _stated(
    found: Sequence[Renaming], needed: Collection[str], statements: Sequence[Statement]
) -> Sequence[Renaming]:
    """The only renaming that all statements allow, with the reason; or all, if they leave several or none."""
    left, words = list(found), []
    for statement in statements:
        allowed = [rename for rename in found if all(statement.allows(name, rename(name)) for name in needed)]
        if allowed or statement.is_about_base:
            left = [rename for rename in left if rename in allowed]
            words += [statement.words] if len(allowed) < len(found) else []
    return [left[0].reasoned(f"{' and '.join(words)} says")] if len(left) == 1 else found


@dataclass(frozen=True)
class _Group:
    """Names that change in one way.

    Attributes:
        names: the names.
        found: the ways that are possible.
        is_chosen: whether these are those that the user's prefix allows.
    """

    names: list[str]
    found: list[Renaming] = field(default_factory=list)
    is_chosen: bool = False

    @property
    def towers(self) -> frozenset[str]:
        """The towers that the names tell."""
        return _towers(self.names[0])

    def added(self, rename: Renaming) -> frozenset[str]:
        """The towers that only the renamed names tell."""
        return _towers(rename(self.names[0])) - self.towers

    def fitting(self, fits: Fits) -> list[Renaming]:
        """The ways that shapes allow, or all if they allow none."""
        if len(self.found) < 2:
            return self.found
        return [
            rename for rename in self.found if all(fits(name, rename(name)) for name in self.names)
        ] or self.found


def _towers(name: str) -> frozenset[str]:
    return towers_in(".".join(leading(name)))


class _Search:
    """Finds renamings to the names of one base."""

    def __init__(self, known: Collection[str], prefix: str | None, where: object) -> None:
        self.known, self.prefix, self.where = known, prefix, where
        self._known_facts: dict[str, tuple[list[str], frozenset[str]]] = {}
        # The prefixes of known names by what follows them, of two parts or more.
        self._prefixes: dict[str, list[str]] = defaultdict(list)
        for name in known:
            start = 0
            for _ in range(DEPTH):
                start = name.find(".", start) + 1
                if not start or "." not in name[start:]:
                    break
                self._prefixes[name[start:]].append(name[:start])

    def groups(self, names: list[str]) -> list[_Group]:
        """The names in as few groups as it takes to find each group's names; [] if there are too many groups."""
        return found if len(found := self._groups(names)) <= _MOST_GROUPS else []

    def nearest(self, names: list[str]) -> Renaming:
        """A renaming that finds many of the names."""
        if len(names) > _SAMPLE:
            names = names[:: len(names) // _SAMPLE][:_SAMPLE]
        votes = Counter(rename for name in names for rename in self._possible([name]) if not rename.old)
        return votes.most_common(1)[0][0] if votes else Renaming()

    def _groups(self, names: list[str]) -> list[_Group]:
        found = self._finding_all(names)
        if self.prefix is None:
            if found:
                return [_Group(names, found)]
        elif chosen := self._chosen(names, found):
            return [_Group(names, chosen, is_chosen=True)]
        parts = _divided(names)
        if len(parts) > _MOST_GROUPS:
            return [_Group(part) for part in parts]
        inner = [group for part in parts for group in self._groups(part)]
        if inner and (not found or any(group.is_chosen for group in inner)):
            return inner
        if found and all(name in self.known for name in names):
            found = [Renaming()]
        return [_Group(names, found)]

    def _chosen(self, names: list[str], found: list[Renaming]) -> list[Renaming]:
        prefix = self.prefix or ""
        exact = [rename for rename in found if rename.new == prefix]
        return exact or [rename for rename in found if all(rename(name).startswith(prefix) for name in names)]

    def _finding_all(self, names: list[str]) -> list[Renaming]:
        """Each renaming that finds all names, those that change least first; those that find the same are one."""
        if self.prefix is None and all(name in self.known for name in names):
            return [Renaming()]
        ways = (
            rename
            for rename in self._possible(names)
            if len(names) == 1 or all(rename(name) in self.known for name in names)
        )
        found = list(islice(ways, _MOST_WAYS))
        if next(ways, None) is not None:
            raise AmbiguousNames(
                f"{self.where}: {names[0]!r} and the others fit the base in more than {_MOST_WAYS} ways"
            )
        found.sort(key=lambda r: (bool(r.old and r.new), r.old.count("."), r.new.count("."), r.new))
        # Names that tell a tower are of this tower; they may leave it out only if nothing else is there.
        found = [rename for rename in found if _towers(names[0]) <= _towers(rename(names[0]))] or found
        # All names start with what is removed, so what one name becomes tells what all become.
        return list({rename(names[0]): rename for rename in reversed(found)}.values())[::-1]

    def _possible(self, names: list[str]) -> Iterator[Renaming]:
        """Each renaming that finds the first name and keeps numbers and towers."""
        first = names[0]
        for old in ["", *leading_parts([first], rest=2)]:
            if not all(name.startswith(old) for name in names):
                return
            tail = first.removeprefix(old)
            added = dict.fromkeys(self._prefixes.get(tail, ()))
            if tail in self.known:
                added[""] = None
            if self.prefix and self.prefix + tail in self.known:
                added[self.prefix] = None
            digits, towers = self._facts(old)
            for new in added:
                others, theirs = self._facts(new)
                if digits == others and (not towers or not theirs or towers & theirs):
                    yield Renaming(old, new)

    def _facts(self, prefix: str) -> tuple[list[str], frozenset[str]]:
        """The numbers in a prefix, and the towers that it names."""
        if prefix not in self._known_facts:
            self._known_facts[prefix] = numbers(prefix), towers_in(prefix)
        return self._known_facts[prefix]


def _divided(names: list[str]) -> list[list[str]]:
    """The names by tower or, if they are of one, by the first of their leading parts that differ; [] if none do."""
    leads = {name: leading(name) for name in names}
    keys: list[Callable[[str], object]] = [_towers]
    keys += [lambda name, depth=depth: leads[name][:depth] for depth in range(1, DEPTH + 1)]  # type: ignore[misc]
    for key in keys:
        parts: dict[object, list[str]] = {}
        for name in names:
            parts.setdefault(key(name), []).append(name)
        if len(parts) > 1:
            return list(parts.values())
    return []


def _apart(groups: list[_Group]) -> list[_Group]:
    """The groups without renamings of names that tell no tower into a tower that other names tell.

    Into that of text they may: its head (``lm_head``) is named without it.
    """
    told = frozenset().union(*(group.towers for group in groups)) - {"text"}
    return [
        group if group.towers else replace(group, found=[r for r in group.found if not group.added(r) & told])
        for group in groups
    ]


def _in_one_tower(groups: list[_Group]) -> list[_Group]:
    """The groups without renamings into other towers than a group that tells the same towers certainly goes to."""
    certain = {
        group.towers: added for group in groups if len(group.found) == 1 and (added := group.added(group.found[0]))
    }

    def narrowed(group: _Group) -> _Group:
        wanted = certain.get(group.towers)
        if wanted is None:
            return group
        kept = [rename for rename in group.found if group.added(rename) in (frozenset(), wanted)]
        return replace(group, found=kept or group.found)

    return [narrowed(group) for group in groups]
