"""What differs between two adapters, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices, bits_differ
from shira_format._core.compiled import union
from shira_format.adapter import Adapter
from shira_format.errors import SourceError
from shira_format.format import AdapterFile
from shira_format.format.manifest import DERIVED
from shira_format.names.filters import name_filter
from shira_format.tensors import DenseTensor, SparseTensor, same_bits

# Of a manifest what belongs to the content: told apart from provenance.
_CONTENT = DERIVED | {"alpha", "removed"}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two adapters.

    Attributes:
        name: of the tensor.
        whole: whether it is replaced as a whole; else it is sparse.
        entries: of each adapter; None if it has no such tensor. Of whole tensors: elements.
        traits: what differs beside the entries, in words: ``"shape"``, ``"dtype"``, ``"meaning"`` (targets, deltas, masks),
            ``"dtype of values"``, ``"base"`` (digest), ``"base values"`` (which one of the two keeps), ``"patch"``
            (name or rows of the base's tensor), ``"result"`` (digest).
        only_first: entries that the first alone has.
        only_second: entries that the second alone has.
        equal: entries of both with equal bits.
        other: entries of both with other values.
        largest: largest finite magnitude by which values of both (targets, or deltas) differ; 0 where all are equal; None if
            the values cannot be compared: nothing is shared, meanings differ and the base's values are not known, or no
            difference is finite.
        same_base: whether both are of the same base, at the entries that both have; None if nothing tells.
    """

    name: str
    whole: bool
    entries: tuple[int | None, int | None]
    traits: tuple[str, ...] = ()
    only_first: int = 0
    only_second: int = 0
    equal: int = 0
    other: int = 0
    largest: float | None = None
    same_base: bool | None = None

    @property
    def same(self) -> bool:
        """Whether both adapters have the tensor, with the same bits."""
        return None not in self.entries and not (self.traits or self.only_first or self.only_second or self.other)


@dataclass
class Differences:
    """What differs between two adapters.

    Attributes:
        tensors: of both, equal ones as well: first the sparse ones, then the whole ones, in the first adapter's order.
        alpha: their strengths.
        removed: names of the base's tensors that the first alone takes away, and those that the second alone does.
        provenance: other keys of the manifests that differ, with both values (None: has none). These make no difference of
            content.
    """

    tensors: list[TensorDifference] = field(default_factory=list)
    alpha: tuple[float, float] = (1.0, 1.0)
    removed: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    provenance: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether the content is the same, as ``==`` says of two :class:`Adapter`."""
        return self.alpha[0] == self.alpha[1] and not any(self.removed) and all(t.same for t in self.tensors)

    @property
    def different(self) -> list[TensorDifference]:
        """The tensors that are not the same."""
        return [tensor for tensor in self.tensors if not tensor.same]


def differences(
    a: Adapter | str | os.PathLike[str],
    b: Adapter | str | os.PathLike[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[str], object] = lambda _: None,
) -> Differences:
    """Compare two adapters; one tensor of each is in memory at a time, and every one is read and checked.

    Args:
        a: an adapter, or the path of its file.
        b: another one.
        include: regexes; a tensor is compared only if one of them is found in its name.
        exclude: regexes; a tensor is left out if one of them is found in its name.
        progress: called with the name of each tensor that is done.

    Raises:
        SourceError: a regex that is none, or no tensor is left by the choice of names.
        FormatError: a file is no adapter, or is damaged.
        OSError: a file cannot be read.

    Example:
        >>> differences("a.st", "a.st").same
        True
    """
    chosen = name_filter(include, exclude)
    first, second = (
        one if isinstance(one, Adapter) else AdapterFile(one, separate_maps=True).adapter() for one in (a, b)
    )
    gone = [{name for name in one.removed if chosen(name)} for one in (first, second)]
    found = Differences(
        alpha=(first.alpha, second.alpha),
        removed=(tuple(sorted(gone[0] - gone[1])), tuple(sorted(gone[1] - gone[0]))),
        provenance=dict(_provenance(first.manifest, second.manifest)),
    )
    for name in filter(chosen, dict.fromkeys([*first, *second])):
        found.tensors.append(_sparse(name, first.get(name), second.get(name)))
        progress(name)
    for name in filter(chosen, dict.fromkeys([*first.dense, *second.dense])):
        found.tensors.append(_whole(name, first.dense.get(name), second.dense.get(name)))
        progress(name)
    if (include or exclude) and not found.tensors and not any(gone):
        raise SourceError("no tensor is left by the choice of names")
    return found


def _provenance(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in dict.fromkeys([*a, *b]):
        if key not in _CONTENT and (key in a, a.get(key)) != (key in b, b.get(key)):
            yield key, (a.get(key), b.get(key))


def _sparse(name: str, a: SparseTensor | None, b: SparseTensor | None) -> TensorDifference:
    if a is None or b is None:
        return TensorDifference(
            name, whole=False, entries=(None if a is None else a.nnz, None if b is None else b.nnz),
            only_first=0 if a is None else a.nnz, only_second=0 if b is None else b.nnz,
        )  # fmt: skip
    traits = list(_traits(a, b))
    if a.shape != b.shape:  # one flat index is another place in each
        return TensorDifference(
            name, whole=False, entries=(a.nnz, b.nnz), traits=tuple(traits), only_first=a.nnz, only_second=b.nnz
        )
    mine, its = _shared(a.indices, b.indices)
    unequal = _unequal(a, b, mine, its)
    other = int(np.count_nonzero(unequal))
    same_base = _same_base(a, b, mine, its)
    if same_base is False:
        traits.append("base")
    elif mine.size == a.nnz == b.nnz and a.base_digest != b.base_digest:
        traits.append("base")  # one of them does not say
    return TensorDifference(
        name, whole=False, entries=(a.nnz, b.nnz), traits=tuple(traits),
        only_first=a.nnz - mine.size, only_second=b.nnz - its.size, equal=mine.size - other, other=other,
        largest=_largest(a, b, mine, its, unequal), same_base=same_base,
    )  # fmt: skip


def _traits(a: SparseTensor, b: SparseTensor) -> Iterator[str]:
    if a.shape != b.shape:
        yield "shape"
    if a.dtype != b.dtype:
        yield "dtype"
    if a.value_kind != b.value_kind:
        yield "meaning"
    elif a.value_kind == "delta" and a.values.dtype != b.values.dtype:
        yield "dtype of values"
    if (a.base is None) != (b.base is None):
        yield "base values"
    if (a.base_name, _resized(a)) != (b.base_name, _resized(b)) or not same_bits(a.new_rows, b.new_rows):
        yield "patch"
    if a.result_digest != b.result_digest:
        yield "result"


def _resized(tensor: SparseTensor) -> int | None:
    """The rows of the result, if these are not the base's: a count that changes nothing is no difference."""
    return None if tensor.result_shape == tensor.shape else tensor.rows


def _shared(a: Indices, b: Indices) -> tuple[Indices, Indices]:
    """Where in each the numbers are that both have."""
    every, (at_a, at_b) = union([a, b])
    where = np.full(every.size, -1, np.int64)
    where[at_a] = np.arange(a.size)
    its = np.flatnonzero(where[at_b] >= 0)
    return where[at_b[its]], its


def _unequal(a: SparseTensor, b: SparseTensor, mine: Indices, its: Indices) -> Array:
    """Of the shared entries, which ones have not the same bits of the same meaning; bool ``[n]``."""
    if a.value_kind == b.value_kind == "none":
        return np.zeros(mine.size, bool)
    if a.value_kind != b.value_kind or a.values.dtype != b.values.dtype:
        return np.ones(mine.size, bool)
    return bits_differ(a.values[mine], b.values[its])


def _largest(a: SparseTensor, b: SparseTensor, mine: Indices, its: Indices, unequal: Array) -> float | None:
    if not mine.size or "none" in (a.value_kind, b.value_kind):
        return None
    if not unequal.any():
        return 0.0
    numbers = []
    for tensor, at in ((a, mine[unequal]), (b, its[unequal])):
        values = tensor.values[at].astype(np.float64)
        if a.value_kind != b.value_kind and tensor.value_kind == "target":
            if tensor.base is None:
                return None
            with np.errstate(over="ignore", invalid="ignore"):
                values -= tensor.base[at].astype(np.float64)
        numbers.append(values)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        steps = np.abs(numbers[0] - numbers[1])
    steps = steps[np.isfinite(steps)]
    return float(steps.max()) if steps.size else None


def _same_base(a: SparseTensor, b: SparseTensor, mine: Indices, its: Indices) -> bool | None:
    if a.base_digest is None or b.base_digest is None or not mine.size:
        return None
    if a.dtype != b.dtype:
        return False
    if mine.size == a.nnz == b.nnz:
        return a.base_digest == b.base_digest
    if a.base is None or b.base is None:
        return None  # digests of different entries tell nothing
    return not bool(bits_differ(a.base[mine], b.base[its]).any())


def _whole(name: str, a: DenseTensor | None, b: DenseTensor | None) -> TensorDifference:
    if a is None or b is None:
        sizes = (None if a is None else a.values.size, None if b is None else b.values.size)
        return TensorDifference(
            name, whole=True, entries=sizes, only_first=sizes[0] or 0, only_second=sizes[1] or 0
        )
    traits = [what for what, differs in (
        ("shape", a.values.shape != b.values.shape),
        ("dtype", a.values.dtype != b.values.dtype),
        ("base values", (a.base is None) != (b.base is None)),
        ("base", a.base_digest != b.base_digest),
    ) if differs]  # fmt: skip
    known = a.base_digest is not None and b.base_digest is not None
    same_base = a.base_digest == b.base_digest if known else None
    sizes = (a.values.size, b.values.size)
    if "shape" in traits:
        return TensorDifference(
            name, whole=True, entries=sizes, traits=tuple(traits), only_first=sizes[0], only_second=sizes[1],
            same_base=same_base,
        )  # fmt: skip
    flat_a, flat_b = a.values.reshape(-1), b.values.reshape(-1)
    unequal = bits_differ(flat_a, flat_b) if "dtype" not in traits else np.ones(flat_a.size, bool)
    other = int(np.count_nonzero(unequal))
    return TensorDifference(
        name, whole=True, entries=sizes, traits=tuple(traits), equal=sizes[0] - other, other=other,
        largest=_largest_of_whole(flat_a[unequal], flat_b[unequal]) if sizes[0] else None, same_base=same_base,
    )  # fmt: skip


def _largest_of_whole(a: Array, b: Array) -> float | None:
    if not a.size:
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.abs(a.astype(np.float64) - b.astype(np.float64))
    steps = steps[np.isfinite(steps)]
    return float(steps.max()) if steps.size else None
