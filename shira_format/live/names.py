"""From the names in an adapter to those in a live model, which may differ in one prefix, or be those of another program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shira_format.checkpoints.wrapped import unwrapped_names
from shira_format.errors import BaseMismatch, SourceError
from shira_format.live.loaded import LoadedAdapter
from shira_format.names.placement import Layout, ModelLayout, Placement, Shape, in_place
from shira_format.names.prefixes import AmbiguousNames, match_names
from shira_format.names.row_blocks import Location
from shira_format.names.spaces import other_names

Rename = Callable[[str], str]


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a model: by names, or by a layout.

    Attributes:
        rename: the function from a name in the adapter to one in the model.
        layout: where the adapter's tensors are, if not each in one of the model's.
    """

    rename: Rename = str
    layout: Layout | None = None


class Names:
    """How the names of adapters become those of a model."""

    def __init__(self, prefix: str | None = None, rename: Rename | None = None) -> None:
        """Args: ``prefix`` and ``rename``: those of a switcher, at most one of them; by default names are found."""
        self._given = rename if prefix is None else prefix.__add__
        self._keeps_new = rename is None

    def fit(self, adapter: LoadedAdapter, live: Mapping[str, Any]) -> Fit:
        """How the adapter's names fit those of the model.

        Raises:
            BaseMismatch: they do not, or in several ways.
        """
        needed = _needed(adapter)
        # By the live name; a dictionary of a wrapped model's tensors has the words of wrappers in names.
        names: Mapping[str, str] = {name: name for name in live}
        if not all(self._default(name) in names for name in needed):
            names = unwrapped_names(live, None, adapter.label)
        if (rename := self._match(adapter, needed, names, lambda name: _shape(live[names[name]]))) is not None:
            return Fit(self._keeping_new_names(adapter, live, lambda name: names.get(rename(name), rename(name))))
        if (layout := self._layout(adapter, needed, live, names)) is not None:
            return Fit(layout=layout)
        if self._given is not None:
            return Fit(self._keeping_new_names(adapter, live, self._given))  # what is missing is told by name
        missing = next(name for name in needed if name not in live)
        raise BaseMismatch(
            f"{adapter.where}tensor {missing!r}: the model has no {missing!r}, but names like "
            f"{next(iter(live), 'none at all')!r} (map them by prefix= or rename=)"
        )

    def _default(self, name: str) -> str:
        return name if self._given is None else self._given(name)

    def _match(
        self,
        adapter: LoadedAdapter,
        needed: Sequence[str],
        names: Collection[str],
        shape_of: Callable[[str], Shape | None],
    ) -> Rename | None:
        """The renaming under which all names are among ``names``; None if there is none.

        Raises:
            BaseMismatch: there are several.
        """
        if self._given is not None:
            return self._given if all(self._given(name) in names for name in needed) else None
        shapes = {tensor.name: tensor.shape for tensor in adapter.tensors}

        def fits(name: str, found: str) -> bool:
            return name not in shapes or shape_of(found) in (None, shapes[name])

        try:
            return match_names(needed, names, adapter.label, fits=fits, option="prefix=")
        except AmbiguousNames as error:
            raise BaseMismatch(f"{error} or rename=") from None
        except SourceError:
            return None

    def _layout(
        self, adapter: LoadedAdapter, needed: Sequence[str], live: Mapping[str, Any], names: Mapping[str, str]
    ) -> Layout | None:
        """Where the tensors are of an adapter that has another program's names; None if no table has them.

        Raises:
            BaseMismatch: several parts of a pipeline have them.
        """
        new = frozenset(tensor.name for tensor in adapter.dense) - frozenset(needed)
        found = []
        for part, space in _spaces(live, names):
            known = sorted({*space.names, *space.locations})
            if (rename := self._match(adapter, needed, known, space.shape_of)) is not None:
                found.append((part, _Renamed(space, rename, new)))
                if not part:
                    break  # all parts of a pipeline are in this one
        if len(found) > 1:
            parts = " and ".join(repr(part) for part, _ in found)
            raise BaseMismatch(
                f"{adapter.where}tensor {needed[0]!r} and the others may be those of {parts}: choose by prefix= or rename="
            )
        return found[0][1] if found else None

    def _keeping_new_names(self, adapter: LoadedAdapter, live: Mapping[str, Any], rename: Rename) -> Rename:
        """As ``rename``, but tensors that are new to the base, such as a head, may keep their names in the model."""
        if not self._keeps_new:
            return rename
        new = {whole.name for whole in adapter.dense if whole.base_digest is None}
        return lambda name: name if name in new and rename(name) not in live else rename(name)


@dataclass(frozen=True)
class _Renamed:
    """The layout ``inner`` for other names; tensors that are new to the base keep theirs."""

    inner: ModelLayout
    rename: Rename
    new: frozenset[str]

    def place(self, name: str, shape: Shape) -> Placement:
        found = self.rename(name)
        if name in self.new and found not in self.inner.names and found not in self.inner.locations:
            return in_place(name, name, shape)
        return replace(self.inner.place(found, shape), tensor=name)


def _needed(adapter: LoadedAdapter) -> list[str]:
    """The names of the adapter's tensors that the model must have."""
    whole = [tensor.name for tensor in adapter.dense if tensor.base_digest is not None]
    return [*(tensor.name for tensor in adapter.tensors), *whole]


def _spaces(live: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[tuple[str, ModelLayout]]:
    """The names that tensors may have in other programs: of the whole model (""), and of each part of a pipeline alone."""
    shapes = {target: shape for target in names.values() if (shape := _shape(live[target])) is not None}
    parts: dict[str, dict[str, str]] = {}
    for name, target in names.items():
        if target in shapes:
            part, slash, rest = name.rpartition("/")
            parts.setdefault(part + slash, {})[rest] = target
    found = {part: _locations(inner, shapes) for part, inner in parts.items()}
    together = {part + name: location for part, locations in found.items() for name, location in locations.items()}
    yield (
        "",
        ModelLayout(shapes, {name: name_ for name, name_ in names.items() if name_ in shapes}, together),
    )
    for part, locations in found.items():
        if part:
            yield part, ModelLayout(shapes, parts[part], locations)


def _locations(names: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, Location]:
    """The tensors of other programs, and where they are in the live ones."""
    found = other_names(names.keys(), lambda name: shapes[names[name]])
    return {
        name: Location(location.shape, tuple(replace(block, name=names[block.name]) for block in location.blocks))
        for name, location in found.items()
    }


def _shape(weight: Any) -> Shape | None:
    shape = getattr(weight, "shape", None)
    return None if shape is None else tuple(shape)
