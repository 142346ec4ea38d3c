"""Adapters fully in memory: read, decoded and checked once, and independent of their file from then on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shira_format._core.dtypes import FLOATS
from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch
from shira_format.format import AdapterFile
from shira_format.names.placement import Positions
from shira_format.tensors import DenseTensor, SparseTensor

_PATCH = (
    "a patch of a full checkpoint, which live weights cannot take (shira_to_full writes the patched checkpoint)"
)


@dataclass(frozen=True)
class SpreadPart:
    """Which entries of a parameter are those of one of the adapter's tensors.

    Attributes:
        of: the entries of the parameter.
        at: which of them.
        places: which of the tensor's entries these are, in the same order.
    """

    of: SparseTensor
    at: Positions
    places: Positions


@dataclass(frozen=True)
class SpreadDigest:
    """The digest of the base's values at the entries of one tensor, where these are in parameters with others or in several.

    Attributes:
        tensor: the tensor's name in the adapter.
        nnz: the number of its entries.
        dtype: of the base's values.
        digest: of these, in the tensor's order.
        parts: where they are.
    """

    tensor: str
    nnz: int
    dtype: np.dtype[Any]
    digest: str
    parts: list[SpreadPart] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that can be applied to live weights.

    Attributes:
        source: the adapter that it was made from, or the path of its file.
        tensors: its sparse tensors.
        dense: its dense tensors.
        alpha: its own strength.
        key: identifies its content: the digest of the manifest, which holds all other digests; None: not from a file.
        replaced: entries that become their values at any strength but 0: dense tensors that are parts of parameters.
        spread: digests of base values that are not yet compared; see :mod:`shira_format.entries.placed`.
        is_placed: whether its tensors have the names and shapes of a model's parameters.
        decoded: of an adapter that was read for a layout: entries that were decoded.
        notices: what to tell of its place in the model.
        nbytes: the bytes of its arrays.
    """

    source: Adapter | str
    tensors: list[SparseTensor]
    dense: list[DenseTensor]
    alpha: float
    key: str | None = None
    replaced: list[SparseTensor] = field(default_factory=list)
    spread: list[SpreadDigest] = field(default_factory=list)
    is_placed: bool = False
    decoded: int = 0
    notices: tuple[str, ...] = ()
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.value_kind == "none":
                raise BaseMismatch(f"{self.where}tensor {tensor.name!r} is a mask, without values to apply")
            if tensor.is_patch:
                raise BaseMismatch(
                    f"{self.where}tensor {tensor.name!r}: the adapter renames or resizes it: {_PATCH}"
                )
        sizes = (
            t.indices.nbytes + t.values.nbytes + (0 if t.base is None else t.base.nbytes)
            for t in (*self.tensors, *self.replaced)
        )
        whole = (t.values.nbytes + (0 if t.base is None else t.base.nbytes) for t in self.dense)
        object.__setattr__(self, "nbytes", sum(sizes) + sum(whole))

    @property
    def label(self) -> str:
        """Its name in reports: its path, or ``"adapter"``."""
        return self.path or "adapter"

    @property
    def path(self) -> str:
        """The path of its file; empty if it has none."""
        return self.source if isinstance(self.source, str) else ""

    @property
    def where(self) -> str:
        """How messages about it start."""
        return f"{self.path}: " if self.path else ""


def load_adapter(
    source: LoadedAdapter | Adapter | str | os.PathLike[str],
    pool: Executor | None = None,
    base_of: Callable[[LoadedAdapter], Mapping[str, Any]] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    content: bytes | None = None,
) -> LoadedAdapter:
    """Read, decode and check an adapter.

    A file is read, not mapped: truncating a mapped file kills the process, and overwriting it would change values whose
    digest was already checked.

    Args:
        source: an adapter, or the path of one.
        pool: threads that decode.
        base_of: of a file that can be read with its base alone: the base's weights by the adapter's names, from the adapter
            without its entries.
        base: the same, if the caller has it: see :func:`shira_format.format.load`.
        content: the file's bytes, if they have been read.

    Raises:
        FormatError: the file breaks a rule of the format.
        BaseMismatch: a patch or a mask, which live weights cannot take, or the base is another one.
        BaseRequired: the file can be read with its base alone, and there is no ``base_of``.
        OSError: the file cannot be read.
    """
    if isinstance(source, LoadedAdapter):
        return source
    if isinstance(source, Adapter):
        refuse_removed("", source.removed)
        return LoadedAdapter(source, list(source.values()), list(source.dense.values()), source.alpha)
    path = Path(source)
    file = AdapterFile(path, base=base, content=content)
    try:
        refuse_removed(f"{path}: ", file.manifest.raw.get("removed", ()))
        names = list(file.manifest.tensors)
        if base is None and base_of is not None and any(map(file.needs_base, names)):
            file.base = base_of(_without_entries(file, os.fspath(source)))
        tensors: Iterable[SparseTensor] = map(file.sparse, names) if pool is None else pool.map(file.sparse, names)
        alpha = float(file.manifest.raw.get("alpha", 1.0))
        return LoadedAdapter(
            os.fspath(source), list(tensors), [file.dense(name) for name in file.manifest.whole], alpha, file.key
        )
    finally:
        file.streams.close()


def _without_entries(file: AdapterFile, source: str) -> LoadedAdapter:
    """What a file says of its tensors, of which none has entries."""
    none = np.empty(0, np.int64)
    tensors = [
        SparseTensor(
            entry.name, entry.shape, none, np.empty(0, FLOATS[entry.dtype]), base_digest=entry.digests.get("base")
        )
        for entry in file.manifest.tensors.values()
    ]
    return LoadedAdapter(source, tensors, [file.dense(name) for name in file.manifest.whole], 1.0)


def refuse_removed(where: str, removed: Any) -> None:
    """Raise BaseMismatch if an adapter, of which messages start with ``where``, removes tensors of its base."""
    if removed:
        raise BaseMismatch(f"{where}the adapter removes tensors, for example {removed[0]!r}: {_PATCH}")
