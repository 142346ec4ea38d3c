"""Changing the adapters of a live model between two requests, and leaving nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from shira_format._core import compiled
from shira_format._core.arrays import Array, Indices, array_digest
from shira_format._core.dtypes import is_float
from shira_format._core.threads import Threads
from shira_format.adapter import Adapter
from shira_format.entries.terms import Joint, Term
from shira_format.errors import BaseMismatch
from shira_format.live.loaded import LoadedAdapter, load_adapter
from shira_format.live.lock import ReadWriteLock
from shira_format.live.models import weights_of
from shira_format.live.names import Rename, renaming
from shira_format.live.pool import AdapterPool
from shira_format.live.weights import LiveWeight, live_weight, memory_of
from shira_format.tensors import DenseTensor, SparseTensor, same_bits

# What names an adapter: the thing itself, or the path of its file.
Source = LoadedAdapter | Adapter | str | os.PathLike[str]


@dataclass(frozen=True)
class Report:
    """What lies on the model now.

    Attributes:
        adapters: their labels and strengths, in the order in which they came.
        tensors: how many weights are touched.
        entries: how many entries of them.
        overlapping: how many of these entries several adapters touch.
        whole: how many tensors are replaced as a whole.
    """

    adapters: tuple[tuple[str, float], ...] = ()
    tensors: int = 0
    entries: int = 0
    overlapping: int = 0
    whole: int = 0


@dataclass(frozen=True)
class _Entries:
    """What is done to some entries of one weight: the base's values there, and the new ones."""

    indices: Indices
    base: Array
    values: Array
    overlapping: int = 0

    def on(self, place: LiveWeight) -> None:
        place.put(self.indices, self.values)

    def off(self, place: LiveWeight) -> None:
        place.put(self.indices, self.base)


@dataclass(frozen=True)
class _Whole:
    """A weight that is replaced; ``base`` is None if the model did not have it."""

    base: Array | None
    values: Array

    def on(self, place: LiveWeight) -> None:
        place.fill(self.values)

    def off(self, place: LiveWeight) -> None:
        assert self.base is not None
        place.fill(self.base)


_State = dict[str, "_Entries | _Whole"]  # by the name in the model


class Switcher:
    """Adapters on a live model: on, off, changed, several at once, at any strength; the base comes back bit for bit.

    Every change is checked before the first weight is written: the file, names, shapes, dtypes, and the digest of the
    base's values at the adapter's entries. An adapter that has fitted before is compared again as it is written. If
    something fails meanwhile, what was written is undone.
    Nothing is allocated on the model, no parameter is replaced, so a compiled model is not compiled again.

    Several adapters add up: ``base + sum of alpha_i (target_i - base)``, in float64 where they meet, rounded once; the
    order does not matter. The same adapter twice counts twice. At strength 1 alone, an adapter gives its target bits.

    Threads: changes wait for each other. A forward pass in another thread sees each element before or after a change,
    never torn, but may see some of both; within ``with switcher.serving():`` it sees no change at all, since changes wait
    for its end.

    As long as adapters are on, their entries belong to the switcher: what others write there is overwritten later.
    Moving the model to another device is no harm; casting it to another dtype is refused at the next change.

    Args:
        model: a ``torch.nn.Module``, also compiled or wrapped by PEFT; a pipeline of diffusers, whose adapters name tensors
            ``COMPONENT/NAME``; or a dictionary of torch tensors or numpy arrays.
        prefix: what the model's names have before those of the adapter, such as ``"bert."``; by default found, if one and
            the same makes all names fit.
        rename: instead of a prefix, a function from a name in an adapter to one in the model.
        pool: where :meth:`load`, :meth:`switch` and :meth:`set` look names of adapters up.
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
        pool: AdapterPool | None = None,
        threads: int | None = None,
    ) -> None:
        if prefix is not None and rename is not None:
            raise TypeError("prefix or rename, not both")
        self._weights = weights_of(model)
        self._rename: Rename = renaming(prefix, rename)
        self._pool = pool
        self._threads = Threads(threads)
        self._lock = ReadWriteLock()
        self._active: list[tuple[LoadedAdapter, float]] = []
        self._state: _State = {}
        self._fitting: set[str] = set()  # keys of adapters whose base this was
        compiled.load()

    def load(self, adapter: Source, alpha: float | None = None) -> Report:
        """Put an adapter on top of those that are on.

        Args:
            adapter: an adapter, the path of its file, or its name in the pool.
            alpha: strength; the adapter's own by default.

        Raises:
            BaseMismatch: the model is not the adapter's base; no weight was changed.
            FormatError: the file is damaged; no weight was changed.
            OSError: it cannot be read.
        """
        with self._lock.writing():
            return self._become([*self._active, self._opened(adapter, alpha)])

    def switch(self, adapter: Source, alpha: float | None = None) -> Report:
        """Take off all that is on and put this one adapter on, in one pass; arguments and errors as :meth:`load`."""
        return self.set([(adapter, alpha)])

    def set(self, adapters: Iterable[tuple[Source, float | None]]) -> Report:
        """Have just these adapters on, each with its strength (None: its own); errors as :meth:`load`."""
        wanted = list(adapters)
        with self._lock.writing():
            return self._become([self._opened(adapter, alpha) for adapter, alpha in wanted])

    def unload(self, adapter: Source) -> Report:
        """Take one adapter off again, the latest if it is on several times.

        Raises:
            KeyError: it is not on.
        """
        with self._lock.writing():
            wanted = adapter if isinstance(adapter, (LoadedAdapter, Adapter)) else os.fspath(adapter)
            for at in reversed(range(len(self._active))):
                found = self._active[at][0]
                if found is wanted or found.source is wanted or found.label == wanted:
                    return self._become(self._active[:at] + self._active[at + 1 :])
            raise KeyError(f"{wanted} is not on the model")

    def revert(self) -> Report:
        """Take all adapters off: the base is there again, bit for bit.

        Raises:
            BaseMismatch: the model was cast, or lost a layer, since they were put on.
        """
        return self.set([])

    @contextmanager
    def applied(self, adapter: Source, alpha: float | None = None) -> Iterator[Report]:
        """With this adapter on top of those that are on; afterwards all is as it was before."""
        with self._lock.writing():
            before = list(self._active)
            report = self.load(adapter, alpha)
        try:
            yield report
        finally:
            with self._lock.writing():
                self._become(before)

    @contextmanager
    def serving(self) -> Iterator[Report]:
        """Within this no adapter changes: for a forward pass, on as many threads as one likes."""
        with self._lock.reading():
            yield self.report

    @property
    def report(self) -> Report:
        """What is on now."""
        entries = [step for step in self._state.values() if isinstance(step, _Entries)]
        return Report(
            tuple((adapter.label, alpha) for adapter, alpha in self._active),
            len(entries),
            sum(step.indices.size for step in entries),
            sum(step.overlapping for step in entries),
            len(self._state) - len(entries),
        )

    def _opened(self, adapter: Source, alpha: float | None) -> tuple[LoadedAdapter, float]:
        if self._pool is not None and isinstance(adapter, str):
            found = self._pool.get_adapter(adapter, self._threads.executor)
        else:
            found = load_adapter(adapter, self._threads.executor)
        strength = found.alpha if alpha is None else float(alpha)
        if not np.isfinite(strength):
            raise ValueError(f"alpha {strength} is not a finite number")
        return found, strength

    def _become(self, wanted: Sequence[tuple[LoadedAdapter, float]]) -> Report:
        """Check all that can be checked before, then change one weight after the other; undo that if one fails."""
        live = self._weights.tensors()
        places = {name: self._place_of(name, live) for name in self._state}
        terms, wholes = self._sorted(wanted, live)
        for name in (*terms, *wholes):
            if name not in places:
                places[name] = live_weight(name, live[name]) if name in live else None
        for name, found in terms.items():
            _check_frames(name, found, places[name])
        planned = {name: self._whole(name, whole, places[name]) for name, whole in wholes.items()}
        # What has fitted before is compared as it is written, and taken off again if it fits no more.
        known = [adapter.key is not None and adapter.key in self._fitting for adapter, _ in wanted]
        if not all(known):
            self._threads.map(lambda name: self._check(name, terms[name], places[name]), list(terms))
        state = self._write(places, terms, planned)
        self._active, self._state = list(wanted), state
        self._fitting.update(adapter.key for adapter, alpha in wanted if adapter.key is not None and alpha != 0)
        return self.report

    def _place_of(self, name: str, live: Mapping[str, Any]) -> LiveWeight | None:
        """The place of a tensor that is changed already; None if the model did not have it before."""
        step = self._state[name]
        if isinstance(step, _Whole) and step.base is None:
            return None
        if name not in live:
            raise BaseMismatch(f"tensor {name!r}: the model has lost it since an adapter was put on")
        place = live_weight(name, live[name])
        if place.dtype != step.values.dtype:
            raise BaseMismatch(
                f"tensor {name!r}: the model was cast to {place.dtype} since an adapter was put on in "
                f"{step.values.dtype}: revert before you cast"
            )
        return place

    def _sorted(
        self, wanted: Sequence[tuple[LoadedAdapter, float]], live: Mapping[str, Any]
    ) -> tuple[dict[str, list[_Named]], dict[str, tuple[DenseTensor, str]]]:
        """What the adapters do, by the name in the model; of the names of tied weights, the first."""
        first: dict[object, str] = {}
        alias = {name: first.setdefault(memory_of(weight, name), name) for name, weight in live.items()}
        terms: dict[str, list[_Named]] = {}
        wholes: dict[str, tuple[DenseTensor, str]] = {}
        for adapter, alpha in wanted:
            if alpha == 0:
                continue
            rename = self._rename(adapter, live)
            own: dict[str, SparseTensor] = {}
            for tensor in adapter.tensors:
                name = rename(tensor.name)
                name = alias.get(name, name)
                if (twin := own.setdefault(name, tensor)) is not tensor:
                    _check_twin(adapter, twin, tensor)
                    continue
                terms.setdefault(name, []).append(_Named(Term(tensor, alpha), adapter.where))
            for whole in adapter.dense:
                name = rename(whole.name)
                name = alias.get(name, name)
                if name in wholes and not same_bits(wholes[name][0].values, whole.values):
                    raise BaseMismatch(
                        f"{adapter.where}tensor {name!r}: it is replaced by two different ones at a time"
                    )
                wholes[name] = whole, adapter.where
        if both := terms.keys() & wholes.keys():
            raise BaseMismatch(f"tensor {min(both)!r}: one adapter changes entries, another one replaces it")
        return terms, wholes

    def _check(self, name: str, terms: Sequence[_Named], place: Any) -> None:
        """Compare the base's values at the entries of one weight with the digests; nothing is written."""
        joint = _joint(terms)
        indices = joint.indices
        base = place.get(indices)
        before = self._state.get(name)
        if isinstance(before, _Entries):
            compiled.overlay(base, indices, before.indices, before.base)
        elif before is not None:
            assert before.base is not None
            base = before.base.reshape(-1)[indices]
        _check_digests(name, terms, joint, base)

    def _whole(self, name: str, found: tuple[DenseTensor, str], place: LiveWeight | None) -> _Whole:
        whole, where = found
        if place is None:
            if whole.base_digest is not None:
                raise BaseMismatch(f"{where}tensor {whole.name!r}: the weights have no {name!r}")
            return _Whole(None, whole.values)
        if place.shape != whole.values.shape:
            raise BaseMismatch(
                f"{where}tensor {name!r}: the adapter's has shape {list(whole.values.shape)}, the weight {list(place.shape)}"
            )
        before = self._state.get(name)
        if isinstance(before, _Whole):
            assert before.base is not None
            base = before.base
        else:
            base = place.whole()
            if before is not None:
                base.reshape(-1)[before.indices] = before.base
        try:
            whole.check_base(base)
        except BaseMismatch as error:
            raise BaseMismatch(f"{where}{error}") from None
        return _Whole(base, whole.values.astype(place.dtype))

    def _write(
        self, places: Mapping[str, Any], terms: Mapping[str, Sequence[_Named]], wholes: Mapping[str, _Whole]
    ) -> _State:
        """Bring the weights from the present state to the next, or, if that fails, back to the present one."""
        state: _State = {}

        def forth(name: str) -> None:
            place, before = places[name], self._state.get(name)
            if name in terms:
                joint = _joint(terms[name])
                step = _exchange(place, before, joint, partial(state.__setitem__, name))
                _check_digests(name, terms[name], joint, step.base)
                return
            if before is not None:
                self._off(name, place, before)
            if name in wholes:
                state[name] = wholes[name]
                self._on(name, place, wholes[name])

        def back() -> None:
            for name in started:
                if name in state:
                    self._off(name, places[name], state[name])
                if name in self._state:
                    self._on(name, places[name], self._state[name])

        started: list[str] = []  # a list and a dict: threads may add to them at the same time

        def begin(name: str) -> None:
            started.append(name)
            forth(name)

        try:
            self._threads.map(begin, list(dict.fromkeys([*self._state, *terms, *wholes])))
        except BaseException:
            self._threads.run(back)
            raise
        return state

    def _on(self, name: str, place: LiveWeight | None, step: _Entries | _Whole) -> None:
        if place is None:
            self._weights.add(name, step.values)
        else:
            step.on(place)

    def _off(self, name: str, place: LiveWeight | None, step: _Entries | _Whole) -> None:
        if place is None:
            self._weights.drop(name)
        else:
            step.off(place)


def _exchange(
    place: Any, before: _Entries | _Whole | None, joint: Joint, record: Callable[[_Entries], None]
) -> _Entries:
    """Take off what is on one weight, and put new entries on; ``record`` is told of these before anything can fail."""
    indices, only = joint.indices, joint.terms
    overwrites = len(only) == 1 and only[0].alpha == 1 and only[0].tensor.value_kind == "target"
    if overwrites and place.in_one_pass and not isinstance(before, _Whole):
        # This pass over memory takes longer than anything else here.
        values = only[0].tensor.values
        old = (before.indices, before.base) if before is not None else (indices[:0], values[:0])
        step = _Entries(indices, place.exchange(*old, indices, values), values)
        record(step)
        return step
    if before is not None:
        before.off(place)
    base = place.get(indices)
    values, overlapping = joint.mixed(base)
    step = _Entries(indices, base, values, overlapping)
    record(step)
    step.on(place)
    return step


def _joint(terms: Sequence[_Named]) -> Joint:
    return Joint.of([named.term for named in terms])


@dataclass(frozen=True)
class _Named:
    """A term, and how messages about its adapter begin."""

    term: Term
    where: str


def _check_frames(name: str, terms: Sequence[_Named], place: LiveWeight | None) -> None:
    if place is None:
        raise BaseMismatch(f"{terms[0].where}tensor {terms[0].term.tensor.name!r}: the weights have no {name!r}")
    for named in terms:
        _check_frame(named.term.tensor, f"{named.where}tensor {name!r}", place)


def _check_digests(name: str, terms: Sequence[_Named], joint: Joint, base: Array) -> None:
    for number, named in enumerate(terms):
        expected = named.term.tensor.base_digest
        if expected is not None and array_digest(joint.of_term(number, base)) != expected:
            raise BaseMismatch(
                f"{named.where}tensor {name!r}: the base holds other values at the adapter's entries (digest differs)"
            )


def _check_frame(tensor: SparseTensor, what: str, place: LiveWeight) -> None:
    if place.shape != tensor.shape:
        raise BaseMismatch(
            f"{what}: the adapter is for shape {list(tensor.shape)}, the weight has {list(place.shape)}"
        )
    if not is_float(place.dtype):
        raise BaseMismatch(
            f"{what}: the weight is of dtype {place.dtype}: a quantised weight cannot take exact values"
        )
    if place.dtype != tensor.dtype and (tensor.base_digest is not None or tensor.value_kind == "target"):
        raise BaseMismatch(f"{what}: the adapter is for {tensor.dtype}, the weight has {place.dtype}")


def _check_twin(adapter: LoadedAdapter, one: SparseTensor, other: SparseTensor) -> None:
    """Two tensors of an adapter may change one memory (tied weights) if they do the same to it."""
    if not (np.array_equal(one.indices, other.indices) and same_bits(one.values, other.values)):
        raise BaseMismatch(
            f"{adapter.where}tensors {one.name!r} and {other.name!r} are tied in the model, and the adapter changes them "
            "differently"
        )
