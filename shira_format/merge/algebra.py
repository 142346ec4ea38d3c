"""Adapters made of adapters that are no merge: one after the other, taken away, met, and turned round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shira_format._core.arrays import Array, array_digest, bits_differ
from shira_format._core.compiled import union
from shira_format.adapter import Adapter, LazyMapping
from shira_format.entries.base_check import dense_with_base, with_base
from shira_format.entries.mixing import framed
from shira_format.errors import BaseMismatch, BaseRequired, SourceError
from shira_format.merge.inputs import Input, Source, open_input
from shira_format.merge.run import merged, open_merge
from shira_format.tensors import DenseTensor, SparseTensor, same_bits

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint


def subtract(a: Source, b: Source, base: Checkpoint | None = None) -> Adapter:
    """The adapter whose deltas are those of ``a`` less those of ``b``.

    Returns:
        An adapter of strength 1 that computes each tensor when it is asked for; those of ``a`` and ``b`` count. Of whole
        tensors it has those that ``a`` alone replaces; what both replace by the same bits is no difference.

    Raises:
        SourceError: ``b`` replaces a tensor as a whole that ``a`` does not, or not by the same: that cannot be taken away.
            Told when the tensor is asked for.
        BaseMismatch, BaseRequired, FormatError, OSError: see :func:`shira_format.merge.merge`.
    """
    job = open_merge([a, b], weights=[1.0, -1.0], base=base)
    first, second = job.inputs

    def sparse(name: str) -> SparseTensor:
        found, _ = job.tensor(name)
        if found is not None:
            return found
        known = (first if name in first.adapter else second).adapter[name]
        return SparseTensor(
            name, known.shape, np.empty(0, np.int64), np.empty(0, known.dtype), base=np.empty(0, known.dtype)
        )

    def dense(name: str) -> DenseTensor:
        if name in _names(second, whole=True):
            raise SourceError(
                f"{second.label}: tensor {name!r} is replaced as a whole, which cannot be taken away: leave it out (--exclude)"
            )
        found = first.dense(name)
        return found if first.self_contained else DenseTensor(name, found.values, base_digest=found.base_digest)

    def alike(name: str) -> bool:
        both = all(name in _names(one, whole=True) for one in (first, second))
        return both and same_bits(first.adapter.dense[name].values, second.adapter.dense[name].values)

    replaced = dict.fromkeys(name for one in (first, second) for name in _names(one, whole=True))
    names = [name for name in replaced if not alike(name)]
    return Adapter(
        LazyMapping(job.names, sparse),
        dense=LazyMapping(names, dense),
        manifest=_provenance("subtract", first, second),
    )


def intersect(*sources: Source, base: Checkpoint | None = None) -> Adapter:
    """The entries that all adapters have, as the first one has them."""
    return merged(sources, method="intersect", options={"priority": "first"}, base=base)


def compose(first: Source, second: Source, *more: Source, base: Checkpoint | None = None) -> Adapter:
    """One adapter after the other as one: applied, it gives bit for bit what they give in this order.

    Args:
        first: an adapter.
        second: one that was made for the base with ``first`` on it, so that its base values are what ``first`` leaves.
        more: further ones, each made for what those before it leave.
        base: the base of ``first``; needed where the files lack the base's values.

    Returns:
        An adapter of strength 1 that computes each tensor when it is asked for; those of the adapters count.

    Raises:
        BaseMismatch: one was not made for what those before it give, or not for weights of this shape and dtype; or it is
            a patch or a mask.
        BaseRequired: the base's values are needed, and nothing knows them.
        FormatError, OSError: a file is damaged, or cannot be read. All but the last also when a tensor is asked for.
    """
    one = open_input(first, base)
    others = [open_input(source, None, number) for number, source in enumerate((second, *more), 2)]
    self_contained = one.self_contained and all(other.self_contained for other in others)
    manifest = _provenance("compose", one, *others)
    for other in others:
        label = f"{one.label}, then {other.label}"
        one = Input(label, _Composed(one, other, base, self_contained).adapter(), None, base)
    return Adapter(one.adapter, dense=one.adapter.dense, manifest=manifest)


def invert(a: Source, base: Checkpoint | None = None) -> Adapter:
    """The adapter that brings the weights with ``a`` on them back to the base, bit for bit.

    Args:
        a: an adapter; its own strength counts.
        base: its base; needed where the file lacks the base's values.

    Returns:
        An adapter of strength 1 that computes each tensor when it is asked for. It removes the tensors that are new in ``a``.

    Raises:
        BaseMismatch, BaseRequired, FormatError, OSError: see :func:`compose`.
    """
    one = open_input(a, base)
    alpha = one.adapter.alpha

    def sparse(name: str) -> SparseTensor:
        tensor = one.sparse(name)
        before = _base_of(one, tensor)
        after = tensor.applied(before, alpha)
        return framed(
            SparseTensor(name, tensor.shape, tensor.indices, before, base=after), self_contained=one.self_contained
        )

    def dense(name: str) -> DenseTensor:
        tensor = one.dense(name)
        if tensor.base is None:
            raise BaseRequired(f"{one.label}: tensor {name!r}: {_UNKNOWN}")
        kept = (
            {"base": tensor.values}
            if one.adapter.dense[name].base is not None
            else {"base_digest": array_digest(tensor.values)}
        )
        return DenseTensor(name, tensor.base, **kept)

    new = [name for name in one.adapter.dense if one.adapter.dense[name].base_digest is None] if alpha else []
    manifest = _provenance("inverse", one) | ({"removed": new} if new else {})
    names = [name for name in _names(one, whole=True) if name not in new]
    return Adapter(
        LazyMapping(_names(one, whole=False), sparse), dense=LazyMapping(names, dense), manifest=manifest
    )


_UNKNOWN = "the base's values are not known: pass the base (--base), or convert with --self-contained"


def _names(one: Input, *, whole: bool) -> list[str]:
    """The tensors that it changes: at strength 0 none."""
    return list(one.adapter.dense if whole else one.adapter) if one.adapter.alpha else []


def _base_of(one: Input, tensor: SparseTensor) -> Array:
    """The base's values at the entries."""
    if tensor.base is not None:
        return tensor.base
    if one.base is None:
        raise BaseRequired(f"{one.label}: tensor {tensor.name!r}: {_UNKNOWN}")
    return one.base.at(tensor.name, tensor.indices)  # of deltas, which need not hold any; checked when it was read


@dataclass(frozen=True)
class _Composed:
    """``second`` after ``first``; see :func:`compose`."""

    first: Input
    second: Input
    base: Checkpoint | None
    self_contained: bool

    def adapter(self) -> Adapter:
        """All tensors, each computed when it is asked for."""
        pair = (self.first, self.second)
        whole = dict.fromkeys(name for one in pair for name in _names(one, whole=True))
        names = dict.fromkeys(name for one in pair for name in _names(one, whole=False) if name not in whole)
        return Adapter(LazyMapping(names, self.sparse), dense=LazyMapping(whole, self.dense))

    def sparse(self, name: str) -> SparseTensor:
        """A tensor that neither replaces as a whole."""
        a, b = (name in _names(one, whole=False) for one in (self.first, self.second))
        if a and b:
            found = self._both(name)
        elif a:
            found = self._alone(self.first, self.first.sparse(name))
        else:
            tensor = self.second.adapter[name]
            if self.base is not None:  # which is that of the second, too, where the first leaves the tensor alone
                tensor = _named(self.second, with_base, tensor, self.base)
            found = self._alone(self.second, tensor)
        return framed(found, self_contained=self.self_contained)

    def _alone(self, one: Input, tensor: SparseTensor) -> SparseTensor:
        """One adapter at its own strength, as targets at strength 1."""
        if tensor.value_kind == "target" and one.adapter.alpha == 1:
            return tensor
        before = tensor.base
        if before is None:
            if self.base is None:
                raise BaseRequired(f"{one.label}: tensor {tensor.name!r}: {_UNKNOWN}")
            before = self.base.at(tensor.name, tensor.indices)
        after = tensor.applied(before, one.adapter.alpha)
        return SparseTensor(tensor.name, tensor.shape, tensor.indices, after, base=before)

    def _both(self, name: str) -> SparseTensor:
        a, b = self.first.sparse(name), self.second.adapter[name]
        before = _base_of(self.first, a)
        if b.shape != a.shape or (b.base_digest is not None and b.dtype != before.dtype):
            raise BaseMismatch(
                f"{self.second.label}: tensor {name!r} is of {b.dtype}{list(b.shape)}, and of {before.dtype}{list(a.shape)} in "
                f"{self.first.label}"
            )
        after = a.applied(before, self.first.adapter.alpha)
        indices, (at_a, at_b) = union([a.indices, b.indices])
        origin = np.empty(indices.size, before.dtype)
        if self.base is not None:
            origin[:] = self.base.at(name, indices)
        elif b.base is not None:
            origin[at_b] = b.base
        elif not np.isin(at_b, at_a, assume_unique=True).all():
            raise BaseRequired(f"{self.second.label}: tensor {name!r}: {_UNKNOWN}")
        origin[at_a] = before
        current = origin.copy()
        current[at_a] = after
        self._check(b, current[at_b], at_b[np.isin(at_b, at_a, assume_unique=True)].size)
        values = current.copy()
        values[at_b] = b.applied(current[at_b], self.second.adapter.alpha)
        return SparseTensor(name, a.shape, indices, values, base=origin)

    def _check(self, b: SparseTensor, current: Array, met: int) -> None:
        """Whether these are the values that the second adapter was made for."""
        wrong = b.base is not None and bits_differ(b.base, current).any()
        if wrong or (b.base_digest is not None and array_digest(current) != b.base_digest):
            raise BaseMismatch(
                f"{self.second.label}: tensor {b.name!r} was not made for what {self.first.label} leaves ({met} entries of both): "
                "adapters of one base are joined by the method 'overwrite'"
            )

    def dense(self, name: str) -> DenseTensor:
        """A tensor that at least one replaces as a whole."""
        of_a, of_b = (name in _names(one, whole=True) for one in (self.first, self.second))
        sparse_a, sparse_b = (name in _names(one, whole=False) for one in (self.first, self.second))
        if of_a:
            found = self.first.dense(name)
            if sparse_b:
                tensor = self.second.adapter[name]
                values = np.array(found.values)
                current = tensor.at_entries(values)
                self._check(tensor, current, tensor.nnz)
                values.reshape(-1)[tensor.indices] = tensor.applied(current, self.second.adapter.alpha)
                found = DenseTensor(name, values, base=found.base, base_digest=found.base_digest)
            elif of_b:
                after = self.second.adapter.dense[name]
                _named(self.second, lambda whole, weight: whole.check_base(weight), after, found.values)
                same = (after.values.shape, after.values.dtype) == (found.values.shape, found.values.dtype)
                known: dict[str, Any] = {"base": found.base, "base_digest": found.base_digest} if same else {}
                found = DenseTensor(name, after.values, **known)
        else:
            found = self._replaced(name) if sparse_a else self._second_whole(name)
        if found.base is not None and not self.self_contained:
            found = DenseTensor(name, found.values, base_digest=found.base_digest)
        return found

    def _second_whole(self, name: str) -> DenseTensor:
        found = self.second.adapter.dense[name]
        return found if self.base is None else _named(self.second, dense_with_base, found, self.base)

    def _replaced(self, name: str) -> DenseTensor:
        """The second replaces what the first has changed."""
        a, b = self.first.sparse(name), self.second.adapter.dense[name]
        if self.base is not None:
            origin = np.array(self.base[name])
        elif b.base is not None:
            origin = np.array(b.base)
            origin.reshape(-1)[a.indices] = _base_of(self.first, a)
        elif b.base_digest is None:
            return b
        else:
            raise BaseRequired(f"{self.second.label}: tensor {name!r}: {_UNKNOWN}")
        current = origin.copy()
        current.reshape(-1)[a.indices] = a.applied(a.at_entries(origin), self.first.adapter.alpha)
        _named(self.second, lambda whole, weight: whole.check_base(weight), b, current)
        same = (origin.shape, origin.dtype) == (b.values.shape, b.values.dtype)
        return DenseTensor(name, b.values, base=origin if same else None)


def _named(one: Input, check: Any, tensor: Any, weight: Any) -> Any:
    try:
        return check(tensor, weight)
    except BaseMismatch as error:
        raise BaseMismatch(f"{one.label}: {error}") from None


def _provenance(kind: str, *inputs: Input) -> dict[str, Any]:
    found: dict[str, Any] = {}
    manifest: Mapping[str, Any] = inputs[0].adapter.manifest
    if kind != "inverse" and "base_model" in manifest:  # whose base is the adapted model
        found["base_model"] = manifest["base_model"]
    if components := {k: v for one in inputs for k, v in one.adapter.manifest.get("components", {}).items()}:
        found["components"] = components
    licences = [one.adapter.manifest.get("license") for one in inputs]
    if licences[0] is not None and all(licence == licences[0] for licence in licences):
        found["license"] = licences[0]
    files = [one.told() | {"alpha": one.adapter.alpha} for one in inputs]
    return found | {"source": {"kind": kind, "files": files}}
