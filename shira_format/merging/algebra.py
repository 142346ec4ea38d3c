"""Adapters computed from adapters by exact rules: difference, intersection, composition and inverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shira_format._core.arrays import Array, array_digest, bits_differ
from shira_format._core.compiled import union
from shira_format._core.fits import base_required
from shira_format.adapter import Adapter, LazyMapping
from shira_format.entries.base_check import dense_with_base, with_base
from shira_format.entries.mixing import keep_base
from shira_format.errors import BaseMismatch, SourceError
from shira_format.merging.inputs import Base, Input, Source, open_base, open_input
from shira_format.merging.run import open_merge
from shira_format.tensors import DenseTensor, SparseTensor, same_bits

if TYPE_CHECKING:
    from shira_format.checkpoints import Checkpoint


def subtract(first: Source, second: Source, base: Base = None) -> Adapter:
    """The adapter whose deltas are those of ``first`` minus those of ``second``, each at its own alpha.

    Returns:
        An adapter of strength 1 that computes each tensor when it is asked for. It has the dense tensors that ``first``
        alone replaces; those that both replace by the same bits cancel.

    Raises:
        SourceError: ``second`` replaces a tensor that ``first`` does not replace, or replaces by other values: that cannot
            be subtracted. Raised when the tensor is asked for.
        BaseMismatch, BaseRequired, FormatError, OSError: see :func:`shira_format.merging.merge`.
    """
    job = open_merge([first, second], weights=[1.0, -1.0], base=base)
    a, b = job.inputs

    def sparse(name: str) -> SparseTensor:
        found, _ = job.tensor(name)
        if found is not None:
            return found
        known = (a if name in a.adapter else b).adapter[name]
        return SparseTensor(
            name, known.shape, np.empty(0, np.int64), np.empty(0, known.dtype), base=np.empty(0, known.dtype)
        )

    def dense(name: str) -> DenseTensor:
        if name in _dense_names(b):
            raise SourceError(
                f"{b.label}: tensor {name!r} is replaced as a whole, which cannot be subtracted: leave it out (--exclude)"
            )
        found = a.dense(name)
        return found if a.self_contained else DenseTensor(name, found.values, base_digest=found.base_digest)

    def cancels(name: str) -> bool:
        both = all(name in _dense_names(one) for one in (a, b))
        return both and same_bits(a.adapter.dense[name].values, b.adapter.dense[name].values)

    replaced = dict.fromkeys([*_dense_names(a), *_dense_names(b)])
    names = [name for name in replaced if not cancels(name)]
    return Adapter(
        LazyMapping(job.names, sparse), dense=LazyMapping(names, dense), manifest=_provenance("subtract", a, b)
    )


def intersect(*adapters: Source, base: Base = None) -> Adapter:
    """The entries that all adapters have, with the values of the first."""
    return open_merge(adapters, method="intersect", options={"priority": "first"}, base=base).adapter()


def compose(first: Source, second: Source, *more: Source, base: Base = None) -> Adapter:
    """One adapter that gives bit for bit what the adapters give applied one after the other, each at its own alpha.

    Args:
        first: an adapter.
        second: one made for the base with ``first`` applied.
        more: further ones, each made for the base with all before it applied.
        base: the base of ``first``, a path or an open checkpoint; needed where the files lack the base's values.

    Returns:
        An adapter of strength 1 that computes each tensor when it is asked for.

    Raises:
        BaseMismatch: an adapter was not made for the result of those before it, or it is a patch or a mask.
        BaseRequired: the base's values are needed and not known.
        FormatError, OSError: a file is damaged, or cannot be read. All but OSError also when a tensor is asked for.
    """
    base = open_base(base)
    one = open_input(first, base)
    others = [open_input(source, None, number) for number, source in enumerate((second, *more), 2)]
    self_contained = one.self_contained and all(other.self_contained for other in others)
    manifest = _provenance("compose", one, *others)
    for other in others:
        label = f"{one.label}, then {other.label}"
        one = Input(label, _Composed(one, other, base, self_contained).adapter(), None, base)
    return Adapter(one.adapter, dense=one.adapter.dense, manifest=manifest)


def invert(adapter: Source, base: Base = None) -> Adapter:
    """The adapter that restores the base, bit for bit, from the weights with ``adapter`` applied at its own alpha.

    Args:
        adapter: an adapter.
        base: its base, a path or an open checkpoint; needed where the file lacks the base's values.

    Returns:
        An adapter of strength 1 that computes each tensor when it is asked for. It removes the tensors that are new in
        ``adapter``.

    Raises:
        BaseMismatch, BaseRequired, FormatError, OSError: see :func:`compose`.
    """
    one = open_input(adapter, open_base(base))
    alpha = one.adapter.alpha

    def sparse(name: str) -> SparseTensor:
        tensor = one.sparse(name)
        before = _base_of(one, tensor, one.base)
        after = tensor.applied(before, alpha)
        return keep_base(
            SparseTensor(name, tensor.shape, tensor.indices, before, base=after), self_contained=one.self_contained
        )

    def dense(name: str) -> DenseTensor:
        tensor = one.dense(name)
        if tensor.base is None:
            raise base_required(f"{one.label}: tensor {name!r}")
        kept = (
            {"base": tensor.values}
            if one.adapter.dense[name].base is not None
            else {"base_digest": array_digest(tensor.values)}
        )
        return DenseTensor(name, tensor.base, **kept)

    new = [name for name in one.adapter.dense if one.adapter.dense[name].base_digest is None] if alpha else []
    manifest = _provenance("inverse", one) | ({"removed": new} if new else {})
    names = [name for name in _dense_names(one) if name not in new]
    return Adapter(LazyMapping(_sparse_names(one), sparse), dense=LazyMapping(names, dense), manifest=manifest)


def _sparse_names(one: Input) -> Mapping[str, object]:
    """The sparse tensors that it changes: none at alpha 0."""
    return one.adapter if one.adapter.alpha else {}


def _dense_names(one: Input) -> Mapping[str, object]:
    """The tensors that it replaces: none at alpha 0."""
    return one.adapter.dense if one.adapter.alpha else {}


def _base_of(one: Input, tensor: SparseTensor, base: Checkpoint | None) -> Array:
    """The base's values at the entries."""
    if tensor.base is not None:
        return tensor.base
    if base is None:
        raise base_required(f"{one.label}: tensor {tensor.name!r}")
    return base.at(tensor.name, tensor.indices)  # deltas may lack them; checked when it was read


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
        whole = dict.fromkeys(name for one in pair for name in _dense_names(one))
        names = dict.fromkeys(name for one in pair for name in _sparse_names(one) if name not in whole)
        return Adapter(LazyMapping(names, self.sparse), dense=LazyMapping(whole, self.dense))

    def sparse(self, name: str) -> SparseTensor:
        """A tensor that neither replaces."""
        a, b = (name in _sparse_names(one) for one in (self.first, self.second))
        if a and b:
            found = self._both(name)
        elif a:
            found = self._alone(self.first, self.first.sparse(name))
        else:
            tensor = self.second.adapter[name]
            if self.base is not None:  # the second's base, too, where the first does not change the tensor
                tensor = self.second.named(with_base, tensor, self.base)
            found = self._alone(self.second, tensor)
        return keep_base(found, self_contained=self.self_contained)

    def _alone(self, one: Input, tensor: SparseTensor) -> SparseTensor:
        """One adapter at its own strength, as targets at strength 1."""
        if tensor.value_kind == "target" and one.adapter.alpha == 1:
            return tensor
        before = _base_of(one, tensor, self.base)
        after = tensor.applied(before, one.adapter.alpha)
        return SparseTensor(tensor.name, tensor.shape, tensor.indices, after, base=before)

    def _both(self, name: str) -> SparseTensor:
        a, b = self.first.sparse(name), self.second.adapter[name]
        before = _base_of(self.first, a, self.first.base)
        if b.shape != a.shape or (b.base_digest is not None and b.dtype != before.dtype):
            raise BaseMismatch(
                f"{self.second.label}: tensor {name!r} is {b.dtype}{list(b.shape)}, and {before.dtype}{list(a.shape)} in "
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
            raise base_required(f"{self.second.label}: tensor {name!r}")
        origin[at_a] = before
        current = origin.copy()
        current[at_a] = after
        self._check(b, current[at_b], at_b[np.isin(at_b, at_a, assume_unique=True)].size)
        values = current.copy()
        values[at_b] = b.applied(current[at_b], self.second.adapter.alpha)
        return SparseTensor(name, a.shape, indices, values, base=origin)

    def _check(self, b: SparseTensor, current: Array, shared: int) -> None:
        """Check that ``current`` are the values that the second adapter was made for, at its entries."""
        wrong = b.base is not None and bits_differ(b.base, current).any()
        if wrong or (b.base_digest is not None and array_digest(current) != b.base_digest):
            raise BaseMismatch(
                f"{self.second.label}: tensor {b.name!r} was not made for the result of {self.first.label} ({shared} entries of "
                "both): to merge adapters of one base use the method 'overwrite'"
            )

    def dense(self, name: str) -> DenseTensor:
        """A tensor that at least one of them replaces."""
        of_a, of_b = (name in _dense_names(one) for one in (self.first, self.second))
        sparse_a, sparse_b = (name in _sparse_names(one) for one in (self.first, self.second))
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
                self.second.named(_checked, after, found.values)
                same = (after.values.shape, after.values.dtype) == (found.values.shape, found.values.dtype)
                known: dict[str, Any] = {"base": found.base, "base_digest": found.base_digest} if same else {}
                found = DenseTensor(name, after.values, **known)
        else:
            found = self._replaced(name) if sparse_a else self._second_dense(name)
        if found.base is not None and not self.self_contained:
            found = DenseTensor(name, found.values, base_digest=found.base_digest)
        return found

    def _second_dense(self, name: str) -> DenseTensor:
        found = self.second.adapter.dense[name]
        return found if self.base is None else self.second.named(dense_with_base, found, self.base)

    def _replaced(self, name: str) -> DenseTensor:
        """The second replaces a tensor that the first changes."""
        a, b = self.first.sparse(name), self.second.adapter.dense[name]
        if self.base is not None:
            origin = np.array(self.base[name])
        elif b.base is not None:
            origin = np.array(b.base)
            origin.reshape(-1)[a.indices] = _base_of(self.first, a, self.first.base)
        elif b.base_digest is None:
            return b
        else:
            raise base_required(f"{self.second.label}: tensor {name!r}")
        current = origin.copy()
        current.reshape(-1)[a.indices] = a.applied(a.at_entries(origin), self.first.adapter.alpha)
        self.second.named(_checked, b, current)
        same = (origin.shape, origin.dtype) == (b.values.shape, b.values.dtype)
        return DenseTensor(name, b.values, base=origin if same else None)


def _checked(tensor: DenseTensor, weight: Array) -> DenseTensor:
    tensor.check_base(weight)
    return tensor


def _provenance(kind: str, *inputs: Input) -> dict[str, Any]:
    found: dict[str, Any] = {}
    manifest: Mapping[str, Any] = inputs[0].adapter.manifest
    if kind != "inverse" and "base_model" in manifest:  # an inverse is for the adapted model
        found["base_model"] = manifest["base_model"]
    if components := {k: v for one in inputs for k, v in one.adapter.manifest.get("components", {}).items()}:
        found["components"] = components
    licences = [one.adapter.manifest.get("license") for one in inputs]
    if licences[0] is not None and all(licence == licences[0] for licence in licences):
        found["license"] = licences[0]
    files = [one.to_manifest() | {"alpha": one.adapter.alpha} for one in inputs]
    return found | {"source": {"kind": kind, "files": files}}
