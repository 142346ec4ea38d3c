"""An adapter's tensors on the parameters of a model that holds them otherwise: fused, split, or a rank's slices.

Entries of one parameter are merged, whatever tensors they come from, so that everything after works on parameters. The
digest of a tensor's base values is about all its entries in its own order: it becomes that of the parameter where these are
the same entries; else the values are taken from the adapter or a base checkpoint; else they are compared in the
model, through the placement (:class:`SpreadDigest`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shira_format._core import fits
from shira_format._core.arrays import Array, Indices, array_digest
from shira_format._core.compiled import is_strictly_increasing
from shira_format._core.dtypes import is_float
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.entries.base_check import base_values
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.format import AdapterFile
from shira_format.format.manifest import SparseEntry
from shira_format.live.loaded import LoadedAdapter, SpreadDigest, SpreadPart, load_adapter, refuse_removed
from shira_format.names.placement import Layout, Placement, Positions, Shape
from shira_format.tensors import DenseTensor, SparseTensor, ValueKind


def place_adapter(
    adapter: Adapter | str | os.PathLike[str],
    layout: Layout,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> Adapter:
    """An adapter on the parameters of a server's rank: by parameter, the flat indices and values of its entries there.

    The result is an adapter like any other, which may be saved as the rank's own file. Of a file only the blocks of
    indices that reach into the rank's rows are decoded.

    Args:
        adapter: the adapter, or the path of its file.
        layout: of the rank, such as :class:`shira_format.names.servers.ServerLayout`.
        base: the checkpoint that the adapter was made for: needed for an adapter without the base's values whose tensors
            are sliced or fused, since the base's values of a slice have no digest of their own in the file.

    Returns:
        The adapter, its tensors by the names of parameters; tensors of which the rank has no entry are not in it. A dense tensor
        that is a part of a parameter is there as entries.

    Raises:
        SourceError: a tensor that the layout does not know; one parameter with targets and deltas.
        BaseRequired: ``base`` is needed.
        BaseMismatch: ``base`` is not the adapter's base; a patch or a mask.
        FormatError: the file is damaged.

    Example:
        >>> layout = ServerLayout(num_heads=32, num_kv_heads=8, head_size=128, tp_size=4, tp_rank=1)
        >>> place_adapter("adapter.st", layout)["model.layers.0.self_attn.qkv_proj.weight"].indices
        array([...])
    """
    loaded = load_placed(adapter, layout, base=base)
    where = loaded.where
    if loaded.spread:
        spread = loaded.spread[0]
        raise _base_required(where, f"tensor {spread.tensor!r}", spread.parts[0].of.name)
    if loaded.replaced and loaded.alpha != 1:
        raise SourceError(
            f"{where}tensor {loaded.replaced[0].name!r}: a part of it is replaced, which entries at the adapter's strength of "
            f"{loaded.alpha:g} cannot say"
        )
    groups: dict[str, list[SparseTensor]] = {}
    for tensor in (*loaded.tensors, *loaded.replaced):
        groups.setdefault(tensor.name, []).append(tensor)
    manifest = {"alpha": loaded.alpha} if loaded.alpha != 1 else {}
    return Adapter([_only(where, group) for group in groups.values()], dense=loaded.dense, manifest=manifest)


def load_placed(
    source: LoadedAdapter | Adapter | str | os.PathLike[str],
    layout: Layout,
    executor: Executor | None = None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> LoadedAdapter:
    """As :func:`shira_format.live.loaded.load_adapter`, on the parameters of ``layout``.

    Args:
        source: an adapter, or the path of one, of which only what the layout has is decoded.
        layout: where the adapter's tensors are.
        executor: threads that decode.
        base: see :func:`place_adapter`.

    Raises:
        SourceError: the layout does not know a tensor.
        BaseRequired, BaseMismatch, FormatError, OSError: see :func:`place_adapter`.
    """
    checkpoint = None if base is None else open_checkpoint(base)
    if isinstance(source, (LoadedAdapter, Adapter)):
        return on_parameters(load_adapter(source), layout, checkpoint)
    file = AdapterFile(Path(source), copy=True)
    try:
        return _from_file(file, os.fspath(source), layout, executor, checkpoint)
    finally:
        file.streams.close()


def on_parameters(
    adapter: LoadedAdapter, layout: Layout, base: Checkpoint | None = None, *, tell: bool = False
) -> LoadedAdapter:
    """An adapter that is in memory on the parameters of ``layout``; errors as for :func:`load_placed`.

    If ``tell``, a notice says that tensors lie otherwise.
    """
    placer = _Placer(adapter, base)
    for tensor in adapter.tensors:
        placement = placer.placement(layout, tensor.name, tensor.shape)
        reads_base = placer.needs_base(tensor.base_digest, placement, has_values=tensor.base is not None)
        known = placer.with_base(tensor) if reads_base else tensor
        placer.add(known, placement, tensor.nnz, tensor.base_digest)
    for whole in adapter.dense:
        placer.add_dense(whole, placer.placement(layout, whole.name, whole.values.shape))
    placed = placer.placed()
    return replace(placed, notices=placer.notices()) if tell else placed


def compare_spread(adapter: LoadedAdapter, base_of: Callable[[SparseTensor], Array]) -> LoadedAdapter:
    """Compare the base's values with the digests that are spread; from then on, each parameter's entries have their own.

    Args:
        adapter: on the parameters of a model.
        base_of: the base's values at the entries of a parameter.

    Raises:
        BaseMismatch: the model holds other values.
    """
    values = {id(part.of): base_of(part.of) for one in adapter.spread for part in one.parts}
    for one in adapter.spread:
        found = np.empty(one.nnz, one.dtype)
        for part in one.parts:
            found[part.places] = values[id(part.of)][part.at]
        fits.check_values(f"{adapter.where}tensor {one.tensor!r}", one.digest, array_digest(found))

    def with_digest(tensor: SparseTensor) -> SparseTensor:
        if id(tensor) not in values:
            return tensor
        return SparseTensor(
            tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind=tensor.value_kind, dtype=tensor.dtype,
            base_digest=array_digest(values[id(tensor)]),
        )  # fmt: skip

    tensors, replaced = (
        [with_digest(tensor) for tensor in group] for group in (adapter.tensors, adapter.replaced)
    )
    return replace(adapter, tensors=tensors, replaced=replaced, spread=[])


def _from_file(
    file: AdapterFile, source: str, layout: Layout, executor: Executor | None, base: Checkpoint | None
) -> LoadedAdapter:
    frame = LoadedAdapter(source, [], [], float(file.manifest.raw.get("alpha", 1.0)), file.key)
    refuse_removed(frame.where, file.manifest.removed)
    placer = _Placer(frame, base)
    entries = list(file.manifest.tensors.values())
    # All names first: an adapter of another model is refused before anything is read.
    placements = {entry.name: placer.placement(layout, entry.name, entry.shape) for entry in entries}
    wholes = {name: placer.placement(layout, name, file.streams[name].shape) for name in file.manifest.whole}

    def read(entry: SparseEntry) -> tuple[SparseTensor, int]:
        if entry.is_patch or entry.values == "none":
            replace(frame, tensors=[file.sparse(entry.name)])  # refuses it
        placement = placements[entry.name]
        if placer.needs_base(entry.digests.get("base"), placement, has_values=entry.base_values):
            return placer.with_base(file.sparse(entry.name)), entry.nnz
        return file.within(entry.name, placement.ranges)

    for entry, (tensor, decoded) in zip(
        entries, map(read, entries) if executor is None else executor.map(read, entries), strict=True
    ):
        placer.decoded += decoded
        placer.add(tensor, placements[entry.name], entry.nnz, entry.digests.get("base"))
    for name, placement in wholes.items():
        placer.add_dense(file.dense(name), placement)
    return placer.placed()


@dataclass(frozen=True)
class _Piece:
    """Entries of one of the adapter's tensors in one parameter."""

    tensor: SparseTensor
    of: Positions  # which of the tensor's entries they are
    indices: Indices  # in the parameter
    nnz: int  # of the whole tensor
    digest: str | None  # of the base's values at all of these


@dataclass(frozen=True)
class _Kind:
    """What entries of one parameter must have in common to be merged.

    Attributes:
        replaces: whether their values do not depend on the strength.
        values: the kind of values.
        dtype: of the parameter.
        value_dtype: of the values.
        base: how the base's values are known.
    """

    parameter: str
    replaces: bool
    values: ValueKind
    dtype: np.dtype[Any]
    value_dtype: np.dtype[Any]
    base: Literal["values", "digest", "not"]


class _Placer:
    """Collects entries by parameter."""

    def __init__(self, adapter: LoadedAdapter, base: Checkpoint | None) -> None:
        self._adapter = adapter
        self._base = base
        self._found: dict[_Kind, list[_Piece]] = {}
        self._parameters: dict[str, tuple[Shape, str]] = {}  # with the tensor that says so
        self._empty: dict[str, SparseTensor] = {}
        self._dense: list[DenseTensor] = []
        self._moved: dict[str, list[str]] = {}  # tensors that are not each the parameter of their name
        self.decoded = 0

    def placement(self, layout: Layout, name: str, shape: Shape) -> Placement:
        """Where a tensor is.

        Raises:
            BaseMismatch: the layout does not know it; two tensors are in parameters of one name and several shapes.
        """
        try:
            found = layout.place(name, shape)
        except SourceError as error:
            raise BaseMismatch(f"{self._adapter.where}{error}") from None
        if not found.is_whole or found.blocks[0].parameter != name:
            self._moved[name] = list(dict.fromkeys(block.parameter for block in found.blocks))
        for block in found.blocks:
            known, other = self._parameters.setdefault(block.parameter, (block.shape, name))
            if known != block.shape:
                raise BaseMismatch(
                    f"{self._adapter.where}tensor {name!r} lies in {block.parameter!r} of shape {list(block.shape)}, and "
                    f"{other!r} in one of shape {list(known)}"
                )
        return found

    def needs_base(self, digest: str | None, placement: Placement, *, has_values: bool) -> bool:
        """Whether the base's values at a tensor's entries are to be read from the checkpoint."""
        return self._base is not None and digest is not None and not has_values and not placement.is_whole

    def with_base(self, tensor: SparseTensor) -> SparseTensor:
        """The tensor with the base's values from the checkpoint.

        Raises:
            BaseMismatch: the checkpoint is not the adapter's base.
        """
        try:
            found = base_values(tensor, self._base)
        except BaseMismatch as error:
            raise BaseMismatch(f"{self._adapter.where}{error}") from None
        return SparseTensor(
            tensor.name, tensor.shape, tensor.indices, tensor.values, value_kind=tensor.value_kind, dtype=tensor.dtype,
            base=found,
        )  # fmt: skip

    def add(
        self, tensor: SparseTensor, placement: Placement, nnz: int, digest: str | None, *, replaces: bool = False
    ) -> None:
        """Add a tensor.

        Args:
            tensor: all of its entries that the model has, and perhaps others.
            placement: where it is.
            nnz: the number of all its entries.
            digest: of the base's values at all its entries, if it is known.
            replaces: whether its values do not depend on the strength.

        Raises:
            BaseRequired: only some of its entries are here, and the base's values at them are not known.
        """
        pieces = list(placement.place(tensor.indices))
        base: Literal["values", "digest", "not"] = (
            "values" if tensor.base is not None else "not" if digest is None else "digest"
        )
        if base == "digest" and 0 < sum(indices.size for _, _, indices in pieces) < nnz:
            raise BaseRequired(
                f"{self._adapter.where}tensor {tensor.name!r}: a part of it is here, and the base's values at its entries are "
                "not known one by one, but by a digest of all: pass base=, or convert with --self-contained"
            )
        for block, of, indices in pieces:
            kind = _Kind(block.parameter, replaces, tensor.value_kind, tensor.dtype, tensor.values.dtype, base)
            self._found.setdefault(kind, []).append(_Piece(tensor, of, indices, nnz, digest))
        for block in placement.blocks:  # also those without entries: the parameter must be there
            self._empty.setdefault(
                block.parameter, _empty(block.parameter, block.shape, tensor, has_base=base != "not")
            )

    def add_dense(self, whole: DenseTensor, placement: Placement) -> None:
        """Add a tensor that is replaced, whole or a part of a parameter.

        Raises:
            BaseMismatch: a part, but not of floats.
            BaseRequired: see :meth:`add`.
        """
        if placement.is_whole:
            name = placement.blocks[0].parameter
            self._dense.append(DenseTensor(name, whole.values, base=whole.base, base_digest=whole.base_digest))
            return
        if not is_float(whole.values.dtype):
            raise BaseMismatch(
                f"{self._adapter.where}tensor {whole.name!r} is {whole.values.dtype}; only floats can be a part of a parameter"
            )
        shape = whole.values.shape
        reads_base = self.needs_base(whole.base_digest, placement, has_values=whole.base is not None)
        ranges = [(0, whole.values.size)] if reads_base else placement.ranges
        indices = np.concatenate([np.empty(0, np.int64), *(np.arange(*one) for one in ranges)])
        base = None if whole.base is None else whole.base.reshape(-1)[indices]
        is_all = indices.size == whole.values.size
        tensor = SparseTensor(
            whole.name, shape, indices, whole.values.reshape(-1)[indices], base=base,
            base_digest=whole.base_digest if is_all else None,
        )  # fmt: skip
        tensor = self.with_base(tensor) if reads_base else tensor
        self.add(tensor, placement, whole.values.size, whole.base_digest, replaces=True)

    def placed(self) -> LoadedAdapter:
        """The adapter.

        Raises:
            BaseMismatch: two tensors have the same entries of a parameter.
        """
        self._check_apart()
        merged = {kind: self._merged(kind, pieces) for kind, pieces in self._found.items()}
        known = {kind.parameter for kind in merged} | {whole.name for whole in self._dense}
        spread: dict[str, SpreadDigest] = {}
        for kind, (tensor, places) in merged.items():
            if kind.base == "digest" and tensor.base_digest is None:
                for piece, place in zip(self._found[kind], places, strict=True):
                    one = SpreadDigest(piece.tensor.name, piece.nnz, kind.dtype, piece.digest or "")
                    spread.setdefault(one.tensor, one).parts.append(SpreadPart(tensor, place, piece.of))
        empty = [tensor for name, tensor in self._empty.items() if name not in known]
        return replace(
            self._adapter,
            tensors=[*(tensor for kind, (tensor, _) in merged.items() if not kind.replaces), *empty],
            replaced=[tensor for kind, (tensor, _) in merged.items() if kind.replaces],
            dense=self._dense,
            spread=list(spread.values()),
            is_placed=True,
            decoded=self.decoded,
        )

    def _merged(self, kind: _Kind, pieces: list[_Piece]) -> tuple[SparseTensor, list[Positions]]:
        """The entries of one kind in one parameter, and where among them those of each piece are."""
        shape, _ = self._parameters[kind.parameter]
        pieces.sort(key=lambda piece: int(piece.indices[0]))  # most often one after the other
        indices = _joined([piece.indices for piece in pieces])
        ends = np.cumsum([piece.indices.size for piece in pieces])
        places: list[Positions] = [
            slice(int(end) - piece.indices.size, int(end)) for piece, end in zip(pieces, ends, strict=True)
        ]
        order: Positions = slice(None)
        if not is_strictly_increasing(indices):
            order = np.argsort(indices, kind="stable")
            indices = indices[order]
            rank = np.empty_like(order)
            rank[order] = np.arange(order.size)
            places = [rank[place] for place in places]

        def of_pieces(arrays: Sequence[Array]) -> Array:
            return np.asarray(
                _joined([array[piece.of] for array, piece in zip(arrays, pieces, strict=True)])[order]
            )

        bases = [piece.tensor.base for piece in pieces if piece.tensor.base is not None]
        only = pieces[0]
        is_one_tensor = len(pieces) == 1 and only.indices.size == only.nnz
        tensor = SparseTensor(
            kind.parameter, shape, indices, of_pieces([piece.tensor.values for piece in pieces]), value_kind=kind.values,
            dtype=kind.dtype, base=of_pieces(bases) if kind.base == "values" else None,
            base_digest=only.digest if kind.base == "digest" and is_one_tensor else None,
        )  # fmt: skip
        return tensor, places

    def _check_apart(self) -> None:
        """Raise BaseMismatch if two tensors have the same entries of a parameter."""
        pieces: dict[str, list[_Piece]] = {}
        for kind, found in self._found.items():
            pieces.setdefault(kind.parameter, []).extend(found)
        for parameter, found in pieces.items():
            ends = sorted((int(piece.indices[0]), int(piece.indices[-1])) for piece in found)
            if all(one[1] < other[0] for one, other in pairwise(ends)):
                continue  # one after the other
            every, counts = np.unique(_joined([piece.indices for piece in found]), return_counts=True)
            if (counts > 1).any():
                names = ", ".join(repr(name) for name in sorted({piece.tensor.name for piece in found})[:4])
                raise BaseMismatch(
                    f"{self._adapter.where}tensors {names} have the same entries of {parameter!r}, for example the one of "
                    f"flat index {every[counts > 1][0]}"
                )

    def notices(self) -> tuple[str, ...]:
        """That tensors are not each the parameter of their name, if so."""
        if not self._moved:
            return ()
        name, parameters = next(iter(self._moved.items()))
        where = ", ".join(map(repr, parameters[:3])) + (" and others" if len(parameters) > 3 else "")
        told = (
            f"{self._adapter.where}{len(self._moved)} tensors of the adapter are in other parameters of the model, for example "
            f"{name!r} in {where}"
        )
        return (told,)


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _empty(parameter: str, shape: Shape, like: SparseTensor, *, has_base: bool) -> SparseTensor:
    """No entries of a parameter."""
    none = np.empty(0, np.int64)
    return SparseTensor(
        parameter, shape, none, like.values[:0], value_kind=like.value_kind, dtype=like.dtype,
        base=np.empty(0, like.dtype) if has_base else None,
    )  # fmt: skip


def _base_required(where: str, what: str, parameter: str) -> BaseRequired:
    return BaseRequired(
        f"{where}{what} among others in {parameter!r}: the base's values at the entries are not known: pass base=, or convert "
        "with --self-contained"
    )


def _only(where: str, group: list[SparseTensor]) -> SparseTensor:
    """The entries of one parameter as one tensor.

    Raises:
        SourceError: targets and deltas, or several dtypes.
        BaseRequired: the base's values are known by several digests.
    """
    first = group[0]
    if len(group) == 1:
        return first
    if any(tensor.base is None and tensor.base_digest is not None for tensor in group):
        raise _base_required(where, "tensors", first.name)
    kinds = {(tensor.value_kind, tensor.dtype, tensor.values.dtype, tensor.base is None) for tensor in group}
    if len(kinds) > 1:
        raise SourceError(
            f"{where}parameter {first.name!r} has targets and deltas, or values of several dtypes, or the base's values of only "
            "some; one tensor has one kind"
        )
    indices = np.concatenate([tensor.indices for tensor in group])
    order = np.argsort(indices, kind="stable")
    bases = [tensor.base for tensor in group if tensor.base is not None]
    return SparseTensor(
        first.name, first.shape, indices[order], np.concatenate([tensor.values for tensor in group])[order],
        value_kind=first.value_kind, dtype=first.dtype, base=np.concatenate(bases)[order] if bases else None,
    )  # fmt: skip
