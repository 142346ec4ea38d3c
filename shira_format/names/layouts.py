"""Where the tensors of an adapter are in a model or checkpoint that may hold them under other names, in others, or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from shira_format.errors import SourceError
from shira_format.names.components import part_of
from shira_format.names.placement import Layout, ModelLayout, Placement, Shape, in_place
from shira_format.names.row_blocks import Location
from shira_format.names.spaces import other_names

Rename = Callable[[str], str]

# The renaming that brings an adapter's names to those that a layout knows; None if there is none.
Match = Callable[[ModelLayout], Rename | None]


@dataclass(frozen=True)
class RenamedLayout:
    """The layout ``inner`` for other names; tensors that are new to the base keep theirs."""

    inner: ModelLayout
    rename: Rename
    new: frozenset[str]

    def place(self, name: str, shape: Shape) -> Placement:
        """See :class:`shira_format.names.placement.Layout`."""
        found = self.rename(name)
        if name in self.new and found not in self.inner.names and found not in self.inner.locations:
            return in_place(name, name, shape)
        return replace(self.inner.place(found, shape), tensor=name)


def find_layout(
    names: Mapping[str, str], shapes: Mapping[str, Shape], match: Match, new: frozenset[str] = frozenset()
) -> Layout | None:
    """The layout of a model or checkpoint for an adapter's names; None if neither its names nor a known model's have them.

    Args:
        names: the tensors of the model, by the names that an adapter may have for them; those of a part of a pipeline start
            with it (:func:`shira_format.names.components.part_of`).
        shapes: of these tensors; one without a shape is left out.
        match: finds the renaming.
        new: the adapter's tensors that are new to its base.

    Raises:
        SourceError: several parts of a pipeline have them.
    """
    found = []
    for part, space in _spaces(names, shapes):
        if (rename := match(space)) is not None:
            found.append((part, RenamedLayout(space, rename, new)))
            if not part:
                break  # all parts of a pipeline are in this one
    if len(found) > 1:
        raise SourceError(f"may be those of {' and '.join(repr(part) for part, _ in found)}")
    return found[0][1] if found else None


def _spaces(names: Mapping[str, str], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, ModelLayout]]:
    """The names that tensors may have in other programs: of the whole model (""), and of each part of a pipeline alone."""
    parts: dict[str, dict[str, str]] = {}
    for name, target in names.items():
        if target in shapes:
            part = part_of(name)
            parts.setdefault(part, {})[name.removeprefix(part)] = target
    found = {part: _locations(inner, shapes) for part, inner in parts.items()}
    together = {part + name: location for part, locations in found.items() for name, location in locations.items()}
    yield "", ModelLayout(shapes, {name: target for name, target in names.items() if target in shapes}, together)
    for part, locations in found.items():
        if part:
            yield part, ModelLayout(shapes, parts[part], locations)


def _locations(names: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, Location]:
    """The tensors of other programs, and where they are in the model's."""
    found = other_names(names.keys(), lambda name: shapes[names[name]])
    return {
        name: Location(location.shape, tuple(replace(block, name=names[block.name]) for block in location.blocks))
        for name, location in found.items()
    }
