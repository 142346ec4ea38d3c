"""An adapter's file on the tensors of a base that holds them under other names, in others, or in several.

Adapters are made for the names of one checkpoint. Another checkpoint of the same model may be in another form: diffusers'
or its authors' names, experts one by one or in 3-D tensors. The entries are the same; they only lie elsewhere. They are moved
as for a live model (:mod:`shira_format.entries.placed`), to a temporary file, tensor by tensor: everything that reads
adapter files then works on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shira_format._core.arrays import array_digest
from shira_format._core.notices import NamesNotice
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint
from shira_format.entries.placed import place_adapter
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import AdapterFile, AdapterWriter
from shira_format.format.manifest import DERIVED
from shira_format.names.filters import NOT_CHOSEN
from shira_format.names.layouts import Rename, find_layout
from shira_format.names.located import LocatedCheckpoint
from shira_format.names.models.experts import why_not
from shira_format.names.placement import Layout, ModelLayout, Placement, Shape
from shira_format.names.prefixes import AmbiguousNames, match_names
from shira_format.names.row_blocks import Location, RowBlock
from shira_format.tensors import DenseTensor, SparseTensor

Chosen = Callable[[str], bool]


@dataclass(frozen=True)
class Moved:
    """An adapter's file by the names of its base.

    Attributes:
        file: the file to read.
        chosen: whether a tensor of it is chosen, by name.
        notices: what was done with names.
        left_out: names of the adapter's tensors that are not chosen.
    """

    file: AdapterFile
    chosen: Chosen
    notices: tuple[NamesNotice, ...] = ()
    left_out: tuple[str, ...] = ()


@contextmanager
def on_base(
    source: AdapterFile, base: Checkpoint | None, chosen: Chosen, *, alpha: float | None = None
) -> Iterator[Moved]:
    """The chosen tensors of ``source`` by the names of ``base``: the file itself, or a temporary one.

    Args:
        source: the adapter. A mask, a patch of a full checkpoint and what is not found are not moved.
        base: the checkpoint that it is applied to; None: nothing is moved.
        chosen: whether a tensor is taken, by its name in the adapter.
        alpha: the strength at which it will be applied; None for the adapter's own.

    Raises:
        BaseMismatch: the base has its tensors in several ways, or holds other values; parts of a tensor are replaced, at a
            strength other than 1.
        SourceError: one tensor of the base gets targets and deltas.
        FormatError: the file is damaged.
    """
    source.base = base if base is not None else source.base
    manifest = source.manifest
    left_out = tuple(name for name in (*manifest.tensors, *manifest.whole, *manifest.removed) if not chosen(name))
    strength = float(manifest.raw.get("alpha", 1.0)) if alpha is None else alpha
    layout = None if base is None or strength == 0 else _layout(source, base, chosen)
    if base is None or layout is None:
        yield Moved(source, chosen, left_out=left_out)
        return
    mover = _Mover(source, base, layout, chosen, strength)
    with tempfile.TemporaryDirectory(prefix="shira-") as folder:
        path = Path(folder) / "moved.st"
        mover.write(path)
        file = AdapterFile(path)
        file.path = source.path  # for messages
        try:
            yield Moved(file, lambda _: True, mover.notices, left_out)
        finally:
            file.streams.close()


def left_out(moved: Moved) -> dict[str, list[str]]:
    """The tensors that are not chosen by the reason, as reports have them."""
    return {NOT_CHOSEN: list(moved.left_out)} if moved.left_out else {}


def _layout(source: AdapterFile, base: Checkpoint, chosen: Chosen) -> Layout | None:
    """Where the adapter's tensors are in ``base``; None if they are where their names say, or nowhere.

    Raises:
        BaseMismatch: the base has them in several ways, or experts in a way that they cannot be rows of.
    """
    manifest = source.manifest
    entries = {name: entry for name, entry in manifest.tensors.items() if chosen(name)}
    if any(map(chosen, manifest.removed)) or any(e.is_patch or e.values == "none" for e in entries.values()):
        return None
    # A tensor without entries changes nothing, and may be one that other programs leave out.
    needed: dict[str, Shape] = {name: entry.shape for name, entry in entries.items() if entry.nnz}
    wholes = [name for name in manifest.whole if chosen(name)]
    needed |= {name: source.streams[name].shape for name in wholes if "base" in manifest.whole[name].digests}
    lacking = [name for name in needed if name not in base]
    if not lacking:
        return None
    component = _only_component(needed, base)

    def match(space: ModelLayout) -> Rename | None:
        def fit(inner: str, found: str) -> bool:
            name = component + inner
            return space.shape_of(found) == needed[name] and _has_values(
                source, name, space.place(found, needed[name]), base
            )

        inner = [name.removeprefix(component) for name in needed]
        try:
            rename = match_names(inner, space.known, source.path, fits=fit, option="")
        except AmbiguousNames as error:
            raise BaseMismatch(str(error)) from None
        except SourceError:
            return None
        return lambda name: rename(name.removeprefix(component))

    names = {name: name for name in base}
    try:
        layout = find_layout(
            names, {name: base.shape(name) for name in base}, match, frozenset(wholes) - needed.keys()
        )
    except SourceError as error:
        raise BaseMismatch(
            f"{source.path}: tensor {lacking[0]!r} and the others {error} of the base {base.path}"
        ) from None
    if layout is None and (reason := next(filter(None, (why_not(n, names, base.shape) for n in lacking)), None)):
        raise BaseMismatch(
            f"{source.path}: tensor {lacking[0]!r} is not in rows of the base {base.path}: {reason}"
        )
    return layout


def _only_component(names: Collection[str], base: Checkpoint) -> str:
    """What names start with of an adapter of one part of a pipeline, such as ``"transformer/"``, if the base is one model."""
    found = {name.partition("/")[0] for name in names} if all("/" in name for name in names) else set()
    return f"{found.pop()}/" if len(found) == 1 and not base.components else ""


def _has_values(source: AdapterFile, name: str, placement: Placement, base: Checkpoint) -> bool:
    """Whether the base has the values at a sparse tensor's entries, as far as its digest tells."""
    entry = source.manifest.tensors.get(name)
    if entry is None or "base" not in entry.digests or source.needs_base(name):
        return True  # if its entries follow from the base's values, these are compared when it is read
    found = _by_name(base, {name: placement})
    if name not in found or found.dtype(name) != source.sparse(name).dtype:
        return False
    return array_digest(found.at(name, source.indices(entry))) == entry.digests["base"]


def _by_name(base: Checkpoint, placements: Mapping[str, Placement]) -> LocatedCheckpoint:
    """The base with the adapter's tensors."""
    locations = {
        name: Location(
            one.shape, tuple(RowBlock(block.parameter, block.row, (block.rows,)) for block in one.blocks)
        )
        for name, one in placements.items()
    }
    return LocatedCheckpoint(base, locations, hidden=[name for name in locations if name in base])


class _Mover:
    """Moves the chosen tensors of one file, those that share tensors of the base at a time."""

    def __init__(
        self, source: AdapterFile, base: Checkpoint, layout: Layout, chosen: Chosen, strength: float
    ) -> None:
        self._source, self._base, self._layout, self._strength = source, base, layout, strength
        manifest = source.manifest
        shapes = {name: entry.shape for name, entry in manifest.tensors.items() if entry.nnz and chosen(name)}
        shapes |= {name: source.streams[name].shape for name in manifest.whole if chosen(name)}
        self._placements = {name: self._place(name, shape) for name, shape in shapes.items()}
        source.base = _by_name(base, {name: self._placements[name] for name in shapes if not self._is_new(name)})

    def _place(self, name: str, shape: Shape) -> Placement:
        try:
            return self._layout.place(name, shape)
        except SourceError as error:
            raise BaseMismatch(f"{self._source.path}: {error}") from None

    @property
    def notices(self) -> tuple[NamesNotice, ...]:
        """Where tensors went."""
        moved = {
            name: list(dict.fromkeys(block.parameter for block in one.blocks))
            for name, one in self._placements.items()
            if not one.is_whole or one.blocks[0].parameter != name
        }
        name, found = next(iter(moved.items()))
        where = ", ".join(map(repr, found[:3])) + (" and others" if len(found) > 3 else "")
        words = f"{len(moved)} tensors of the adapter are in tensors of other names in the base, {name!r} in {where} for example"
        return (NamesNotice(words),)

    def write(self, path: Path) -> None:
        """Write the tensors by the base's names."""
        manifest = {key: value for key, value in self._source.manifest.raw.items() if key not in DERIVED}
        manifest.pop("components", None)
        found = {block.parameter for one in self._placements.values() for block in one.blocks}
        if components := sorted({name.partition("/")[0] for name in found if "/" in name}):
            manifest["components"] = {component: {} for component in self._base.components or components}
        with AdapterWriter(path, manifest) as writer:
            for group in _sharing(self._placements):
                placed = self._placed(group)
                for sparse in placed.values():
                    writer.add(sparse)
                for dense in placed.dense.values():
                    writer.add_dense(dense)

    def _placed(self, group: list[str]) -> Adapter:
        """Tensors that share tensors of the base, on these."""
        source, manifest = self._source, self._source.manifest
        sparse = [source.sparse(name) for name in group if name in manifest.tensors]
        dense = [source.dense(name) for name in group if name in manifest.whole]
        if not sparse and all(self._placements[one.name].is_whole for one in dense):
            return Adapter(dense=[self._renamed(one) for one in dense])
        view = _by_name(self._base, {name: self._placements[name] for name in group if not self._is_new(name)})
        adapter = Adapter(sparse, dense=dense, manifest={"alpha": self._strength})
        try:
            placed = place_adapter(adapter, self._layout, base=view)
        except BaseMismatch as error:
            raise BaseMismatch(f"{source.path}: {error}") from None
        except SourceError as error:
            raise SourceError(f"{source.path}: {error}") from None
        kept = [one for one in placed.values() if one.nnz]
        for one in kept:
            if one.value_kind == "target" and one.base_digest is None:
                raise SourceError(
                    f"{source.path}: tensor {group[0]!r} or another is new by the adapter, and a part of {one.name!r} of the base "
                    f"{self._base.path}: leave it out, or take a base in the adapter's own form"
                )
        if any(manifest.tensors[one.name].base_values for one in sparse) or any(
            manifest.whole[one.name].base_values for one in dense
        ):
            return Adapter(kept, dense=placed.dense)
        return Adapter(map(_digested, kept), dense=map(_dense_digested, placed.dense.values()))

    def _renamed(self, tensor: DenseTensor) -> DenseTensor:
        name = self._placements[tensor.name].blocks[0].parameter
        return DenseTensor(name, tensor.values, base=tensor.base, base_digest=tensor.base_digest)

    def _is_new(self, name: str) -> bool:
        entry = self._source.manifest.whole.get(name)
        return entry is not None and "base" not in entry.digests


def _digested(tensor: SparseTensor) -> SparseTensor:
    """The tensor with the digest of the base's values in place of them."""
    if tensor.base is None:
        return tensor
    return SparseTensor(
        tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind=tensor.value_kind, dtype=tensor.dtype,
        base_digest=tensor.base_digest,
    )  # fmt: skip


def _dense_digested(tensor: DenseTensor) -> DenseTensor:
    """The same for a tensor that is replaced."""
    return DenseTensor(tensor.name, tensor.values, base_digest=tensor.base_digest)


def _sharing(placements: Mapping[str, Placement]) -> Iterable[list[str]]:
    """The names in groups; those that share a tensor of the base, directly or by others, are in one."""
    group_of: dict[str, list[str]] = {}  # by the base's tensor
    for name, placement in placements.items():
        joined = [name]
        parameters = {block.parameter for block in placement.blocks}
        for other in {id(group): group for p in parameters if (group := group_of.get(p))}.values():
            joined = other + joined
        members = {block.parameter for one in joined for block in placements[one].blocks}
        group_of |= dict.fromkeys(members, joined)
    return {id(group): group for group in group_of.values()}.values()
