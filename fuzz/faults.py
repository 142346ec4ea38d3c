"""Faults that are put into the product: what the targets of long sequences are able to see. `python -m fuzz.faults` tries them all.

Each fault is a mutant that someone could write. What is not seen within its cases is a target that is too weak.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import hypothesis

from fuzz import runner
from fuzz.targets import TARGETS, switching
from shira_format._core import arrays, threads
from shira_format._core import system as files
from shira_format.live import lock, memory, switcher, weights
from shira_format.storage import atomic, owners


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        target: of the fuzzer, that is to see it.
        about: what the product does not do any more.
        plant: puts it into the product, until the block ends.
        cases: within which it must be seen.
    """

    target: str
    about: str
    plant: Callable[[], AbstractContextManager[Any]]
    cases: int = 100


def seen_after(fault: Fault) -> int | None:
    """The number of cases until the fuzzer sees a fault; None if it does not. Only where child processes are forked."""
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as found,
        mock.patch.object(runner, "_ENOUGH", 1),
        _impatient(),
        fault.plant(),
    ):
        tally = runner.run(TARGETS[fault.target], seed=0, cases=fault.cases, found=Path(found))
        return tally.cases if tally.found else None


@contextmanager
def _impatient() -> Iterator[None]:
    """The machine of Switchers does not look for the fewest steps, and a child that does not end is given up soon."""
    quick = functools.partial(hypothesis.settings, phases=[hypothesis.Phase.generate])
    with mock.patch.object(switching, "settings", quick), mock.patch.object(switching, "_WAIT", 5.0):
        yield


def _without(owner: Any, name: str, result: Any = None) -> Callable[[], AbstractContextManager[Any]]:
    """A function that does nothing."""
    return lambda: mock.patch.object(owner, name, return_value=result)


def _instead(owner: Any, name: str, new: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, new)


@contextmanager
def _everywhere(old: Any, new: Any) -> Iterator[None]:
    """Another function in all modules that have imported one by its name."""
    with contextlib.ExitStack() as stack:
        for module in [one for name, one in sys.modules.items() if name.startswith("shira")]:
            for name in [name for name, value in vars(module).items() if value is old]:
                stack.enter_context(mock.patch.object(module, name, new))
        yield


@contextmanager
def _in_place(path: Path) -> Iterator[BinaryIO]:
    with open(path, "wb") as file:
        yield file


@contextmanager
def _renamed_too_early(path: Path) -> Iterator[BinaryIO]:
    hidden = owners.hidden(path)
    with open(hidden, "wb") as file:
        os.replace(hidden, path)
        yield file


def _forgetful(self: Any, weight: Any) -> None:
    weight.put(self.indices[:-1], self.base[:-1])


def _same_pool(self: Any) -> Any:
    self._pool = self._pool or ThreadPoolExecutor(self._count)
    return self._pool


def _read_without_turn(file: Any, start: int, out: memoryview, turn: Any) -> int:  # noqa: ARG001 - as it is called
    file.seek(start)
    return file.readinto(out) or 0


FAULTS = [
    Fault("switching", "shapes are not compared", _without(switcher, "check_frames")),
    Fault("switching", "the last entry is not taken off", _instead(switcher._EntryChange, "undo", _forgetful)),
    Fault("switching", "a failure is not undone", _without(threads.Threads, "run")),
    Fault("switching", "a replaced weight is not noticed", _without(memory.Places, "check_same")),
    Fault("switching", "weights that overlap are not noticed", _without(memory.Places, "check_apart")),
    Fault("switching", "released memory is not noticed", _without(weights, "check_memory")),
    Fault("switching", "a fork goes on with the threads of its parent", _instead(threads.Threads, "executor", property(_same_pool))),
    Fault("switching", "an adapter does not copy its arrays", lambda: _everywhere(arrays.owned, lambda array: array)),
    Fault("kills", "a file is written under its own name", lambda: _everywhere(atomic.atomic_file, _in_place)),
    Fault("kills", "a file gets its name before it is written", lambda: _everywhere(atomic.atomic_file, _renamed_too_early)),
    Fault("kills", "what killed writers left is not removed", _without(owners, "clean")),
    Fault("kills", "a folder that was moved away is not put back", lambda: _everywhere(atomic.restore, lambda _: None)),
    Fault("threads", "changes do not wait for each other", _without(lock.ReadWriteLock, "writing", contextlib.nullcontext())),
    Fault("threads", "changes do not wait for serving", _without(lock.ReadWriteLock, "reading", contextlib.nullcontext())),
    Fault("threads", "threads share the position in a file", _instead(files, "read_at", _read_without_turn)),
    Fault("threads", "a file is written under its own name", lambda: _everywhere(atomic.atomic_file, _in_place)),
]  # fmt: skip


def main() -> int:
    """Try them; the exit code is 1 if one is not seen."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.faults", description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted({fault.target for fault in FAULTS}))
    options = parser.parse_args()
    rows = []
    for fault in FAULTS:
        if not options.target or fault.target in options.target:
            rows.append({"target": fault.target, "fault": fault.about, "cases": seen_after(fault)})
            print(json.dumps(rows[-1]), flush=True)
    return int(any(row["cases"] is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
