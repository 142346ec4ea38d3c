"""Match the tensors of a merged checkpoint with the base's: by name, or up to one common prefix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.names.prefixes import AmbiguousNames, Renaming, leading_parts, renamings

_WRAPPED = re.compile(
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)|\.(base_layer|modules_to_save)\."
)
_ADDED = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


@dataclass(frozen=True)
class MergedNames:
    """The names of a merged checkpoint.

    Attributes:
        names: the names in the merged checkpoint, by those in the base (of a new tensor, in the LoRA).
        wrapped: a key that only an unmerged PEFT model has; None if there is none.
        alone: whether it holds only a LoRA.
        notices: how names were mapped.
    """

    names: Mapping[str, str]
    wrapped: str | None
    alone: bool
    notices: list[str]

    def of(self, name: str) -> str | None:
        """The name in the merged checkpoint, or None if it has no such tensor."""
        return self.names.get(name)


def renamed(
    adapted: Collection[str], base: Checkpoint, merged: Checkpoint, prefix: str | None = None
) -> MergedNames:
    """Find the names in ``merged`` by the mapping that matches most adapted tensors, then most tensors.

    If several find equally many, shapes decide, or ``prefix``, with which all names that are looked at start.

    Raises:
        SourceError: no mapping matches any, or several do.
    """
    added = [name for name in merged if _ADDED.search(name)]
    wrapped = added[0] if added else next((name for name in merged if _WRAPPED.search(name)), None)
    plain = {name: _unwrapped(name) for name in merged if not _ADDED.search(name)}
    known = {*base, *adapted}
    ways: dict[tuple[tuple[str, str], ...], _Way] = {}
    for rename in renamings(_prefixes(plain.values()), _prefixes(known)):
        found: dict[str, str] = {}
        for name, inner in plain.items():
            # A known name stays as it is, such as that of a head without the prefix of the body.
            found.setdefault(inner if inner in known else rename(inner), name)
        if prefix is not None:
            found = {name: theirs for name, theirs in found.items() if theirs.startswith(prefix)}
        hits = sum(name in found for name in adapted), sum(name in found for name in base)
        if any(hits):
            # Mappings that find the same tensors are one.
            ways.setdefault(tuple((n, found[n]) for n in known if n in found), _Way(hits, found, rename))
    if not ways:
        if wrapped is not None and not plain:
            return MergedNames({}, wrapped, True, [])
        raise SourceError(
            f"{merged.path}: no tensor of the base is in it: the base has names like "
            f"{next(iter(base), None)!r}, it has names like {next(iter(merged), None)!r}"
        )
    most = max(way.hits for way in ways.values())
    best = [way for way in ways.values() if way.hits == most]
    if not best[0].rename.words:  # no prefix changes: certain
        best = best[:1]
    if len(best) > 1:
        best = [
            way for way in best if all(_fits(n, base, found, merged) for n, found in way.found.items())
        ] or best
    if len(best) > 1:
        others = ", or ".join(way.rename.words for way in best[:4])
        raise AmbiguousNames(
            f"{merged.path}: its names fit the base in several ways: {others}; choose with --merged-prefix, what the names "
            "in it start with"
        )
    (way,) = best
    return MergedNames(way.found, wrapped, False, way.rename.notices("the merged checkpoint"))


@dataclass(frozen=True)
class _Way:
    """How many adapted tensors and tensors of the base a renaming finds, and their names in the merged checkpoint."""

    hits: tuple[int, int]
    found: dict[str, str]
    rename: Renaming


def _fits(name: str, base: Checkpoint, found: str, merged: Checkpoint) -> bool:
    return name not in base or base.shape(name) == merged.shape(found)


def _unwrapped(name: str) -> str:
    """The name without the parts that PEFT inserts; ``original_module`` is what ``modules_to_save`` replaces, and is kept."""
    return re.sub(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)", "", name)


def _prefixes(names: Iterable[str]) -> list[str]:
    """The leading parts of the names, and the components of a pipeline, shortest first."""
    found: set[str] = set()
    for name in names:
        component, slash, rest = name.rpartition("/")
        found.update(component + slash + part for part in ["", *leading_parts([rest])])
    return sorted(found - {""}, key=lambda prefix: (prefix.count("."), prefix))
