"""The threads on which weights are changed: an interrupt reaches the thread that waits, never one that writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from shira_format._core.cores import MOST_THREADS, usable_cores

_T = TypeVar("_T")
_R = TypeVar("_R")


class Threads:
    """A pool that lives as long as the object, and is made anew after a fork."""

    def __init__(self, count: int | None = None) -> None:
        """Args: ``count``: at most so many threads; all cores by default, but no more than 16."""
        self._count = count or min(usable_cores(), MOST_THREADS)
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The pool."""
        if self._pool is None or self._process != os.getpid():  # a fork takes no threads along
            self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="shira-switch")
            self._process = os.getpid()
        return self._pool

    def map(self, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """``work`` of each item; when this returns or raises, none of it is under way any more."""
        futures: list[Future[_R]] = [self.executor.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            _wait(futures)
            raise

    def run(self, work: Callable[[], Any]) -> None:
        """Do this to its end, whatever interrupts come; they are raised then."""
        _wait([future := self.executor.submit(work)])
        future.result()


def _wait(futures: Sequence[Future[Any]]) -> None:
    interrupt: BaseException | None = None
    while True:
        try:
            wait(futures)
        except KeyboardInterrupt as error:
            interrupt = error
            continue
        break
    if interrupt is not None:
        raise interrupt
