"""The modules that a LoRA file names, in the base: by the base's own names, or by those that other programs give them.

In kohya's and LyCORIS' names "." has become "_". Such a name can be read in many ways (``a_b_c``: ``a.b.c``, ``a_b.c``...), so
it is looked up among the flattened names of the base's modules. A name that two modules share is refused. One prefix, the
same for all, may be missing or in excess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError
from shira_format.names.prefixes import Renaming, leading_parts, match_names, numbers, only_one, renamings
from shira_format.names.row_blocks import Location, RowBlock
from shira_format.names.spaces import other_names

_WEIGHT = ".weight"
_MOST_LEADS = 64  # prefixes behind which known models are looked for

# Whether a module of the base, at the second argument, has the shape that the LoRA needs for the first.
Fits = Callable[[str, Location], bool]


def flat(module: str) -> str:
    """The name of a module as kohya writes it."""
    return module.replace(".", "_")


class Modules:
    """The modules of one component of a base."""

    def __init__(self, base: Checkpoint, prefix: str, tensors: Collection[str]) -> None:
        """Args: ``prefix``: of the names of the component's ``tensors`` in ``base``."""
        self._base, self._prefix = base, prefix
        self._tensors = dict.fromkeys(tensors)
        self._others = self._other_names()

    def resolve(
        self, needed: Collection[str], where: str, *, fits: Fits, prefix: str | None = None, is_flat: bool = False
    ) -> tuple[dict[str, str], Renaming]:
        """The name under which each needed module is known here, and the renaming that finds it.

        Args:
            needed: names of modules.
            where: file and component, for messages.
            fits: decides if several renamings are possible.
            prefix: the user's choice: what the names in the component start with.
            is_flat: whether "." is "_" in the needed names.

        Raises:
            SourceError: one is not in the base, or could be several modules.
        """
        if is_flat:
            return self._resolve_flat(needed, where, fits, prefix)
        # Weights first: one is shown as an example of the base's names.
        ordered = sorted(self._names, key=lambda module: not self._names[module].endswith(_WEIGHT))
        known = {f"{module}{_WEIGHT}": module for module in ordered}
        rename = match_names(
            [f"{module}{_WEIGHT}" for module in needed], known, where, prefix=prefix,
            fits=lambda name, found: fits(name.removesuffix(_WEIGHT), self.weight(known[found])),
        )  # fmt: skip
        return {module: known[rename(f"{module}{_WEIGHT}")] for module in needed}, rename

    def is_other(self, module: str) -> bool:
        """Whether a known module is one under a name that the base does not have."""
        return self._names[module] not in self._tensors

    def weight(self, module: str) -> Location:
        """Where the weight of a known module is in the base."""
        found = self.tensor(self._names[module])
        assert found is not None
        return found

    def tensor(self, name: str) -> Location | None:
        """Where a tensor of the component is in the base, by its own name or another program's; None if nowhere."""
        if name in self._tensors:
            shape = self._base.shape(self._prefix + name)
            rows = shape[0] if shape else 1
            return Location(shape, (RowBlock(self._prefix + name, 0, ((0, rows),)),))
        if (found := self._others.get(name)) is None:
            return None
        return _under(self._prefix, found)

    def _other_names(self) -> dict[str, Location]:
        """The names in other programs; of several models with prefixes before their names, all of them."""
        if found := self._other_names_behind(""):
            return found
        for lead in self._leads():
            for name, location in self._other_names_behind(lead).items():
                found.setdefault(name, location)
        return found

    def _other_names_behind(self, lead: str) -> dict[str, Location]:
        names = {name.removeprefix(lead): name for name in self._tensors if name.startswith(lead)}
        others = other_names(names, lambda name: self._base.shape(self._prefix + names[name]))
        return {lead + name: _under(lead, location) for name, location in others.items()}

    def _leads(self) -> list[str]:
        """The most frequent prefixes, without numbers, of the component's tensors."""
        counts = Counter(lead for name in self._tensors for lead in leading_parts([name]) if not numbers(lead))
        return [lead for lead, _ in counts.most_common(_MOST_LEADS)]

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """The tensor of each module, the base's own first; a tensor that is no ``weight`` is known by its whole name."""
        found: dict[str, str] = {}
        for name in (*self._tensors, *self._others):
            found.setdefault(name.removesuffix(_WEIGHT), name)
        return found

    @cached_property
    def _flat(self) -> dict[str, list[str]]:
        """The modules by their flat names."""
        found: dict[str, list[str]] = {}
        for module, tensor in self._names.items():
            if tensor.endswith(_WEIGHT) and (tensor in self._others or self._base.shape(self._prefix + tensor)):
                found.setdefault(flat(module), []).append(module)
        return found

    def _resolve_flat(
        self, needed: Collection[str], where: str, fits: Fits, prefix: str | None
    ) -> tuple[dict[str, str], Renaming]:
        ways = [
            rename
            for rename in self._renamings(needed, prefix)
            if all(flat(rename(n)) in self._flat for n in needed)
        ]
        # Renamings that find the same modules are one.
        ways = list({tuple(flat(rename(n)) for n in needed): rename for rename in reversed(ways)}.values())[::-1]
        if not ways:
            possible = [Renaming(), *self._renamings(needed, prefix)]
            nearest = max(possible, key=lambda rename: sum(flat(rename(n)) in self._flat for n in needed))
            missing = next((n for n in needed if flat(nearest(n)) not in self._flat), next(iter(needed)))
            near = get_close_matches(missing, self._flat, 2, 0.8)
            hint = f"; there is {' and '.join(map(repr, near))}" if near else ""
            among = "" if prefix is None else f" under --prefix {prefix}"
            raise SourceError(f"{where}: the base has no module{among} that is written {missing!r}{hint}")
        rename = only_one(
            ways, needed, where,
            fits=lambda n, found: any(fits(n, self.weight(module)) for module in self._flat[flat(found)]),
        )  # fmt: skip
        return {name: self._only(flat(rename(name)), name, where) for name in needed}, rename

    def _only(self, key: str, name: str, where: str) -> str:
        found = {self.weight(module): module for module in reversed(self._flat[key])}
        if len(found) > 1:
            names = ", ".join(repr(module) for module in self._flat[key])
            raise SourceError(f"{where}: {name!r} could be any of the base's modules {names}")
        return next(iter(found.values()))

    def _renamings(self, needed: Collection[str], prefix: str | None) -> Iterator[Renaming]:
        """All that are possible; none but the empty one if that is enough."""
        if prefix is not None:
            names = {key: modules[0] for key, modules in self._flat.items()}
            ways = renamings(self._common_parts(needed), dict.fromkeys([*self._leading_parts(), prefix]))
            return (
                rename
                for rename in ways
                if rename.new == prefix
                or all(names.get(flat(rename(name)), "").startswith(prefix) for name in needed)
            )
        if all(name in self._flat for name in needed):
            return iter([Renaming()])
        return renamings(self._common_parts(needed), self._leading_parts())

    @staticmethod
    def _common_parts(needed: Collection[str]) -> list[str]:
        """The leading parts that all flat names share, but for those with numbers."""
        ours = leading_parts(list(needed)[:1], "_")
        return [
            prefix
            for prefix in ours
            if all(name.startswith(prefix) for name in needed) and not numbers(prefix.replace("_", "."))
        ]

    def _leading_parts(self) -> list[str]:
        return leading_parts(sorted(module for modules in self._flat.values() for module in modules))


def _under(prefix: str, location: Location) -> Location:
    """``location`` with a prefix before the names of its tensors."""
    return replace(location, blocks=tuple(replace(block, name=prefix + block.name) for block in location.blocks))
