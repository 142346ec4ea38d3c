"""Collects an adapter's entries by the parameters of a model that holds its tensors otherwise; see :mod:`shira_format.entries.placed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from shira_format._core.arrays import Array, Indices, distinct_counts
from shira_format._core.compiled import is_strictly_increasing
from shira_format._core.dtypes import is_float
from shira_format.checkpoints import Checkpoint
from shira_format.entries.base_check import base_values
from shira_format.entries.loaded import LoadedAdapter, SpreadDigest, SpreadPart
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.names.placement import Layout, Placement, Positions, Shape
from shira_format.tensors import DenseTensor, SparseTensor, ValueKind


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


class Placer:
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
            every, counts = distinct_counts(_joined([piece.indices for piece in found]))
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
