"""What a page shows of one adapter."""

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
class AdapterFacts:
    """What was read of one adapter.

    Attributes:
        file: the adapter, and the base if it fits.
        info: from :func:`shira_analysis.reports.inspection.inspect_files`.
        tensors: measures of the chosen tensors; without norms where the deltas are unknown.
        needs_base: whether deltas are unknown because the base is missing.
        broken: why other deltas are unknown.
        mask: the positions of the entries of the tensor with the most; None if there are no entries.
    """

    file: DeltaFile
    info: dict[str, Any]
    tensors: tuple[TensorMeasures, ...]
    needs_base: bool
    broken: tuple[str, ...]
    mask: MaskGrid | None

    @property
    def known(self) -> bool:
        """Whether there are chosen tensors and the deltas of all of them are known."""
        return bool(self.tensors) and all(tensor.norms is not None for tensor in self.tensors)


def read_facts(
    file: DeltaFile, info: dict[str, Any], progress: Callable[[int], object] = lambda _: None
) -> AdapterFacts:
    """Read the chosen tensors of an adapter, one at a time.

    Args:
        file: with its base, if one was given and fits.
        info: see :class:`AdapterFacts`.
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
    return AdapterFacts(file, info, tuple(tensors), needs_base, tuple(broken), mask)


def labels(adapters: Sequence[AdapterFacts]) -> list[str]:
    """The adapters' names on a page: their file names, with folders if two are the same."""
    short = [one.file.path.name for one in adapters]
    return short if len(set(short)) == len(short) else [str(one.file.path) for one in adapters]
