"""A Switcher on weights between canaries, under everything that happens to weights, files, arrays and the process meanwhile.

A machine of Hypothesis: a violation comes with the fewest steps that lead to it. The oracle are the base's bits: what is refused changes
no byte, nothing changes outside of weights, and once all adapters are off, all memory is the base's, bit for bit.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fuzz.mutate import mutated_bytes
from fuzz.oracle import Violation
from shira_format._core.arrays import as_array
from shira_format.adapter import Adapter
from shira_format.errors import ShiraError
from shira_format.format import save
from shira_format.live import Switcher
from shira_format.tensors import DenseTensor, SparseTensor

_GUARD = 64  # elements on both sides of each weight
_SHAPES = {"v": (5, 7), "w": (8, 5), "x": (33,)}
_WAIT = 60.0  # seconds after which a child that does not end is a deadlock
_MOST = 8  # adapters
_ANY = st.integers(0, _MOST - 1)
_SEEDS = st.integers(0, 2**16)
_ALPHAS = st.sampled_from([None, 1.0, 0.5, 0.0, -2.0])


def make(random: Random, folder: Path) -> None:
    """A seed of the machine."""
    (folder / "case.json").write_text(json.dumps({"seed": random.getrandbits(32)}), "utf-8")


def check(folder: Path) -> None:
    """Some runs of the machine."""
    seed = json.loads((folder / "case.json").read_text("utf-8"))["seed"]
    how = settings(
        max_examples=10,
        stateful_step_count=40,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(type("Machine", (Machine,), {})), settings=how)
    except (ShiraError, OSError) as error:  # where nothing may be refused
        raise Violation(f"the machine ends with {error!r}") from error


class _Block:
    """A weight in the middle of other memory, and what the memory holds while no adapter is on."""

    def __init__(self, like: torch.Tensor) -> None:
        self.memory = torch.full((like.numel() + 2 * _GUARD,), 7.0, dtype=like.dtype)
        self.weight = self.memory[_GUARD:-_GUARD].view(like.shape)
        self.weight.copy_(like)
        self.base = self.bits()

    @property
    def is_released(self) -> bool:
        """Whether it has less memory than it had."""
        return self.memory.untyped_storage().nbytes() < len(self.base)

    def bits(self) -> bytes:
        storage = self.memory.untyped_storage()
        return ctypes.string_at(storage.data_ptr(), storage.nbytes())

    def take(self, weight: torch.Tensor) -> None:
        """Let another tensor be this one's weight: the same object elsewhere, as ``module.to`` does it."""
        weight.data = self.weight
        self.weight = weight

    def release(self, size: int) -> Callable[[], None] | None:
        """Cut the memory to so many bytes, for all tensors in it; returns what gives it back elsewhere; None if numpy has seen it."""
        storage, before = self.memory.untyped_storage(), self.memory.clone()
        if not storage.resizable():
            return None
        storage.resize_(size)

        def give_back() -> None:
            storage.resize_(0)
            others = torch.empty_like(before)  # often takes the place
            storage.resize_(before.untyped_storage().nbytes())
            self.memory.copy_(before)
            del others

        return give_back

    def guards(self, of: bytes) -> bytes:
        size = _GUARD * self.memory.element_size()
        return of[:size] + of[-size:]


def _set(weight: torch.Tensor, other: torch.Tensor) -> None:
    """Let a tensor, which stays the same object, be where another one is."""
    weight.set_(other.untyped_storage(), other.storage_offset(), other.shape, other.stride())


class Machine(RuleBasedStateMachine):
    """One model, its switcher, and adapters in memory and in files."""

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        numpy=st.booleans(),
        overlap=st.booleans(),
        seed=_SEEDS,
    )
    def start(self, dtype: torch.dtype, numpy: bool, overlap: bool, seed: int) -> None:
        """A model of torch tensors or numpy arrays; two names are one weight, and one may lie across the half of another."""
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        made = torch.Generator().manual_seed(seed)
        self.blocks = {
            name: _Block(torch.randn(shape, generator=made).to(dtype)) for name, shape in _SHAPES.items()
        }
        self.numpy = numpy and dtype == torch.float32
        self.weights: dict[str, Any] = {name: self._as_live(block.weight) for name, block in self.blocks.items()}
        self.weights["tied"] = self.weights["w"]
        if overlap:
            self.weights["across"] = self._as_live(self.blocks["w"].weight.reshape(-1)[20:])
        self.switcher = Switcher(self.weights, prefix="", threads=2)
        self.adapters: list[Any] = []
        self.arrays: list[np.ndarray] = []
        self.undo: Callable[[], object] | None = None
        self.forked = False
        for number in range(4):
            self.make_adapter(seed + number, in_file=bool(number % 2))

    def _as_live(self, weight: torch.Tensor) -> Any:
        return weight.numpy() if self.numpy else weight

    def _base(self, name: str) -> Any:
        """The base's array of a weight, apart from the model."""
        if name == "across":
            return self._base("w").reshape(-1)[20:]
        block = self.blocks[name]
        whole = np.frombuffer(block.base, as_array(block.memory[:0].clone()).dtype)
        return whole[_GUARD:-_GUARD].reshape(_SHAPES[name]).copy()

    def _made(self, seed: int) -> Adapter:
        random = np.random.default_rng(seed)
        tensors, dense = [], []
        for name in ("across", *self.blocks):
            if name == "across" and (name not in self.weights or random.random() < 0.7):
                continue
            base = self._base(name)
            kind: Any = str(random.choice(["target", "target", "delta", "dense", "no", "no"]))
            if kind == "dense":
                dense.append(DenseTensor(name, (base.astype(np.float32) + 1).astype(base.dtype), base=base))
            elif kind != "no":
                indices = np.flatnonzero(random.random(base.size) < random.choice([0.05, 0.4, 1.0]))
                own = base.reshape(-1)[indices]
                values = random.standard_normal(indices.size).astype(base.dtype)
                known = {"base": own} if random.random() < 0.7 or kind == "target" else {}
                tensors.append(
                    SparseTensor(name, base.shape, indices, values, value_kind=kind, dtype=base.dtype, **known)
                )
                self.arrays += [indices, values, own]
        return Adapter(tensors, dense=dense)

    @precondition(lambda self: len(self.adapters) < _MOST)
    @rule(seed=_SEEDS, in_file=st.booleans())
    def make_adapter(self, seed: int, in_file: bool) -> None:
        """An adapter of the base."""
        adapter: Any = self._made(seed)
        if in_file:
            path = Path(self._folder.name) / f"{len(self.adapters)}.st"
            save(adapter, path)
            adapter = path
        self.adapters.append(adapter)

    @rule(at=_ANY, alpha=_ALPHAS)
    def load(self, at: int, alpha: float | None) -> None:
        """One in addition."""
        self._try(lambda: self.switcher.load(self._adapter(at), alpha))

    @rule(at=_ANY, alpha=_ALPHAS)
    def switch(self, at: int, alpha: float | None) -> None:
        """One instead of all."""
        self._try(lambda: self.switcher.switch(self._adapter(at), alpha))

    @rule(at=_ANY, other=_ANY, alpha=_ALPHAS)
    def set_two(self, at: int, other: int, alpha: float | None) -> None:
        """Two instead of all."""
        self._try(lambda: self.switcher.set([(self._adapter(at), alpha), (self._adapter(other), 1.0)]))

    @precondition(lambda self: self.is_on)
    @rule(at=_ANY)
    def unload(self, at: int) -> None:
        """One less, if it is on."""
        self._try(lambda: self.switcher.unload(self._adapter(at)))

    @precondition(lambda self: self.is_on)
    @rule()
    def revert(self) -> None:
        """Take all adapters off."""
        if self._try(self.switcher.revert):
            self._check_base()

    @property
    def is_on(self) -> bool:
        """Whether an adapter is."""
        return bool(self.switcher.report.adapters)

    def _adapter(self, at: int) -> Any:
        return self.adapters[at % len(self.adapters)]

    @precondition(lambda self: not self.undo)
    @rule(
        name=st.sampled_from(["v", "w", "x"]),
        kind=st.sampled_from(["cut", "turn", "flat", "other", "overlap", "tie", "untie", "lose", "expand"]),
    )
    def tamper(self, name: str, kind: str) -> None:
        """Something else takes the weight's name, until :meth:`put_back`."""
        before = dict(self.weights)
        weight, memory = self.blocks[name].weight, self.blocks[name].memory
        new: dict[str, Callable[[], torch.Tensor]] = {
            "cut": lambda: weight[: len(weight) // 2], "turn": lambda: weight.permute(*reversed(range(weight.ndim))), "flat": lambda: weight.reshape(-1), "tie": lambda: self.blocks["v"].weight,
            "other": lambda: torch.ones_like(weight), "overlap": lambda: memory[_GUARD + 3 : _GUARD + 3 + weight.numel()].view(weight.shape),
            "untie": weight.clone, "expand": lambda: weight.reshape(-1)[:1].expand(weight.shape),
        }  # fmt: skip
        if kind == "lose":
            del self.weights[name]
        else:
            self.weights["tied" if kind == "untie" else "more" if kind == "overlap" else name] = self._as_live(
                new[kind]()
            )

        def put_back() -> None:
            self.weights.clear()
            self.weights.update(before)

        self.undo = put_back

    @precondition(lambda self: not self.undo and not self.numpy)
    @rule(
        name=st.sampled_from(["v", "x"]),  # the others share their memory
        kind=st.sampled_from(["resized", "set", "set short", "released", "half released"]),
    )
    def tamper_in_place(self, name: str, kind: str) -> None:
        """The weight stays the same object, but its shape or memory does not, until :meth:`put_back`."""
        block, (weight, shape) = self.blocks[name], (self.blocks[name].weight, _SHAPES[name])
        if kind in ("released", "half released"):
            self.undo = block.release(0 if kind == "released" else block.memory.untyped_storage().nbytes() // 2)
        elif kind == "resized":
            weight.resize_(shape[0] // 2, *shape[1:])
            self.undo = lambda: weight.resize_(shape)
        else:
            _set(weight, torch.ones_like(weight) if kind == "set" else torch.ones(3, dtype=weight.dtype))
            self.undo = lambda: _set(weight, block.memory[_GUARD:-_GUARD].view(shape))

    @precondition(lambda self: self.undo)
    @rule()
    def put_back(self) -> None:
        """The weights are those of before."""
        self._put_back()

    def _put_back(self) -> None:
        assert self.undo is not None
        self._try(self.switcher.revert)
        self.undo()
        self.undo = None

    @precondition(lambda self: not self.undo)
    @rule(name=st.sampled_from(["v", "x"]), how=st.sampled_from(["copy", "same object", "same storage"]))
    def move(self, name: str, how: str) -> None:
        """The weight is a copy of itself elsewhere, as after a move to another device and back."""
        old = self.blocks[name]
        if how == "same storage" and not self.numpy:
            if give_back := old.release(0):
                give_back()
            return
        new = _Block(old.weight)
        size = _GUARD * new.memory.element_size()
        new.base = new.base[:size] + old.base[size:-size] + new.base[-size:]
        if how == "same object" and not self.numpy:
            new.take(old.weight)
        self.blocks[name] = new
        self.weights[name] = self._as_live(new.weight)

    @precondition(lambda self: not self.undo and not self.is_on)
    @rule(name=st.sampled_from(["v", "w", "x"]), seed=_SEEDS)
    def train(self, name: str, seed: int) -> None:
        """The base changes, which is allowed while no adapter is on."""
        block = self.blocks[name]
        block.weight.copy_(torch.randn(_SHAPES[name], generator=torch.Generator().manual_seed(seed)))
        block.base = block.bits()

    @rule(of=st.data(), seed=_SEEDS, how=st.sampled_from(["cut", "bytes", "other", "in place"]))
    def overwrite(self, of: st.DataObject, seed: int, how: str) -> None:
        """A file becomes shorter, has other bytes, or is another adapter."""
        path: Path = of.draw(st.sampled_from([one for one in self.adapters if isinstance(one, Path)]))
        data, random = path.read_bytes(), Random(seed)
        if how == "other":
            save(self._made(seed), path)
        elif how == "in place":
            with open(path, "r+b") as file:
                file.truncate(random.randrange(len(data) + 1))
        else:
            path.write_bytes(data[: len(data) // 2] if how == "cut" else mutated_bytes(random, data))

    @rule(of=st.data(), value=st.sampled_from([-1, 2**40, 0]))
    def reuse_arrays(self, of: st.DataObject, value: int) -> None:
        """The caller writes something else to arrays of which adapters were made."""
        array = of.draw(st.sampled_from(self.arrays))
        if array.size and array.flags.writeable:
            array[:] = np.array(value).astype(array.dtype)

    @precondition(lambda self: not self.forked and hasattr(os, "fork"))
    @rule(at=_ANY)
    def fork(self, at: int) -> None:
        """A child switches and reverts its copy, whose threads are not there any more; nothing changes here. Once: it takes long."""
        self.forked = True
        adapter, before = self._adapter(at), self._everything()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
            child = os.fork()
        if not child:
            self._end_as_child(adapter)
        end = time.monotonic() + _WAIT
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise Violation(f"a child that switches and reverts has no end within {_WAIT:g} seconds")
            time.sleep(0.001)
        if ended[1]:
            raise Violation(f"a child that switches and reverts ends with status {ended[1]}")
        if before != self._everything():
            raise Violation("a child changes the weights of its parent")

    def _end_as_child(self, adapter: Any) -> NoReturn:
        code = 1
        try:
            self._try(lambda: self.switcher.switch(adapter))
            if self._try(self.switcher.revert):
                self._check_base()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _try(self, work: Callable[[], object]) -> bool:
        """Whether it was not refused; what is refused changes nothing, and nothing changes a guard."""
        before = self._everything()
        try:
            work()
        except (ShiraError, OSError, KeyError) as error:
            if before != self._everything():
                raise Violation(f"refused, and memory was changed: {error}") from error
            return False
        for name, block in self.blocks.items():
            if not block.is_released and block.guards(block.bits()) != block.guards(block.base):
                raise Violation(f"memory around {name!r} was written")
        return True

    def _everything(self) -> Any:
        released = next((block.weight for block in self.blocks.values() if block.is_released), None)
        return [block.bits() for block in self.blocks.values()], {
            # A copy: torch lets no memory go that numpy has seen.
            name: (one if self.numpy else as_array(one.clone())).tobytes()
            for name, one in self.weights.items()
            if one is not released
        }

    def _check_base(self) -> None:
        for name, block in self.blocks.items():
            if not block.is_released and block.bits() != block.base:
                raise Violation(f"{name!r} is not the base's after revert")

    def teardown(self) -> None:
        """With the weights of before, all adapters can be taken off."""
        if not hasattr(self, "switcher"):
            return
        try:
            if self.undo:
                self._put_back()
            self.switcher.revert()
            self._check_base()
        finally:
            self._folder.cleanup()
            del self.switcher, self.undo  # and its threads, which would wait until Python collects circles
