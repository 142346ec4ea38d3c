"""Whether adapters interfere: all pairs of a set, per tensor, per kind of layer, and in total."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from shira_analysis.measures.additive import Additive
from shira_analysis.measures.deltas import DeltaFile, delta_matrix, open_deltas, side_by_side
from shira_analysis.measures.interference import Interference, interference
from shira_analysis.measures.layer_kinds import KINDS, layer_kind
from shira_analysis.measures.orthogonality import Orthogonality, orthogonality
from shira_analysis.measures.overlap import Overlap, overlap
from shira_format.calibration.moments import Moments
from shira_format.checkpoints import Checkpoint
from shira_format.errors import BaseMismatch, SourceError
from shira_format.tensors import SparseTensor


@dataclass(frozen=True)
class Measures(Additive):
    """Measures of two adapters over some weights; ``+`` combines them.

    Attributes:
        tensors: weights that at least one adapts.
        both: weights that both adapt; only these can interfere within a layer.
        overlap: shared entries, over all weights.
        product: measures of ``A1^T A2`` over the weights with at least two dimensions that both adapt; None if there are none,
            or only masks.
        transposed: the same for ``A1 A2^T``; None if not requested.
        fed: how many of those weights have moments.
        interference: over the weights with moments; None without moments.
    """

    tensors: int
    both: int
    overlap: Overlap
    product: Orthogonality | None = None
    transposed: Orthogonality | None = None
    fed: int = 0
    interference: Interference | None = None

    def _add(self, _field: str, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        return a + b

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; measures that are missing or undefined are null."""
        return {
            "tensors": self.tensors,
            "both": self.both,
            "overlap": self.overlap.as_json(),
            "product": None if self.product is None else self.product.as_json(),
            "transposed": None if self.transposed is None else self.transposed.as_json(),
            "fed": self.fed,
            "interference": None if self.interference is None else self.interference.as_json(),
        }


@dataclass(frozen=True)
class TensorPair:
    """Two adapters on one weight.

    Attributes:
        name: the weight's name.
        shape: the weight's shape.
        kind: the kind of its layer; see :mod:`shira_analysis.measures.layer_kinds`.
        measures: the measures of this weight.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    measures: Measures


@dataclass
class Pair:
    """Two adapters.

    Attributes:
        first: path of the first.
        second: path of the second.
        tensors: every weight that at least one adapts, in file order.
        replaced: names of tensors that one replaces as a whole while the other replaces or adapts them: a conflict that no
            measure includes.
    """

    first: str
    second: str
    tensors: list[TensorPair] = field(default_factory=list)
    replaced: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, Measures]:
        """The measures of all weights of each kind of layer, in the order of ``KINDS``."""
        found: dict[str, Measures] = {}
        for tensor in self.tensors:
            known = found.get(tensor.kind)
            found[tensor.kind] = tensor.measures if known is None else known + tensor.measures
        return dict(sorted(found.items(), key=lambda item: KINDS.index(item[0])))

    @property
    def whole(self) -> Measures:
        """The measures of the whole adapters, with their weights as blocks of one matrix."""
        return combine_pairs(tensor.measures for tensor in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "first": self.first,
            "second": self.second,
            "replaced": list(self.replaced),
            "whole": self.whole.as_json(),
            "kinds": {kind: measures.as_json() for kind, measures in self.kinds.items()},
            "tensors": [
                {"name": one.name, "shape": list(one.shape), "kind": one.kind} | one.measures.as_json()
                for one in self.tensors
            ],
        }


def combine_pairs(measures: Iterable[Measures]) -> Measures:
    """Combine the measures of several weights."""
    return sum(measures, Measures(0, 0, Overlap()))


def measure_pairs(
    adapters: Sequence[str | os.PathLike[str] | DeltaFile],
    moments: Moments | None = None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    strict: bool = True,
    transposed: bool = False,
    spectral: bool = False,
    progress: Callable[[str], object] = lambda _: None,
) -> list[Pair]:
    """Measure every pair of adapters of one base, holding one weight per adapter in memory.

    Args:
        adapters: at least two paths, or open files from :func:`open_deltas`.
        moments: second moments of the layers' inputs, for interference in feature space.
        base: the base checkpoint of adapters given as paths.
        strict: refuse moments that cover none of the weights.
        transposed: measure ``A1 A2^T`` as well: what a layer reads, or what it writes if its weight is ``[in, out]``.
        spectral: compute spectral norms as well.
        progress: called with the name of each finished weight.

    Raises:
        SourceError: fewer than two adapters, shapes differ, moments cover none of the weights, or scipy is missing.
        BaseMismatch: two of them hold different base values for an entry.
        FormatError, BaseRequired, BaseMismatch: see :meth:`DeltaFile.tensor`.
    """
    if len(adapters) < 2:
        raise SourceError("a pair takes at least two adapters")
    files = [open_deltas(adapter, base) for adapter in adapters]
    if moments is not None and strict:
        check_moments(moments, (name for file in files for name in file.names))
    numbers = list(combinations(range(len(files)), 2))
    pairs = [
        Pair(str(files[i].path), str(files[j].path), replaced=replaced_tensors(files[i], files[j]))
        for i, j in numbers
    ]
    for name, tensors in side_by_side(files):
        known = next(tensor for tensor in tensors if tensor is not None)
        kind = layer_kind(name, known.shape)
        matrices = [_matrix(file, tensor) for file, tensor in zip(files, tensors, strict=True)]
        for pair, (i, j) in zip(pairs, numbers, strict=True):
            if tensors[i] is None and tensors[j] is None:
                continue
            try:
                found = _measures(
                    name, (tensors[i], tensors[j]), (matrices[i], matrices[j]), moments,
                    transposed=transposed, spectral=spectral,
                )  # fmt: skip
            except (SourceError, BaseMismatch) as error:
                raise type(error)(f"{files[i].path} and {files[j].path}: {error}") from None
            pair.tensors.append(TensorPair(name, known.shape, kind, found))
        progress(name)
    return pairs


def check_moments(moments: Moments, names: Iterable[str]) -> None:
    """Refuse moments that cover none of the adapted weights, such as those of another model.

    Raises:
        SourceError: none of the adapted weights, given by ``names``, has moments.
    """
    if moments.keys().isdisjoint(names):
        example = next(iter(moments), None)
        raise SourceError(f"the moments cover none of the adapted weights; they cover {example!r}, for example")


def replaced_tensors(first: DeltaFile, second: DeltaFile) -> tuple[str, ...]:
    """Names of tensors that one replaces as a whole while the other replaces or adapts them; see :class:`Pair`."""
    both = {*first.names, *first.whole} & {*second.names, *second.whole}
    return tuple(name for name in dict.fromkeys((*first.whole, *second.whole)) if name in both)


def _matrix(file: DeltaFile, tensor: SparseTensor | None) -> Any:
    if tensor is None or tensor.value_kind == "none":
        return None
    try:
        return delta_matrix(tensor)
    except SourceError as error:
        raise SourceError(f"{file.path}: {error}") from None


def _measures(
    name: str, tensors: tuple[SparseTensor | None, SparseTensor | None], matrices: tuple[Any, Any],
    moments: Moments | None, *, transposed: bool, spectral: bool,
) -> Measures:  # fmt: skip
    common = overlap(*tensors)
    a, b = tensors
    if a is None or b is None:
        return Measures(1, 0, common)
    if any(matrix is None for matrix in matrices):
        return Measures(1, 1, common)
    product = turned = fed = None
    if len(a.shape) > 1:
        product = orthogonality(*matrices, spectral=spectral)
        turned = orthogonality(*matrices, transposed=True, spectral=spectral) if transposed else None
        if moments is not None and name in moments:
            fed = interference(*matrices, moments[name])
    return Measures(1, 1, common, product, turned, int(fed is not None), fed)
