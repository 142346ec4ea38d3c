"""Runs whose results are kept one by one, so that a study can be stopped and gone on with.

A study says, from what is stored, which runs are to be done next; workers in processes of their own do them, and each result is
appended to a file as one JSON line as soon as it is there. A stop loses no more than the runs that were in progress.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The settings of one run; each study has its own subclass."""

    @property
    def key(self) -> str:
        """All settings, which name the run."""
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


class Store:
    """Results by the key of their run, in a file of JSON lines that only grows."""

    def __init__(self, path: Path) -> None:
        """Read what is stored; a last line that a stop cut off is dropped."""
        self.path = path
        self.results: dict[str, Result] = {}
        if not path.exists():
            return
        text = path.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, "utf-8")
        for line in whole.splitlines():
            result = json.loads(line)
            self.results[result["key"]] = result

    def __contains__(self, run: Run) -> bool:
        return run.key in self.results

    def add(self, run: Run, found: Mapping[str, Any]) -> None:
        """Append one result, safe from a stop once this returns."""
        result = {"key": run.key} | asdict(run) | dict(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[run.key] = result


# What is to be done, in order, by what is stored; runs that need the results of others come when these are there.
Next = Callable[[Store], Sequence[Run]]
Work = Callable[[Any], Result]


def run_all(
    store: Store, following: Next, work: Work, *, workers: int, start: Callable[..., None], given: tuple[Any, ...]
) -> int:
    """Do all runs that are not stored yet.

    Args:
        store: where results are, and go.
        following: see :data:`Next`.
        work: does one run; a function of a module, as processes need it.
        workers: processes; 0: in this one.
        start: called once in each process, before its first run.
        given: its arguments.

    Returns:
        How many were done.
    """
    if not workers:
        return _run_here(store, following, work, start, given)
    done, running = 0, dict[Future[Result], Run]()
    # spawn: torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=start, initargs=given)
    try:
        while True:
            busy = set(running.values())
            for run in [run for run in following(store) if run not in busy and run not in store]:
                if len(running) == workers:
                    break
                running[pool.submit(work, run)] = run
            if not running:
                return done
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                store.add(run, future.result())
                done += 1
                _say(run, store)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run_here(
    store: Store, following: Next, work: Work, start: Callable[..., None], given: tuple[Any, ...]
) -> int:
    done = 0
    while left := [run for run in following(store) if run not in store]:
        if not done:
            start(*given)
        store.add(left[0], work(left[0]))
        done += 1
        _say(left[0], store)
    return done


def _say(run: Run, store: Store) -> None:
    seconds = store.results[run.key].get("seconds", 0)
    print(
        f"{time.strftime('%H:%M:%S')} {len(store.results)} stored, {seconds:.0f} s: {run.key}",
        file=sys.stderr,
        flush=True,
    )
