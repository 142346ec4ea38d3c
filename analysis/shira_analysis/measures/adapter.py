"""Measures of one adapter: per tensor, per kind of layer, and in total."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_analysis.measures.additive import attributes
from shira_analysis.measures.certificate import Bounds
from shira_analysis.measures.deltas import DeltaFile, open_deltas
from shira_analysis.measures.layer_kinds import KINDS, layer_kind
from shira_analysis.measures.rank import RankReport, rank_of
from shira_analysis.measures.size import Mask, Norms, combine_masks, combine_norms, mask_of, norms_of
from shira_format._core.dtypes import dtype_name
from shira_format.errors import SourceError
from shira_format.tensors import SparseTensor, numel

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint


@dataclass(frozen=True, eq=False)
class TensorMeasures:
    """Measures of one tensor.

    Attributes:
        name: the weight's name.
        kind: the kind of its layer; see :data:`shira_analysis.measures.layer_kinds.KINDS`.
        shape: the weight's shape.
        dtype: the weight's dtype, by its safetensors name.
        mask: the positions of its entries.
        norms: the size of the deltas; None for a mask.
        rank: the rank of the deltas; None for a mask or if not requested.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    mask: Mask
    norms: Norms | None
    rank: RankReport | None

    def as_json(self, *, values: bool = False) -> dict[str, Any]:
        """Plain JSON values; ``values`` includes the singular values."""
        parts = _parts_json(self.mask, self.norms, None)
        if self.rank is not None:
            parts["rank"] = self.rank.as_json(values=values)
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            **parts,
        }


@dataclass(frozen=True)
class Ranks:
    """Ranks over several tensors: sums and means.

    Attributes:
        tensors: number of tensors.
        full: sum of the highest ranks that their shapes allow.
        proven: number of tensors with a proven exact rank.
        lower: sum of the lower bounds of exact ranks.
        upper: sum of the upper bounds.
        numerical: sum of the numerical ranks at float64's epsilon.
        stable: mean stable rank.
        effective: mean effective rank.

        The last three cover the tensors whose singular values were computed; None if there are none.
    """

    tensors: int
    full: int
    proven: int
    lower: int
    upper: int
    numerical: int | None
    stable: float | None
    effective: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return attributes(
            self, "tensors", "full_rank=full", "proven", "rank_at_least=lower", "rank_at_most=upper",
            "numerical_rank=numerical", "mean_stable_rank=stable", "mean_effective_rank=effective",
        )  # fmt: skip


@dataclass(frozen=True)
class GroupMeasures:
    """Measures of several tensors; norms and ranks exclude masks, and are None if there are only masks."""

    tensors: int
    mask: Mask
    norms: Norms | None
    ranks: Ranks | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"tensors": self.tensors, **_parts_json(self.mask, self.norms, self.ranks)}


@dataclass(frozen=True, eq=False)
class AdapterMeasures:
    """Measures of one adapter.

    Attributes:
        path: the file.
        tensors: the selected sparse tensors, in file order.
        kinds: totals per kind of layer, in the order of :data:`shira_analysis.measures.layer_kinds.KINDS`.
        total: totals over all tensors.
        whole: names of the selected whole tensors, which are not measured.
        whole_numel: their number of elements.
    """

    path: Path
    tensors: tuple[TensorMeasures, ...]
    kinds: dict[str, GroupMeasures]
    total: GroupMeasures
    whole: tuple[str, ...]
    whole_numel: int

    def as_json(self, *, values: bool = False) -> dict[str, Any]:
        """Plain JSON values; ``values`` includes each tensor's singular values."""
        return {
            "file": str(self.path),
            "total": self.total.as_json(),
            "kinds": {kind: group.as_json() for kind, group in self.kinds.items()},
            "tensors": [tensor.as_json(values=values) for tensor in self.tensors],
            "whole_tensors": list(self.whole),
            "whole_numel": self.whole_numel,
        }


def measure(
    adapter: str | os.PathLike[str] | DeltaFile,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    rank: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> AdapterMeasures:
    """Measure an adapter file, holding one tensor in memory at a time.

    Args:
        adapter: a file, or one opened by :func:`open_deltas`.
        base: the checkpoint it was made for, as a path or open; required for target values unless the file is self-contained.
        rank: compute ranks as well, which takes seconds for a large weight.
        include: regexes; only tensors whose name contains a match are measured.
        exclude: regexes; tensors whose name contains a match are skipped.
        progress: called with 1 after each tensor.

    Raises:
        FormatError: not an adapter, or a damaged one.
        SourceError: a delta is not finite, no tensor is selected, or a package is missing.
        BaseRequired: target values without base values.
        BaseMismatch: ``base`` is not the base of the adapter.
    """
    return measure_file(open_deltas(adapter, base, include=include, exclude=exclude), rank=rank, progress=progress)


def measure_file(
    file: DeltaFile, *, rank: bool = False, progress: Callable[[int], object] = lambda _: None
) -> AdapterMeasures:
    """:func:`measure` for an open file."""
    tensors = []
    for name in file.names:
        tensor = file.tensor(name)
        try:
            tensors.append(measure_tensor(tensor, rank=rank))
        except SourceError as error:
            raise SourceError(f"{file.path}: {error}") from None
        progress(1)
    kinds = {kind: [tensor for tensor in tensors if tensor.kind == kind] for kind in KINDS}
    return AdapterMeasures(
        file.path,
        tuple(tensors),
        {kind: combine(group) for kind, group in kinds.items() if group},
        combine(tensors),
        file.whole,
        sum(numel(file.file.streams[name].shape) for name in file.whole),
    )


def measure_tensor(tensor: SparseTensor, *, rank: bool = False) -> TensorMeasures:
    """Measure one tensor, which must have its base values if it holds targets.

    Raises:
        SourceError: a delta is not finite, or a package is missing.
        BaseRequired: target values without base values.
    """
    values = tensor.value_kind != "none"
    return TensorMeasures(
        tensor.name,
        layer_kind(tensor.name, tensor.shape),
        tensor.shape,
        dtype_name(tensor.dtype),
        mask_of(tensor),
        norms_of(tensor) if values else None,
        rank_of(tensor) if values and rank else None,
    )


def combine(tensors: Iterable[TensorMeasures]) -> GroupMeasures:
    """Combine the measures of several tensors."""
    tensors = list(tensors)
    norms = [tensor.norms for tensor in tensors if tensor.norms is not None]
    ranks = [tensor.rank for tensor in tensors if tensor.rank is not None]
    return GroupMeasures(
        len(tensors),
        combine_masks(tensor.mask for tensor in tensors),
        combine_norms(norms) if norms else None,
        combine_ranks(ranks) if ranks else None,
    )


def combine_ranks(reports: Sequence[RankReport]) -> Ranks:
    """Combine the ranks of several tensors."""
    # An update that exists only rounded has no bounds: any rank that the shape allows is possible.
    bounds = [Bounds(0, report.full) if report.bounds is None else report.bounds for report in reports]
    spectra = [report.spectrum for report in reports if report.spectrum is not None]
    count = len(spectra)
    return Ranks(
        len(reports),
        sum(report.full for report in reports),
        sum(bound.exact is not None for bound in bounds),
        sum(bound.lower for bound in bounds),
        sum(bound.upper for bound in bounds),
        sum(spectrum.numerical_rank for spectrum in spectra) if count else None,
        sum(spectrum.stable_rank for spectrum in spectra) / count if count else None,
        sum(spectrum.effective_rank for spectrum in spectra) / count if count else None,
    )


def _parts_json(mask: Mask, norms: Norms | None, rank: Ranks | None) -> dict[str, Any]:
    found: dict[str, Any] = {"mask": mask.as_json(), "norms": None if norms is None else norms.as_json()}
    return found | ({} if rank is None else {"rank": rank.as_json()})
