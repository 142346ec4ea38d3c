"""Names that differ in one prefix.

A model with a head on top (``BertForSequenceClassification``) calls its weights ``bert.encoder...`` where the checkpoint
of the bare model says ``encoder...``, or the other way round; ``model.layers...`` in memory may be ``backbone.layers...``
on disk. The renamings tried are: none, one prefix removed, added or replaced. Nothing else is guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from shira_format.errors import SourceError

_DEPTH = 3  # parts of a name that a prefix may have


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


def renamings(removed: Iterable[str], added: Iterable[str]) -> Iterator[Renaming]:
    """Each way that changes at most one prefix: none, one of ``removed`` left out, one of ``added`` put in front."""
    yield Renaming()
    yield from (Renaming(old=prefix) for prefix in removed)
    yield from (Renaming(new=prefix) for prefix in added)


def match_names(needed: Collection[str], base: Collection[str], where: object) -> Renaming:
    """The renaming under which every needed name is in ``base``: the first in the order of the module's description.

    Raises:
        SourceError: there is none, or a prefix could be replaced in several ways; the message names keys that did not match.
    """
    known = set(base)
    ours, theirs = (leading_parts(sorted(names), rest=2) for names in (needed, known))
    common = [prefix for prefix in ours if all(name.startswith(prefix) for name in needed)]
    for rename in renamings(common, theirs):
        if all(rename(name) in known for name in needed):
            return rename
    for old in common:
        # A base may have several stacks of like names (text, vision). A longer ``old`` would only find the same again.
        if found := [
            rename
            for rename in (Renaming(old, new) for new in theirs)
            if all(rename(name) in known for name in needed)
        ]:
            if len(found) == 1:
                return found[0]
            break
    missing = [name for name in needed if name not in known]
    raise SourceError(
        f"{where}: {len(missing)} of {len(needed)} adapted weights are not in the base, for example "
        f"{missing[0]!r}; the base has names like {next(iter(base), 'none at all')!r}"
    )
