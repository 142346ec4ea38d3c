"""From the names in an adapter to those in a live model, which may differ in one prefix, or be those of another program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shira_format.checkpoints.wrapped import unwrapped_names
from shira_format.entries.loaded import LoadedAdapter
from shira_format.errors import BaseMismatch, SourceError
from shira_format.names.layouts import Rename, find_layout
from shira_format.names.placement import Layout, Shape
from shira_format.names.prefixes import AmbiguousNames, match_names


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
        shapes = {target: shape for target in names.values() if (shape := _shape(live[target])) is not None}
        new = frozenset(tensor.name for tensor in adapter.dense) - frozenset(needed)
        try:
            return find_layout(
                names, shapes, lambda space: self._match(adapter, needed, space.known, space.shape_of), new
            )
        except SourceError as error:
            raise BaseMismatch(
                f"{adapter.where}tensor {needed[0]!r} and the others {error}: choose by prefix= or rename="
            ) from None

    def _keeping_new_names(self, adapter: LoadedAdapter, live: Mapping[str, Any], rename: Rename) -> Rename:
        """As ``rename``, but tensors that are new to the base, such as a head, may keep their names in the model."""
        if not self._keeps_new:
            return rename
        new = {whole.name for whole in adapter.dense if whole.base_digest is None}
        return lambda name: name if name in new and rename(name) not in live else rename(name)


def _needed(adapter: LoadedAdapter) -> list[str]:
    """The names of the adapter's tensors that the model must have."""
    whole = [tensor.name for tensor in adapter.dense if tensor.base_digest is not None]
    return [*(tensor.name for tensor in adapter.tensors), *whole]


def _shape(weight: Any) -> Shape | None:
    shape = getattr(weight, "shape", None)
    return None if shape is None else tuple(shape)
