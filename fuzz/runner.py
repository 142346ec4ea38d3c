"""Runs cases in a child process, so that a crash or a hang is a result like any other; stores the cases that are violations."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from fuzz import oracle, system
from fuzz.targets import TARGETS, Target

FOUND = Path(__file__).parent / "corpus" / "found"
_HANGS = 30  # CPU seconds beyond its own after which a case is ended
_SILENT = 600.0  # seconds without a result: a deadlock
_ENOUGH = 20  # violations, after which a target is given up
_BROKEN = "broken"  # the target itself fails


@dataclass
class Tally:
    """What became of the cases of one target.

    Attributes:
        outcomes: how many cases were accepted, refused, violations.
        cpu: CPU seconds of all cases and their making.
        found: the folders of violations, with what is wrong.
        interrupted: whether somebody ended it before its time.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    cpu: float = 0.0
    found: list[tuple[Path, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def cases(self) -> int:
        """All cases."""
        return self.outcomes.total()


def run(
    target: Target, *, seed: int, seconds: float | None = None, cases: int | None = None, found: Path = FOUND
) -> Tally:
    """Run cases until a time in CPU seconds or a number of cases is reached, or until an interrupt.

    Args:
        target: what is fuzzed.
        seed: the n-th case of a seed is always the same.
        seconds: CPU seconds at most.
        cases: cases at most.
        found: where violations are stored, a folder each.
    """
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder, number = Path(name), 0
        try:
            while (
                (seconds is None or tally.cpu < seconds)
                and (cases is None or number < cases)
                and len(tally.found) < _ENOUGH
            ):
                left = None if seconds is None else seconds - tally.cpu
                number = _run_child(target, seed, number, cases, left, folder, tally, found)
        except KeyboardInterrupt:
            tally.interrupted = True
    return tally


def replay(folder: Path) -> tuple[str, str]:
    """Judge a stored case in this process: ``FOUND/TARGET/CASE``; a copy, since cases write beside their files."""
    target = TARGETS[folder.parent.name]
    with _environment(target.environment), tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        copy = shutil.copytree(folder, Path(name) / "case", symlinks=True)
        return oracle.judge(target, copy)


def _run_child(
    target: Target,
    seed: int,
    number: int,
    cases: int | None,
    seconds: float | None,
    folder: Path,
    tally: Tally,
    found: Path,
) -> int:
    """Run cases from ``number`` on in one child until it ends; returns the number of the next case."""
    if not target.environment:
        target.module()  # once for all children, where they are forked
    context = system.children(anew=bool(target.environment))
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(target, seed, number, cases, seconds, folder, theirs))
    with _environment(target.environment):
        child.start()
    theirs.close()
    try:
        while ours.poll(_SILENT):
            cpu, outcome, why = ours.recv()
            if outcome == _BROKEN:
                raise RuntimeError(f"{target.name}: case {number} of seed {seed} cannot be made: {why}")
            tally.cpu += cpu
            tally.outcomes[outcome] += 1
            if outcome == oracle.VIOLATION:
                _store(target, seed, number, folder, why, tally, found)
            number += 1
            if len(tally.found) == _ENOUGH:
                child.kill()
                child.join()
                return number
        why = f"no answer within {_SILENT:g} seconds"
        child.kill()
    except EOFError:
        child.join()
        if child.exitcode == 0:
            return number
        why = f"the process ended: {_reason(child.exitcode)}"
    child.join()
    tally.outcomes[oracle.VIOLATION] += 1
    tally.cpu += _HANGS if child.exitcode == -getattr(signal, "SIGXCPU", 0) else 0
    _store(target, seed, number, folder, why, tally, found)
    return number + 1


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, too many CPU seconds" if name == "SIGXCPU" else name
    return f"exit code {code}"


def _work(
    target: Target,
    seed: int,
    number: int,
    cases: int | None,
    seconds: float | None,
    folder: Path,
    results: Connection,
) -> None:
    """In the child: cases one after the other; the files of the last one stay where they are until the parent has answered."""
    sys.setrecursionlimit(1000)
    began = system.seconds()
    while (seconds is None or system.seconds() - began < seconds) and (cases is None or number < cases):
        started = system.seconds()
        case = folder / str(number)
        system.limit(int(target.seconds) + _HANGS)
        try:
            _make(target, seed, number, case)
            outcome, why = oracle.judge(target, case)
            if outcome == oracle.VIOLATION:  # without what it wrote beside its files
                _make(target, seed, number, case)
            else:
                shutil.rmtree(case)
        except Exception:
            results.send((0.0, _BROKEN, traceback.format_exc()))
            return
        results.send((system.seconds() - started, outcome, why))
        number += 1


def _make(target: Target, seed: int, number: int, case: Path) -> None:
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    target.make(Random(f"{target.name} {seed} {number}"), case)


def _store(target: Target, seed: int, number: int, folder: Path, why: str, tally: Tally, found: Path) -> None:
    place = found / target.name / f"{seed}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / str(number), place)
    tally.found.append((place, why))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
