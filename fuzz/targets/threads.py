"""Some threads that load, switch, revert, save and read the same objects: nothing but right results and documented errors."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz.oracle import Violation
from shira_format.adapter import Adapter
from shira_format.errors import ShiraError
from shira_format.format import load, save
from shira_format.live import AdapterPool, Switcher
from shira_format.tensors import SparseTensor

_THREADS, _STEPS, _ADAPTERS = 4, 12, 3
_SHAPES = {"w": (60, 50), "v": (700,)}
_WAIT = 120.0  # seconds after which threads that do not end are a deadlock


def make(random: Random, folder: Path) -> None:
    """A seed of what each thread does."""
    (folder / "case.json").write_text(json.dumps({"seed": random.getrandbits(32)}), "utf-8")


def check(folder: Path) -> None:
    """Run the threads, then take all adapters off."""
    seed = json.loads((folder / "case.json").read_text("utf-8"))["seed"]
    shared = _Shared(folder, seed)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            shared.run(Random(seed + number), number)
        except BaseException as error:  # which is told by the main thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(_THREADS)]
    with _turning_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_WAIT)
    if any(thread.is_alive() for thread in threads):
        raise Violation("the threads wait for each other")
    if wrong:
        raise wrong[0]
    shared.check_end()


@contextmanager
def _turning_often() -> Iterator[None]:
    """Python turns to another thread a thousand times as often as it does, so that they meet everywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Shared:
    """What the threads share: a model with its switcher and pool, adapters in memory, and files."""

    def __init__(self, folder: Path, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.folder = folder
        self.base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in _SHAPES.items()}
        self.model = {name: weight.copy() for name, weight in self.base.items()}
        self.paths = [folder / f"{number}.st" for number in range(_ADAPTERS)]
        for path in self.paths:
            save(Adapter([self._tensor(random, name) for name in self.base]), path)
        self.opened = [load(path) for path in self.paths]
        self.expected = [
            {name: tensor.values.tobytes() for name, tensor in adapter.items()} for adapter in self.opened
        ]
        pool = AdapterPool(
            {path.stem: path for path in self.paths}, budget=int(random.choice([0, 1 << 14, 1 << 30]))
        )
        self.switcher = Switcher(self.model, pool=pool, threads=2)

    def _tensor(self, random: np.random.Generator, name: str) -> SparseTensor:
        flat = self.base[name].reshape(-1)
        indices = np.flatnonzero(random.random(flat.size) < 0.2)
        own = flat[indices]
        return SparseTensor(name, _SHAPES[name], indices, own + np.float32(1), base=own)

    def run(self, random: Random, number: int) -> None:
        """The steps of one thread."""
        for step in range(_STEPS):
            at = random.randrange(_ADAPTERS)
            source: Any = random.choice([self.paths[at], self.paths[at].stem, self.opened[at]])
            how = random.choice(
                [
                    "load",
                    "switch",
                    "unload",
                    "revert",
                    "serving",
                    "applied",
                    "read",
                    "read",
                    "read",
                    "save",
                    "replace",
                ]
            )
            try:
                self._step(how, at, source, random, self.folder / f"{number}-{step}.st")
            except (ShiraError, OSError, KeyError) as error:
                if not (isinstance(error, KeyError) and how == "unload"):
                    raise Violation(f"{how}: {error}") from error

    def _step(self, how: str, at: int, source: Any, random: Random, new: Path) -> None:
        if how in ("load", "switch"):
            getattr(self.switcher, how)(source, random.choice([None, 0.5, 1.0]))
        elif how == "unload":
            self.switcher.unload(source)
        elif how == "revert":
            self.switcher.revert()
        elif how == "serving":
            with self.switcher.serving() as report:
                before = [weight.tobytes() for weight in self.model.values()]
                time.sleep(0.002)  # a forward pass, in which others would like to switch
                if (
                    before != [weight.tobytes() for weight in self.model.values()]
                    or report != self.switcher.report
                ):
                    raise Violation("weights changed while they served")
        elif how == "applied":
            with self.switcher.applied(source, 1.0):
                pass
        elif how == "read":
            if self.expected[at] != {name: tensor.values.tobytes() for name, tensor in self.opened[at].items()}:
                raise Violation("an adapter that is read has other values")
        else:
            path = new if how == "save" else self.paths[at]
            save(self.opened[at], path)
            if self.expected[at] != {name: tensor.values.tobytes() for name, tensor in load(path).items()}:
                raise Violation("an adapter that was saved has other values")

    def check_end(self) -> None:
        """The base's bits are back."""
        self.switcher.revert()
        for name, weight in self.base.items():
            if weight.tobytes() != self.model[name].tobytes():
                raise Violation(f"{name!r} is not the base's after revert")
