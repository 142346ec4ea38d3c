"""What a report knows of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shira_analysis.figures.masks import MaskGrid, mask_grid
from shira_analysis.measures.adapter import TensorMeasures
from shira_analysis.measures.deltas import DeltaFile
from shira_analysis.measures.layer_kinds import layer_kind
from shira_analysis.measures.size import mask_of, norms_of
from shira_format._core.dtypes import dtype_name
from shira_format.errors import BaseRequired, SourceError


@dataclass(frozen=True, eq=False)
class Look:
    """One adapter, looked at.

    Attributes:
        file: the adapter, and the base if it fits.
        info: what its header tells, see :func:`shira_analysis.reports.summary.describe`; perhaps with ``verified`` and ``base``.
        tensors: the chosen tensors; without norms where deltas are not known.
        needs_base: deltas are not known for want of the base.
        broken: why other deltas are not known, in words.
        mask: where the entries of the tensor with most of them lie; None if there is none.
    """

    file: DeltaFile
    info: dict[str, Any]
    tensors: tuple[TensorMeasures, ...]
    needs_base: bool
    broken: tuple[str, ...]
    mask: MaskGrid | None

    @property
    def known(self) -> bool:
        """Whether the deltas of all chosen tensors are known, and there are some."""
        return bool(self.tensors) and all(tensor.norms is not None for tensor in self.tensors)


def look(file: DeltaFile, info: dict[str, Any], progress: Callable[[int], object] = lambda _: None) -> Look:
    """Read all chosen tensors of an adapter, one after another.

    Args:
        file: with its base, if that is at hand and fits.
        info: see :class:`Look`.
        progress: called with 1 after each tensor.

    Raises:
        FormatError: a tensor is damaged.
        BaseMismatch: the base of ``file`` does not fit.
    """
    tensors, broken, needs_base, mask = [], [], False, None
    most = max((file.file.manifest.tensors[name].nnz for name in file.names), default=0)
    for name in file.names:
        try:
            tensor = file.tensor(name)
        except BaseRequired:
            tensor, needs_base = file.file.sparse(name), True
        norms = None
        if tensor.value_kind != "none" and (tensor.value_kind == "delta" or tensor.base is not None):
            try:
                norms = norms_of(tensor)
            except SourceError as error:
                broken.append(str(error))
        shape, kind = tensor.shape, layer_kind(name, tensor.shape)
        tensors.append(TensorMeasures(name, kind, shape, dtype_name(tensor.dtype), mask_of(tensor), norms, None))
        if mask is None and most and tensor.nnz == most:
            mask = mask_grid(tensor)
        progress(1)
    return Look(file, info, tuple(tensors), needs_base, tuple(broken), mask)


def labels(looks: Sequence[Look]) -> list[str]:
    """What the adapters are called on a page: the names of their files, with folders where two are the same."""
    short = [look.file.path.name for look in looks]
    return short if len(set(short)) == len(short) else [str(look.file.path) for look in looks]
