"""Adapters that are wholly in memory: read, decoded and checked once, independent of their file from then on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shira_format.adapter import Adapter
from shira_format.errors import BaseMismatch
from shira_format.format import AdapterFile
from shira_format.tensors import DenseTensor, SparseTensor

PATCH = (
    "a patch of whole checkpoints, which live weights cannot take (shira_to_full writes the patched checkpoint)"
)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that live weights can take.

    Attributes:
        source: what was decoded: an adapter, or the path of its file.
        tensors: its sparse tensors.
        dense: its whole tensors.
        alpha: its own strength.
        key: tells it from all others: the digest of its manifest, which has the digests of all else; None if it has none.
        nbytes: of memory, near enough.
    """

    source: Adapter | str
    tensors: list[SparseTensor]
    dense: list[DenseTensor]
    alpha: float
    key: str | None = None
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.value_kind == "none":
                raise BaseMismatch(f"{self.where}tensor {tensor.name!r} is a mask: there is nothing to apply")
            if tensor.is_patch:
                raise BaseMismatch(
                    f"{self.where}tensor {tensor.name!r}: the adapter renames or resizes it: {PATCH}"
                )
        sizes = (
            t.indices.nbytes + t.values.nbytes + (0 if t.base is None else t.base.nbytes) for t in self.tensors
        )
        whole = (t.values.nbytes + (0 if t.base is None else t.base.nbytes) for t in self.dense)
        object.__setattr__(self, "nbytes", sum(sizes) + sum(whole))

    @property
    def label(self) -> str:
        """What reports call it: its path, or ``"adapter"``."""
        return self.source if isinstance(self.source, str) else "adapter"

    @property
    def where(self) -> str:
        """How messages about it begin."""
        return f"{self.source}: " if isinstance(self.source, str) else ""


def load_adapter(
    source: LoadedAdapter | Adapter | str | os.PathLike[str], pool: Executor | None = None
) -> LoadedAdapter:
    """Read, decode and check an adapter whole.

    A file is read into memory of its own, not mapped: a file that somebody cuts short while it is mapped kills the
    process, and one that is written over would change values behind a digest that was checked.

    Args:
        source: an adapter, or the path of one.
        pool: threads to decode on.

    Raises:
        FormatError: the file breaks a rule of the format.
        BaseMismatch: a patch or a mask, which live weights cannot take.
        OSError: the file cannot be read.
    """
    if isinstance(source, LoadedAdapter):
        return source
    if isinstance(source, Adapter):
        _refuse_removed("", source.removed)
        return LoadedAdapter(source, list(source.values()), list(source.dense.values()), source.alpha)
    path = Path(source)
    file = AdapterFile(path, copy=True)
    try:
        _refuse_removed(f"{path}: ", file.manifest.raw.get("removed", ()))
        names = list(file.manifest.tensors)
        tensors: Iterable[SparseTensor] = map(file.sparse, names) if pool is None else pool.map(file.sparse, names)
        alpha = float(file.manifest.raw.get("alpha", 1.0))
        return LoadedAdapter(
            os.fspath(source), list(tensors), [file.dense(name) for name in file.manifest.whole], alpha, file.key
        )
    finally:
        file.streams.close()


def _refuse_removed(where: str, removed: Any) -> None:
    if removed:
        raise BaseMismatch(f"{where}the adapter removes tensors, {removed[0]!r} for example: {PATCH}")
