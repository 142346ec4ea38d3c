"""Switching the adapters of a live model between two requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from shira_format._core import compiled
from shira_format._core.arrays import Array, Indices
from shira_format._core.threads import Threads
from shira_format.adapter import Adapter, LazyMapping
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.entries.aligned import AlignedEntries, Contribution
from shira_format.entries.loaded import LoadedAdapter, load_adapter
from shira_format.entries.mixing import mix_values
from shira_format.entries.placed import compare_spread, load_placed, on_parameters
from shira_format.errors import BaseMismatch, BaseRequired
from shira_format.live.checks import (
    Parts,
    Replacement,
    check_digests,
    check_frames,
    check_replaced,
    check_replacement,
    check_same,
)
from shira_format.live.lock import ReadWriteLock
from shira_format.live.memory import Frame, Places
from shira_format.live.models import weights_of
from shira_format.live.names import Fit, Names
from shira_format.live.pool import AdapterPool
from shira_format.live.weights import LiveWeight, live_weight
from shira_format.names.layouts import Rename
from shira_format.names.placement import Layout
from shira_format.tensors import SparseTensor, numel, same_bits

# An adapter, the path of its file, or its name in the pool.
Source = LoadedAdapter | Adapter | str | os.PathLike[str]


@dataclass(frozen=True)
class Report:
    """What is applied to the model now.

    Attributes:
        adapters: their labels and strengths, in the order in which they were loaded.
        tensors: number of weights with changed entries.
        entries: number of changed entries.
        overlapping: number of these that several adapters change.
        whole: number of tensors that are replaced as a whole.
        notices: what to know of the adapters, such as that their tensors lie otherwise in this model.
    """

    adapters: tuple[tuple[str, float], ...] = ()
    tensors: int = 0
    entries: int = 0
    overlapping: int = 0
    whole: int = 0
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Wanted:
    """An adapter that is to be applied, and how its names become the model's."""

    adapter: LoadedAdapter
    alpha: float
    rename: Rename


@dataclass(frozen=True)
class _EntryChange:
    """Changed entries of one weight: the base's values, and the new ones."""

    indices: Indices
    base: Array
    values: Array
    overlapping: int = 0

    def apply(self, weight: LiveWeight) -> None:
        weight.put(self.indices, self.values)

    def undo(self, weight: LiveWeight) -> None:
        weight.put(self.indices, self.base)

    def is_on(self, weight: LiveWeight) -> bool:
        return same_bits(weight.get(self.indices), self.values)


@dataclass(frozen=True)
class _DenseChange:
    """A replaced tensor; ``base`` is None if the model did not have it."""

    base: Array | None
    values: Array

    def apply(self, weight: LiveWeight) -> None:
        weight.fill(self.values)

    def undo(self, weight: LiveWeight) -> None:
        assert self.base is not None
        weight.fill(self.base)

    def is_on(self, weight: LiveWeight) -> bool:
        return same_bits(weight.whole(), self.values)


_Change = _EntryChange | _DenseChange
_State = dict[str, _Change]  # by the name in the model


class Switcher:
    """Loads, switches and combines adapters on a live model, at any strength, and restores the base bit for bit.

    Every change is checked before the first weight is written: the file, names, shapes, dtypes, and the digest of the
    base's values at the adapter's entries. For an adapter that has passed before, the digest is checked again during the
    switch. If anything fails, what was written is undone.
    Parameters are written in place, never replaced, so a compiled model is not compiled again.

    Several adapters add up: ``base + sum of alpha_i (target_i - base)``, summed in float64 at entries of several, rounded
    once; the order does not matter. The same adapter loaded twice counts twice. One adapter alone at strength 1 gives its
    targets bit for bit.

    Threads: changes wait for each other. A forward pass in another thread reads each element either before or after a
    change, but may read some of both; within ``with switcher.serving():`` changes wait until it ends.

    While adapters are applied, do not write to their entries: the next change overwrites them.
    The model may be moved to another device; after a cast to another dtype, or if a changed weight was resized, untied or
    replaced by another one, the next change is refused.

    Args:
        model: a ``torch.nn.Module``, also compiled or wrapped by PEFT; a diffusers pipeline, whose adapters name tensors
            ``COMPONENT/NAME``; or a dictionary of torch tensors or numpy arrays.
        prefix: prepended to the adapter's names, such as ``"bert."``; by default the one prefix that makes all names fit; or, if
            the model has the tensors of another program, such as a fused one for several, those that they are in there
            (:attr:`Report.notices` says so).
        rename: instead of a prefix, a function from a name in an adapter to one in the model.
        layout: instead of a prefix, where a server's rank has the adapters' tensors; only what the rank has is decoded.
        base: with ``layout``, the checkpoint that adapters were made for: needed for those without the base's values of which
            the rank has slices. They are compared with the model's bit for bit.
        pool: where :meth:`load`, :meth:`switch` and :meth:`set` look up adapters by name.
        threads: at most this many; all cores by default.

    Example:
        >>> switcher = Switcher(model)
        >>> switcher.load("style.st", alpha=0.7)
        >>> switcher.switch("other.st")
        >>> switcher.revert()
    """

    def __init__(
        self,
        model: Any,
        *,
        prefix: str | None = None,
        rename: Callable[[str], str] | None = None,
        layout: Layout | None = None,
        base: str | os.PathLike[str] | Checkpoint | None = None,
        pool: AdapterPool | None = None,
        threads: int | None = None,
    ) -> None:
        if prefix is not None and rename is not None:
            raise TypeError("prefix or rename, not both")
        if layout is not None and (prefix is not None or rename is not None):
            raise TypeError("a layout has names of its own: leave out prefix and rename")
        if base is not None and layout is None:
            raise TypeError("base is for a layout")
        self._weights = weights_of(model)
        self._names = Names(prefix, rename)
        self._layout = layout
        self._base = None if base is None else open_checkpoint(base)
        # Adapters on the model's parameters, while someone holds the adapter that they were made of.
        self._placed: WeakKeyDictionary[LoadedAdapter, LoadedAdapter] = WeakKeyDictionary()
        self._pool = pool
        self._threads = Threads(threads)
        self._lock = ReadWriteLock()
        self._active: list[tuple[LoadedAdapter, float]] = []
        self._state: _State = {}
        self._frames: dict[str, Frame] = {}  # of the weights that are changed
        self._checked: set[str] = set()  # keys of adapters whose digests matched
        compiled.load()

    def load(self, adapter: Source, alpha: float | None = None) -> Report:
        """Apply an adapter in addition to those that are applied.

        Args:
            adapter: an adapter, the path of its file, or its name in the pool.
            alpha: strength; the adapter's own by default.

        Raises:
            BaseMismatch: the model is not the adapter's base; no weight was changed.
            BaseRequired: a rank has a part of a tensor whose base values are not known; no weight was changed.
            FormatError: the file is damaged; no weight was changed.
            OSError: it cannot be read.
        """
        with self._lock.writing():
            return self._change_to([*self._active, self._load(adapter, alpha)])

    def switch(self, adapter: Source, alpha: float | None = None) -> Report:
        """Replace all applied adapters by this one, in one pass; arguments and errors as for :meth:`load`."""
        return self.set([(adapter, alpha)])

    def set(self, adapters: Iterable[tuple[Source, float | None]]) -> Report:
        """Apply exactly these adapters, each with its strength (None: its own); errors as for :meth:`load`."""
        wanted = list(adapters)
        with self._lock.writing():
            return self._change_to([self._load(adapter, alpha) for adapter, alpha in wanted])

    def unload(self, adapter: Source) -> Report:
        """Remove one adapter; the latest, if it is applied several times.

        Raises:
            KeyError: it is not applied.
        """
        with self._lock.writing():
            wanted = adapter if isinstance(adapter, (LoadedAdapter, Adapter)) else os.fspath(adapter)
            if self._pool is not None and isinstance(wanted, str) and wanted in self._pool:
                wanted = os.fspath(self._pool[wanted])
            for at in reversed(range(len(self._active))):
                found = self._active[at][0]
                same = isinstance(wanted, LoadedAdapter) and found.source is wanted.source
                if same or found is wanted or found.source is wanted or found.label == wanted:
                    return self._change_to(self._active[:at] + self._active[at + 1 :])
            raise KeyError(f"{wanted} is not on the model")

    def revert(self) -> Report:
        """Remove all adapters: the base is restored bit for bit.

        Raises:
            BaseMismatch: the model was cast, lost a layer, or a weight of it was resized, untied or replaced, since they were
                applied; no weight was changed.
        """
        return self.set([])

    @contextmanager
    def applied(self, adapter: Source, alpha: float | None = None) -> Iterator[Report]:
        """Apply this adapter in addition, within a ``with`` block; afterwards the previous adapters are restored."""
        with self._lock.writing():
            before = list(self._active)
            report = self.load(adapter, alpha)
        try:
            yield report
        finally:
            with self._lock.writing():
                self._change_to(before)

    @contextmanager
    def serving(self) -> Iterator[Report]:
        """No adapter changes within this ``with`` block: for forward passes, on any number of threads."""
        with self._lock.reading():
            yield self.report

    @property
    def report(self) -> Report:
        """What is applied now."""
        entries = [step for step in self._state.values() if isinstance(step, _EntryChange)]
        return Report(
            tuple((adapter.label, alpha) for adapter, alpha in self._active),
            len(entries),
            sum(step.indices.size for step in entries),
            sum(step.overlapping for step in entries),
            len(self._state) - len(entries),
            tuple(notice for adapter, _ in self._active for notice in adapter.notices),
        )

    def _load(self, adapter: Source, alpha: float | None) -> tuple[LoadedAdapter, float]:
        if self._pool is not None and isinstance(adapter, str):
            found = self._pool.get_adapter(adapter, self._threads.executor)
        elif self._layout is not None:
            found = load_placed(adapter, self._layout, self._threads.executor, base=self._base)
        else:
            found = load_adapter(adapter, self._threads.executor, self._base_for)
        strength = found.alpha if alpha is None else float(alpha)
        if not np.isfinite(strength):
            raise ValueError(f"alpha {strength} is not a finite number")
        return found, strength

    def _base_for(self, adapter: LoadedAdapter) -> Mapping[str, Array]:
        """The base's weights by the names of an adapter, of which the entries are not known yet.

        Raises:
            BaseMismatch: the model does not have its tensors.
            BaseRequired: the model has them otherwise, fused or split.
        """
        live = self._weights.tensors()
        first = Places(live).first
        fit = self._names.fit(adapter, live)
        if fit.layout is not None:
            raise BaseRequired(
                f"{adapter.where}it can be read with the tensors of its base alone, which this model holds otherwise: store it plain "
                "first (shira-convert repack)"
            )
        names = {
            tensor.name: first.get(fit.rename(tensor.name), fit.rename(tensor.name)) for tensor in adapter.tensors
        }
        known = {name: target for name, target in names.items() if target in live}
        return LazyMapping(known, lambda name: self._base_weight(known[name], live[known[name]]))

    def _base_weight(self, name: str, weight: Any) -> Array:
        """The base's tensor, ``[*shape]``, read-only: the weight as it was before adapters changed it."""
        found, change = live_weight(name, weight), self._state.get(name)
        if isinstance(change, _DenseChange):
            if change.base is None:
                raise BaseMismatch(f"tensor {name!r}: the base has no such tensor: an adapter added it")
            return change.base.reshape(found.shape)
        if change is None:
            return found.part(0, numel(found.shape)).reshape(found.shape)
        whole = found.whole()
        whole.reshape(-1)[change.indices] = change.base
        return whole

    def _change_to(self, wanted: Sequence[tuple[LoadedAdapter, float]]) -> Report:
        """Check everything that can be checked first, then change one weight after the other; undo this if one fails."""
        live = self._weights.tensors()
        places = Places(live)
        first = places.first
        weights = {name: self._changed_weight(name, live, places) for name in self._state}
        fitted = [self._fit(adapter, alpha, live, first) for adapter, alpha in wanted]
        parts, dense = self._by_name([one for one in fitted if one.alpha != 0], first)
        # An adapter at strength 0 does nothing, but one of another model is refused all the same.
        idle, _ = self._by_name([one for one in fitted if one.alpha == 0], first)
        for name, found in idle.items():
            check_frames(name, found, live_weight(name, live[name]) if name in live else None)
        for name in (*parts, *dense):
            if name not in weights:
                weights[name] = live_weight(name, live[name]) if name in live else None
        places.check_apart(weights)
        for name, found in parts.items():
            check_frames(name, found, weights[name])
        planned = {name: self._dense_change(name, found, weights[name]) for name, found in dense.items()}
        # The digests of adapters that have passed before are checked during the switch.
        known = [adapter.key is not None and adapter.key in self._checked for adapter, _ in wanted]
        if not all(known):
            self._threads.map(lambda name: self._check_base(name, parts[name], weights[name]), list(parts))
        frames = places.frames([*parts, *planned])
        self._state, self._frames = self._write(weights, parts, planned), frames
        self._active = [(one.adapter, one.alpha) for one in fitted]
        self._checked.update(one.adapter.key for one in fitted if one.adapter.key is not None and one.alpha != 0)
        return self.report

    def _changed_weight(self, name: str, live: Mapping[str, Any], places: Places) -> LiveWeight | None:
        """A weight that is changed now; None if it is new, added by an adapter."""
        change = self._state[name]
        if isinstance(change, _DenseChange) and change.base is None:
            return None
        if name not in live:
            raise BaseMismatch(f"tensor {name!r}: the model lost it after an adapter was applied")
        weight = live_weight(name, live[name])
        if weight.dtype != change.values.dtype:
            raise BaseMismatch(
                f"tensor {name!r}: the model was cast to {weight.dtype} after an adapter was applied in "
                f"{change.values.dtype}: call revert() before a cast"
            )
        places.check_same(name, self._frames[name], lambda: change.is_on(weight))
        return weight

    def _fit(
        self, adapter: LoadedAdapter, alpha: float, live: Mapping[str, Any], first: Mapping[str, str]
    ) -> _Wanted:
        """The adapter and its names in the model; on the model's parameters, unless each tensor is one of them."""
        placed = self._placed.get(adapter, adapter)
        if not placed.is_placed:
            fit = self._names.fit(placed, live) if self._layout is None else Fit(layout=self._layout)
            if fit.layout is None:
                return _Wanted(adapter, alpha, fit.rename)
            placed = on_parameters(placed, fit.layout, self._base, tell=self._layout is None)
        if placed.spread:

            def base_of(tensor: SparseTensor) -> Array:
                name = first.get(tensor.name, tensor.name)
                weight = live_weight(name, live[name]) if name in live else None
                check_frames(name, [Contribution(tensor, alpha, placed.path)], weight)
                return self._base_values(name, tensor.indices, weight)

            placed = compare_spread(placed, base_of)
        if placed is not adapter:
            self._placed[adapter] = placed
        return _Wanted(placed, alpha, str)

    def _by_name(
        self, wanted: Sequence[_Wanted], first: Mapping[str, str]
    ) -> tuple[dict[str, list[Contribution]], dict[str, Replacement]]:
        """What the adapters change, by the name in the model; for tied weights, their first name."""
        parts: dict[str, list[Contribution]] = {}
        replaced: dict[str, list[Contribution]] = {}
        dense: dict[str, Replacement] = {}
        for one in wanted:
            adapter, alpha, rename = one.adapter, one.alpha, one.rename
            for into, tensors, weight in ((parts, adapter.tensors, alpha), (replaced, adapter.replaced, 1.0)):
                for name, tensor in _untied(adapter, tensors, rename, first):
                    into.setdefault(name, []).append(Contribution(tensor, weight, adapter.path))
            for whole in adapter.dense:
                name = rename(whole.name)
                name = first.get(name, name)
                if name in dense and not same_bits(dense[name].tensor.values, whole.values):
                    raise BaseMismatch(
                        f"{adapter.where}tensor {name!r}: another adapter replaces it by other values"
                    )
                dense[name] = Replacement(whole, adapter.where)
        for name, found in replaced.items():
            parts[name] = check_replaced(name, found, parts.get(name, []))
        if both := parts.keys() & dense.keys():
            raise BaseMismatch(f"tensor {min(both)!r}: one adapter changes entries of it, another one replaces it")
        return parts, dense

    def _check_base(self, name: str, parts: Parts, weight: Any) -> None:
        """Compare the base's values at the entries of one weight with the digests, without writing."""
        aligned = AlignedEntries.of(parts)
        check_digests(name, aligned, self._base_values(name, aligned.indices, weight))

    def _base_values(self, name: str, indices: Indices, weight: Any) -> Array:
        """The values at entries of one weight as they are without adapters."""
        base: Array = weight.get(indices)
        before = self._state.get(name)
        if isinstance(before, _EntryChange):
            compiled.overlay(base, indices, before.indices, before.base)
        elif before is not None:
            assert before.base is not None
            base = before.base.reshape(-1)[indices]
        return base

    def _dense_change(self, name: str, new: Replacement, weight: LiveWeight | None) -> _DenseChange:
        if weight is None:
            check_replacement(name, new, None)
            return _DenseChange(None, new.tensor.values)
        before = self._state.get(name)
        if isinstance(before, _DenseChange):
            assert before.base is not None
            base = before.base
        else:
            base = weight.whole()
            if before is not None:
                base.reshape(-1)[before.indices] = before.base
        check_replacement(name, new, base)
        return _DenseChange(base, new.tensor.values.astype(weight.dtype))

    def _write(
        self, weights: Mapping[str, Any], parts: Mapping[str, Parts], dense: Mapping[str, _DenseChange]
    ) -> _State:
        """Bring the weights from the present state to the next one, which is returned; undo this if anything fails."""
        state: _State = {}
        started: list[str] = []  # a list and a dict: several threads may add to them

        def change(name: str) -> None:
            started.append(name)
            weight, before = weights[name], self._state.get(name)
            if name in parts:
                aligned = AlignedEntries.of(parts[name])

                def record(new: _EntryChange) -> None:
                    state[name] = new

                check_digests(name, aligned, _exchange(weight, before, aligned, record).base)
                return
            if before is not None:
                self._undo(name, weight, before)
            if name in dense:
                state[name] = dense[name]
                self._apply(name, weight, dense[name])

        def undo() -> None:
            for name in reversed(started):
                if name in state:
                    self._undo(name, weights[name], state[name])
                if name in self._state:
                    self._apply(name, weights[name], self._state[name])

        try:
            self._threads.map(change, list(dict.fromkeys([*self._state, *parts, *dense])))
        except BaseException:
            self._threads.run(undo)
            raise
        return state

    def _apply(self, name: str, weight: LiveWeight | None, change: _Change) -> None:
        if weight is None:
            self._weights.add(name, change.values)
        else:
            change.apply(weight)

    def _undo(self, name: str, weight: LiveWeight | None, change: _Change) -> None:
        if weight is None:
            self._weights.drop(name)
        else:
            change.undo(weight)


def _untied(
    adapter: LoadedAdapter, tensors: Sequence[SparseTensor], rename: Rename, first: Mapping[str, str]
) -> Iterator[tuple[str, SparseTensor]]:
    """Tensors by the first name of their weight in the model; of tied ones, which must be the same, one.

    Raises:
        BaseMismatch: they are not the same.
    """
    found: dict[str, dict[str, list[SparseTensor]]] = {}  # by the weight's first name, and by its own
    for tensor in tensors:
        name = rename(tensor.name)
        own = name if adapter.is_placed else tensor.name  # of a parameter there may be entries of several kinds
        found.setdefault(first.get(name, name), {}).setdefault(own, []).append(tensor)
    for name, tied in found.items():
        kept, *others = tied.values()
        for other in others:
            if len(other) != len(kept):
                raise BaseMismatch(
                    f"{adapter.where}tensors {' and '.join(map(repr, tied))} are tied in the model, and differ"
                )
            for one, same in zip(kept, other, strict=True):
                check_same(adapter.where, one, same)
        yield from ((name, tensor) for tensor in kept)


def _exchange(
    weight: Any, before: _Change | None, aligned: AlignedEntries, record: Callable[[_EntryChange], None]
) -> _EntryChange:
    """Undo the present change of one weight and apply new entries; ``record`` is called before anything can fail."""
    indices, parts = aligned.indices, aligned.parts
    overwrites = len(parts) == 1 and parts[0].weight == 1 and parts[0].tensor.value_kind == "target"
    if overwrites and weight.in_one_pass and not isinstance(before, _DenseChange):
        # This pass over memory takes most of the time of a switch.
        values = parts[0].tensor.values
        old = (before.indices, before.base) if before is not None else (indices[:0], values[:0])
        change = _EntryChange(indices, weight.exchange(*old, indices, values), values)
        record(change)
        return change
    if before is not None:
        before.undo(weight)
    base = weight.get(indices)
    values, overlapping = mix_values(aligned, base)
    change = _EntryChange(indices, base, values, overlapping)
    record(change)
    change.apply(weight)
    return change
