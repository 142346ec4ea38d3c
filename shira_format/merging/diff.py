"""The differences of two adapters, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shira_format._core.arrays import Array, Indices, bits_differ
from shira_format._core.compiled import union
from shira_format.adapter import Adapter
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.errors import SourceError
from shira_format.format import AdapterFile
from shira_format.format.fields import representable
from shira_format.format.manifest import DERIVED
from shira_format.merging.inputs import NO_TENSOR
from shira_format.names.filters import name_filter
from shira_format.tensors import DenseTensor, SparseTensor, same_bits

# Keys of a manifest that belong to the content; the others are provenance.
_CONTENT = DERIVED | {"alpha", "removed"}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in two adapters.

    Attributes:
        name: of the tensor.
        whole: whether it is dense, replaced as a whole; else it is sparse.
        entries: the number of entries (elements of a dense tensor) in each adapter; None: it has no such tensor.
        traits: what differs besides the entries: ``"shape"``, ``"dtype"``, ``"meaning"`` (targets, deltas, masks),
            ``"dtype of values"``, ``"base"`` (digest), ``"base values"`` (which one of the two keeps), ``"patch"``
            (name or rows of the base's tensor), ``"result"`` (digest).
        only_first: entries of the first adapter only.
        only_second: entries of the second adapter only.
        equal: entries of both with equal bits.
        other: entries of both with other values.
        largest: the largest finite difference of values (targets, or deltas) of shared entries; 0 if all are equal; None if
            there is none: no shared entries, targets and deltas without base values, or no finite difference.
        same_base: whether both are of the same base, at the entries of both; None if this is not known.
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
        """Whether both adapters have the tensor, bit for bit the same."""
        return None not in self.entries and not (self.traits or self.only_first or self.only_second or self.other)


@dataclass
class Differences:
    """The differences of two adapters.

    Attributes:
        tensors: all tensors, equal ones too: first the sparse, then the dense ones, in the first adapter's order.
        alpha: the alphas of both.
        removed: names of the base's tensors that only the first removes, and those that only the second removes.
        provenance: the other keys of the manifests that differ, with both values (None: missing); not part of the content.
    """

    tensors: list[TensorDifference] = field(default_factory=list)
    alpha: tuple[float, float] = (1.0, 1.0)
    removed: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    provenance: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether the content is the same, as by ``==`` of two :class:`Adapter`."""
        return self.alpha[0] == self.alpha[1] and not any(self.removed) and all(t.same for t in self.tensors)

    @property
    def different(self) -> list[TensorDifference]:
        """The tensors that are not the same."""
        return [tensor for tensor in self.tensors if not tensor.same]


def diff(
    first: Adapter | str | os.PathLike[str],
    second: Adapter | str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[str], object] = lambda _: None,
) -> Differences:
    """Compare two adapters; every tensor is read and checked, one of each at a time.

    Args:
        first: an adapter, or the path of its file.
        second: another one.
        base: the checkpoint that both are for; needed for files that are read with their base alone.
        include: regexes; only tensors whose names match one are compared.
        exclude: regexes; tensors whose names match one are left out.
        progress: called with the name of each tensor that is done.

    Raises:
        SourceError: an invalid regex, no tensor is left, or ``base`` is no checkpoint.
        BaseRequired: a file can be read with its base alone.
        BaseMismatch: ``base`` is another one.
        FormatError: a file is no adapter, or is damaged.
        OSError: a file cannot be read.

    Example:
        >>> diff("a.st", "a.st").same
        True
    """
    chosen = name_filter(include, exclude)
    opened = None if base is None else open_checkpoint(base)
    a, b = (
        one if isinstance(one, Adapter) else AdapterFile(one, base=opened).adapter() for one in (first, second)
    )
    gone = [{name for name in one.removed if chosen(name)} for one in (a, b)]
    found = Differences(
        alpha=(a.alpha, b.alpha),
        removed=(tuple(sorted(gone[0] - gone[1])), tuple(sorted(gone[1] - gone[0]))),
        provenance=dict(_provenance(a.manifest, b.manifest)),
    )
    for name in filter(chosen, dict.fromkeys([*a, *b])):
        found.tensors.append(_sparse(name, a.get(name), b.get(name)))
        progress(name)
    for name in filter(chosen, dict.fromkeys([*a.dense, *b.dense])):
        found.tensors.append(_dense(name, a.dense.get(name), b.dense.get(name)))
        progress(name)
    if (include or exclude) and not found.tensors and not any(gone):
        raise SourceError(NO_TENSOR)
    return found


def _provenance(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in dict.fromkeys([*a, *b]):
        if key not in _CONTENT and (key in a, a.get(key)) != (key in b, b.get(key)):
            yield key, (representable(a.get(key)), representable(b.get(key)))


def _sparse(name: str, a: SparseTensor | None, b: SparseTensor | None) -> TensorDifference:
    if a is None or b is None:
        return TensorDifference(
            name, whole=False, entries=(None if a is None else a.nnz, None if b is None else b.nnz),
            only_first=0 if a is None else a.nnz, only_second=0 if b is None else b.nnz,
        )  # fmt: skip
    traits = list(_traits(a, b))
    if a.shape != b.shape:  # a flat index is another element in each
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
        traits.append("base")  # only one has a digest
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
    """The rows of the result if they differ from the base's."""
    return None if tensor.result_shape == tensor.shape else tensor.rows


def _shared(a: Indices, b: Indices) -> tuple[Indices, Indices]:
    """The positions of the shared indices in each."""
    every, (at_a, at_b) = union([a, b])
    where = np.full(every.size, -1, np.int64)
    where[at_a] = np.arange(a.size)
    its = np.flatnonzero(where[at_b] >= 0)
    return where[at_b[its]], its


def _unequal(a: SparseTensor, b: SparseTensor, mine: Indices, its: Indices) -> Array:
    """Which shared entries differ in bits or in what the values are; bool ``[n]``."""
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
    return _largest_step(*numbers)


def _largest_step(a: Array, b: Array) -> float | None:
    """The largest finite difference; 0 of no numbers, None if none is finite."""
    if not a.size:
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are values like any other
        steps = np.abs(a.astype(np.float64) - b.astype(np.float64))
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
        return None  # digests of different entries cannot be compared
    return not bool(bits_differ(a.base[mine], b.base[its]).any())


def _dense(name: str, a: DenseTensor | None, b: DenseTensor | None) -> TensorDifference:
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
        largest=_largest_step(flat_a[unequal], flat_b[unequal]) if sizes[0] else None, same_base=same_base,
    )  # fmt: skip
