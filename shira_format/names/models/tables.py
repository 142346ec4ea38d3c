"""Tables of the tensors of one model in two name spaces, read both ways.

The first name space is that of the model's authors (single files; ComfyUI and most trainers follow it), the second that of
diffusers. diffusers splits modules: one of the authors' tensors is one or several of diffusers', stacked by rows, some of
whose halves change places. A table names the tensors; their heights come from the checkpoint at hand, of which only names
and shapes are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod

from shira_format.names.models.locations import through, whole
from shira_format.names.row_blocks import Location, RowBlock, RowRanges

Shape = tuple[int, ...]
ShapeOf = Callable[[str], Shape]
# Rows and columns of a weight, and the number of its parts: the parts' heights, None if these cannot be.
Heights = Callable[[int, int, int], Sequence[int] | None]


def equal(rows: int, _columns: int, count: int) -> Sequence[int] | None:
    """Parts of equal height."""
    return None if rows % count else (rows // count,) * count


def queries_first(rows: int, columns: int, count: int) -> Sequence[int] | None:
    """Queries, as many as there are columns; then parts of equal height: keys and values may have fewer heads."""
    rest = equal(rows - columns, columns, count - 1)
    return None if rest is None or rows <= columns else (columns, *rest)


def square_but_last(rows: int, columns: int, count: int) -> Sequence[int] | None:
    """Square parts, and a last one that has the other rows."""
    last = rows - (count - 1) * columns
    return None if last <= 0 else (*[columns] * (count - 1), last)


@dataclass(frozen=True)
class Parts:
    """What one of the authors' modules is in diffusers.

    Attributes:
        names: diffusers' modules, top to bottom.
        heights: their numbers of rows, from those of the authors' weight.
        swapped: given rows and columns of the weight, whether its halves change places (of a single part): the authors
            compute shift, then scale; diffusers' layer scale, then shift.
        exists: given rows and columns of the weight, whether these are the names that diffusers has for it.
    """

    names: tuple[str, ...]
    heights: Heights = equal
    swapped: Callable[[int, int], bool] = lambda _rows, _columns: False
    exists: Callable[[int, int], bool] = lambda _rows, _columns: True


def swapped(name: str) -> Parts:
    """A module whose halves change places."""
    return Parts((name,), swapped=lambda _rows, _columns: True)


def stacked(*names: str, heights: Heights = equal) -> Parts:
    """Modules that are one for the authors."""
    return Parts(names, heights)


# From the authors' modules to those of diffusers.
Modules = dict[str, str | Parts]


@dataclass(frozen=True)
class _Rule:
    """One of the authors' tensors, its parts in diffusers, and the weight by whose shape they are counted; names in a block."""

    theirs: str
    ours: tuple[str, ...]
    weight: str
    parts: Parts


@dataclass(frozen=True)
class Block:
    """Tensors under one prefix, in which ``{}`` stands for a number or word that is the same on both sides.

    Attributes:
        theirs, ours: the prefix of the authors and that of diffusers.
        modules: from the authors' modules to diffusers'; each has a weight, and may have a bias.
        tensors: the same for single tensors.
        same: modules of the same name on both sides.
        fused: single tensors of the authors that are several of diffusers', of equal height.
    """

    theirs: str
    ours: str
    modules: Mapping[str, str | Parts] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def rules(self) -> tuple[_Rule, ...]:
        """Of all tensors, by names without the prefixes."""
        modules = {
            name: Parts((other,)) if isinstance(other, str) else other for name, other in self.modules.items()
        }
        modules |= {name: Parts((name,)) for name in self.same}
        return (
            *(
                _Rule(f"{name}.{kind}", tuple(f"{part}.{kind}" for part in parts.names), f"{name}.weight", parts)
                for name, parts in modules.items()
                for kind in ("weight", "bias")
            ),
            *(_Rule(name, (other,), name, Parts((other,))) for name, other in self.tensors.items()),
            *(_Rule(name, parts, name, Parts(parts)) for name, parts in self.fused.items()),
        )


@dataclass(frozen=True)
class Marks:
    """How a model's tensors are told from those of others.

    Attributes:
        some: tensors of which it has one.
        none: tensors that it never has, of models that share names with it.
    """

    some: tuple[str, ...]
    none: tuple[str, ...] = ()

    def fit(self, names: Collection[str]) -> bool:
        """Whether ``names`` (with quick look-up) are of this model."""
        return any(name in names for name in self.some) and not any(name in names for name in self.none)


@dataclass(frozen=True)
class Model:
    """One model in two name spaces; call it as a :data:`shira_format.names.spaces.Table`.

    Attributes:
        blocks: its tensors.
        theirs, ours: how the authors' and diffusers' tensors are told from those of other models.
        spellings: its tensors in further name spaces, of some trainers and of ComfyUI, as ``blocks``. A checkpoint may have
            these names too.
    """

    blocks: tuple[Block, ...]
    theirs: Marks
    ours: Marks
    spellings: tuple[Block, ...] = ()

    def __call__(self, names: Collection[str], shape: ShapeOf) -> dict[str, Location]:
        """See :data:`shira_format.names.spaces.Table`."""
        blocks = self.blocks + self.spellings
        if self.theirs.fit(names):
            found = dict(_split(_rules_of(blocks, names, ours=False), names, shape))
            return found | self._spelled(names, shape, found) if self.spellings else found
        if self.ours.fit(names):
            return dict(_joined(_rules_of(blocks, names, ours=True), names, shape))
        return {}

    def _spelled(self, names: Collection[str], shape: ShapeOf, found: dict[str, Location]) -> dict[str, Location]:
        """What a checkpoint with one of the spellings has in the others, by way of the tensors of diffusers in it."""
        hub = {name: whole(name, shape(name)) for name in names if shape(name)} | found
        rules = _rules_of(self.blocks + self.spellings, hub, ours=True)
        return {
            name: through(location, hub)
            for name, location in _joined(rules, hub, lambda name: hub[name].shape)
            if name not in names and name not in found
        }


# The authors' and that of diffusers, with numbers in place of ``{}``.
_Prefixes = tuple[str, str]


def _rules_of(blocks: Iterable[Block], names: Iterable[str], *, ours: bool) -> Iterator[tuple[_Rule, _Prefixes]]:
    """The rules of ``names`` in diffusers' (``ours``) or the authors' name space; each once for each number."""
    compiled = [_Compiled(block, ours=ours) for block in blocks]
    for name in names:
        for block in compiled:
            if (match := block.prefix.match(name)) is None:
                continue
            rules = block.rules.get(name[match.end() :])
            if rules is None:
                continue
            prefixes = block.block.theirs.format(*match.groups()), block.block.ours.format(*match.groups())
            for rule in rules:
                yield rule, prefixes


class _Compiled:
    """A block to look up names in; by diffusers' names, a rule is found by its first part alone."""

    def __init__(self, block: Block, *, ours: bool) -> None:
        self.block = block
        prefix = re.escape(block.ours if ours else block.theirs).replace(r"\{\}", r"([^.]+)")
        self.prefix = re.compile(prefix)
        self.rules: dict[str, list[_Rule]] = {}
        for rule in block.rules:
            self.rules.setdefault(rule.ours[0] if ours else rule.theirs, []).append(rule)


def _split(
    named: Iterable[tuple[_Rule, _Prefixes]], names: Collection[str], shape: ShapeOf
) -> Iterator[tuple[str, Location]]:
    """The tensors of diffusers in a checkpoint that has the authors'."""
    for rule, (theirs, ours) in named:
        tensor, weight = theirs + rule.theirs, theirs + rule.weight
        size = shape(tensor)
        if not size or weight not in names:
            continue
        rows, columns = _matrix(shape(weight))
        heights = rule.parts.heights(rows, columns, len(rule.ours))
        if heights is None or sum(heights) != size[0] or not rule.parts.exists(rows, columns):
            continue
        swap = rule.parts.swapped(rows, columns)
        if swap and rows % 2:
            continue
        start = 0
        for part, height in zip(rule.ours, heights, strict=True):
            yield (
                ours + part,
                Location((height, *size[1:]), (RowBlock(tensor, start, _ranges(height, swap=swap)),)),
            )
            start += height


def _joined(
    named: Iterable[tuple[_Rule, _Prefixes]], names: Collection[str], shape: ShapeOf
) -> Iterator[tuple[str, Location]]:
    """The authors' tensors in a checkpoint that has diffusers'; those whose parts are all there."""
    for rule, (theirs, ours) in named:
        tensors = [ours + part for part in rule.ours]
        if not all(tensor in names and shape(tensor) for tensor in tensors):
            continue
        sizes = [shape(tensor) for tensor in tensors]
        if len({size[1:] for size in sizes}) > 1:
            continue
        height = sum(size[0] for size in sizes)
        if len(tensors) == 1:
            weight = f"{tensors[0].rpartition('.')[0]}.weight"
            swap = rule.parts.swapped(*_matrix(shape(weight if weight in names else tensors[0])))
            if swap and height % 2:
                continue
            blocks = [RowBlock(tensors[0], 0, _ranges(height, swap=swap))]
        else:
            stops = list(accumulate(size[0] for size in sizes))
            blocks = [
                RowBlock(tensor, 0, ((stop - size[0], stop),))
                for tensor, size, stop in zip(tensors, sizes, stops, strict=True)
            ]
        yield theirs + rule.theirs, Location((height, *sizes[0][1:]), tuple(blocks))


def _matrix(size: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix; of a lone number none."""
    return (size[0], prod(size[1:])) if size else (0, 0)


def _ranges(height: int, *, swap: bool) -> RowRanges:
    """All rows in order, or the second half before the first."""
    return ((height // 2, height), (0, height // 2)) if swap else ((0, height),)


def known(names: Collection[str]) -> Collection[str]:
    """The same names, with quick look-up."""
    return names if isinstance(names, AbstractSet | Mapping) else frozenset(names)
