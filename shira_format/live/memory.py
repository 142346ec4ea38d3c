"""Where in memory live weights are: which are tied, whether one is still the one that was written, whether two overlap."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shira_format.errors import BaseMismatch

# Candidates that are looked at to tell whether two weights overlap; slices of matrices need a few.
_MOST_WORK: Any = 10_000


class Memory(NamedTuple):
    """The memory of one weight; equal for tied weights.

    Attributes:
        device: such as ``"cpu"``.
        start: the address of its first element.
        strides: in bytes.
        shape: of the weight.
        itemsize: bytes of an element.
    """

    device: str
    start: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int

    @property
    def extent(self) -> tuple[int, int]:
        """The address of its first byte, and the one after its last."""
        steps = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        first = self.start + sum(step for step in steps if step < 0)
        return first, self.start + sum(step for step in steps if step > 0) + self.itemsize

    @property
    def repeats(self) -> bool:
        """Whether several elements may be in one place, as in an expanded tensor."""
        room = self.itemsize
        for stride, n in sorted((abs(s), n) for s, n in zip(self.strides, self.shape, strict=True) if n > 1):
            if stride < room:
                return True
            room += (n - 1) * stride
        return False

    def meets(self, other: Memory) -> bool:
        """Whether the two have a byte in common; if that is too hard to say, yes."""
        try:
            return np.shares_memory(
                np.asarray(_Addressed(self)), np.asarray(_Addressed(other)), max_work=_MOST_WORK
            )
        except np.exceptions.TooHardError:
            return True


class _Addressed:
    """A weight's addresses as an array of bytes, for numpy to compare; nothing is ever read there."""

    def __init__(self, memory: Memory) -> None:
        self.__array_interface__ = {
            "version": 3, "typestr": f"|V{memory.itemsize}", "data": (memory.start, True),
            "shape": memory.shape, "strides": memory.strides,
        }  # fmt: skip


def memory_of(weight: Any) -> Memory | None:
    """The memory of an array or a tensor; None if it has no elements, or no memory of its own, as on the meta device."""
    if isinstance(weight, np.ndarray):
        start = weight.__array_interface__["data"][0]
        return Memory("cpu", start, weight.strides, weight.shape, weight.itemsize) if weight.size else None
    try:
        if not (start := weight.data_ptr()):
            return None
        size = weight.element_size()
        strides = tuple(step * size for step in weight.stride())
        return Memory(str(weight.device), start, strides, tuple(weight.shape), size)
    except (AttributeError, RuntimeError):  # not a tensor, or a subclass without its own memory
        return None


class Places:
    """The memory of all weights of a model at one moment, by their names.

    Attributes:
        first: for each name the first one of the same weight: another one if weights are tied.
    """

    def __init__(self, live: Mapping[str, Any]) -> None:
        self._live = live
        self._memory = {name: memory_of(weight) for name, weight in live.items()}
        first: dict[object, str] = {}
        self.first = {name: first.setdefault(memory or name, name) for name, memory in self._memory.items()}

    def frames(self, names: Collection[str]) -> dict[str, Frame]:
        """What to remember of weights, given by their first names, to which an adapter was applied; new ones have no frame."""
        tied: dict[str, list[str]] = {name: [] for name in names if name in self._live}
        for name, first in self.first.items():
            if first in tied:
                tied[first].append(name)
        return {
            name: Frame(tuple(self._live[name].shape), self._memory[name], _holder(self._live[name]), tuple(found))
            for name, found in tied.items()
        }

    def check_same(self, name: str, frame: Frame, holds_applied: Callable[[], bool]) -> None:
        """Check that a weight is the one that an adapter was applied to, or a copy of it elsewhere.

        Args:
            name: of the weight.
            frame: of the weight when the adapter was applied.
            holds_applied: whether the weight has the adapter's values.

        Raises:
            BaseMismatch: it was resized, untied or replaced.
        """
        what, before = f"tensor {name!r}: the model's", "after an adapter was applied: call revert() before"
        if (shape := tuple(self._live[name].shape)) != frame.shape:
            raise BaseMismatch(f"{what} weight of {list(frame.shape)} became {list(shape)} {before} it is resized")
        for other in frame.names:
            if other in self._live and self.first[other] != self.first[name]:
                raise BaseMismatch(f"{what} weight was untied from {other!r} {before} that")
        stays = self._memory[name] == frame.memory and frame.holds(self._live[name])
        if not stays and not holds_applied():
            raise BaseMismatch(f"{what} weight was replaced by one with other values {before} that")

    def check_apart(self, names: Iterable[str]) -> None:
        """Check that writing one of these weights leaves all others of them as they are.

        Raises:
            BaseMismatch: two overlap in memory, or elements of one do; the message names them.
        """
        placed = [(memory, name) for name in names if (memory := self._memory.get(name)) is not None]
        for memory, name in placed:
            if memory.repeats:
                raise BaseMismatch(
                    f"tensor {name!r}: several elements share one place in memory, as in an expanded tensor: make it contiguous"
                )
        reaching: list[tuple[str, int, Memory, str]] = []  # those before it, in order, that end after one begins
        for device, begin, end, memory, name in sorted((m.device, *m.extent, m, name) for m, name in placed):
            reaching = [one for one in reaching if one[0] == device and one[1] > begin]
            for _, _, other, other_name in reaching:
                if memory.meets(other):
                    raise BaseMismatch(
                        f"tensors {other_name!r} and {name!r} overlap in memory without being the same: adapters cannot change "
                        "both"
                    )
            reaching.append((device, end, memory, name))


@dataclass(frozen=True)
class Frame:
    """Where a weight was when an adapter was applied to it.

    Attributes:
        shape: of the weight.
        memory: of the weight; None if it had none.
        holds: whether another weight is in the same piece of memory, which was not given back in between: a new weight often
            gets the address of an old one.
        names: all its names in the model: several if it was tied.
    """

    shape: tuple[int, ...]
    memory: Memory | None
    holds: Callable[[Any], bool]
    names: tuple[str, ...]


def _holder(weight: Any) -> Callable[[Any], bool]:
    """See :attr:`Frame.holds`; keeps no memory alive."""
    if isinstance(weight, np.ndarray):
        array = weakref.ref(weight)  # as long as it is held, numpy refuses to resize the array in place
        return lambda other: other is array()
    from torch.multiprocessing import reductions

    weak: Any = reductions.StorageWeakRef
    held = weak(weight.untyped_storage())
    return lambda other: bool(held == weak(other.untyped_storage()))
