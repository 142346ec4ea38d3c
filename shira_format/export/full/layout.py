"""Which tensors the restored checkpoint holds, in which files, checked against the base's names, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shira_format._core.dtypes import DTYPES, FLOATS
from shira_format._core.fits import check_strength, missing
from shira_format.checkpoints import Checkpoint
from shira_format.entries.base_check import check_frame
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import AdapterFile
from shira_format.format.items import SparseEntry
from shira_format.tensors import numel

SHARD_BYTES = 5_000_000_000  # the size of a shard in transformers


@dataclass(frozen=True)
class Piece:
    """One tensor of the result: of the base, patched or not, or dense from the adapter.

    Attributes:
        name, dtype, shape: of the result.
        base_name: the tensor of the base that it starts from; None for a dense tensor.
        sparse: whether the adapter changes entries of it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    base_name: str | None
    sparse: bool = False

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return numel(self.shape) * self.dtype.itemsize


class Layout:
    """The tensors of the result by file.

    Attributes:
        alpha: the strength.
        sparse: names of the sparse tensors that are applied.
        dense: names of the dense tensors that are stored.
        removed: names of base tensors that are left out.
        shards: tensors by file name.
    """

    def __init__(
        self, adapter: AdapterFile, base: Checkpoint, alpha: float | None, chosen: Callable[[str], bool]
    ) -> None:
        """Args: ``alpha``: None for the adapter's own strength; ``chosen``: whether a tensor is applied, by name."""
        self._adapter, self._base = adapter, base
        manifest = adapter.manifest
        self.alpha = float(manifest.raw.get("alpha", 1.0)) if alpha is None else alpha
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha {self.alpha} is not a finite number")
        applied = self.alpha != 0  # at strength 0 the result is the base
        self.sparse = [name for name in manifest.tensors if applied and chosen(name)]
        self.dense = [name for name in manifest.whole if applied and chosen(name)]
        self.removed = {name for name in manifest.removed if applied and chosen(name)}
        has_any = (
            manifest.tensors or manifest.whole or manifest.removed
        )  # a patch of equal checkpoints has nothing
        if has_any and applied and not (self.sparse or self.dense or self.removed):
            raise SourceError(f"{adapter.path}: no tensor is left by the choice of names")
        self.shards = self._shards()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.nbytes for pieces in self.shards.values() for piece in pieces)

    def _shards(self) -> dict[str, list[Piece]]:
        base, dense = self._base, set(self.dense)
        patched = self._patched()
        for name in sorted(self.removed):
            if name not in base:
                raise BaseMismatch(f"tensor {name!r}: the adapter removes it, and the base {base.path} has none")
        replaced = dense | self.removed | set(self.sparse)
        given = base.shards
        shards: dict[str, list[Piece]] = {}
        for shard, names in (given or {"model.safetensors": list(base)}).items():
            pieces = shards.setdefault(shard, [])
            for name in names:
                if name in dense:
                    pieces.append(self._dense_piece(name))
                elif name not in replaced:
                    pieces.append(Piece(name, base.dtype(name), base.shape(name), name))
                pieces += patched.get(name, ())
        for name in self.dense:
            if name not in base:
                _shard_of_new(shards, name, base.components).append(self._dense_piece(name))
        if given is None:
            shards = _by_size(shards["model.safetensors"])
        # Larger elements first, as in the files.
        return {
            shard: sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
            for shard, pieces in shards.items()
            if pieces
        }

    def _patched(self) -> dict[str, list[Piece]]:
        """The tensors whose entries change, by the base's tensor that they start from."""
        found: dict[str, list[Piece]] = {}
        for name in self.sparse:
            tensor = self._adapter.manifest.tensors[name]
            self._check(tensor)
            piece = Piece(
                name, self._base.dtype(tensor.base_name), tensor.result_shape, tensor.base_name, sparse=True
            )
            found.setdefault(tensor.base_name, []).append(piece)
        return found

    def _dense_piece(self, name: str) -> Piece:
        stream = self._adapter.streams[name]
        if "base" in self._adapter.manifest.whole[name].digests and name not in self._base:
            raise missing(f"tensor {name!r}", name, f"the base {self._base.path}")
        return Piece(name, DTYPES[stream.dtype], stream.shape, None)

    def _check(self, tensor: SparseEntry) -> None:
        what = f"tensor {tensor.name!r}"
        if tensor.values == "none":
            raise BaseMismatch(f"{what} is a mask, without values to apply")
        # New rows are in the adapter's dtype, and so must be the base's.
        any_float = "base" not in tensor.digests and not tensor.new_rows
        dtype = FLOATS[tensor.dtype]
        check_frame(what, tensor.base_name, tensor.shape, dtype, self._base, any_float=any_float)
        check_strength(what, self.alpha, self._base.dtype(tensor.base_name))


def _shard_of_new(shards: dict[str, list[Piece]], name: str, components: tuple[str, ...]) -> list[Piece]:
    """The shard of a new tensor: the last one, of its component if there are components."""
    if components:
        component = name.partition("/")[0]
        own = [shard for shard in shards if shard.startswith(f"{component}/")]
        if own:
            return shards[own[-1]]
        raise BaseMismatch(f"tensor {name!r}: the base has no component {component!r}")
    return shards[list(shards)[-1]]


def _by_size(pieces: list[Piece]) -> dict[str, list[Piece]]:
    """Shards of at most 5 GB, or of one tensor that is larger."""
    groups: list[list[Piece]] = [[]]
    for piece in pieces:
        if groups[-1] and sum(p.nbytes for p in groups[-1]) + piece.nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(piece)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
