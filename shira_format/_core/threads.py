"""Pools of threads: one that computes, with results in order, and one that writes to live weights.

Work is cut into tiles of a fixed size, each computed by one thread with BLAS on one thread, so that no value depends on
the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

from threadpoolctl import threadpool_limits

from shira_format._core.system import usable_cores
from shira_format.errors import SourceError

MOST_THREADS = 16  # with more, they wait for each other

_T = TypeVar("_T")
_R = TypeVar("_R")

_BATCH = 1 << 21  # elements of a task
_TASKS_AHEAD = 3  # tasks that run while others are made
_ENTRIES_AHEAD = 1 << 23  # entries that these hold together

Progress = Callable[[int], object]


class Workers:
    """A pool of threads, as a context manager."""

    def __init__(self, threads: int | None = None) -> None:
        """Args: ``threads``: all cores by default, but no more than 16.

        Raises:
            SourceError: fewer than 1.
        """
        if threads is not None and threads < 1:
            raise SourceError(f"{threads} threads: at least 1 is needed")
        self.threads = threads or min(usable_cores(), MOST_THREADS)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="shira")
        self._blas = single_threaded_blas()

    def __enter__(self) -> Self:
        self._blas.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._blas.__exit__(kind, error, trace)

    def submit(self, work: Callable[[], _R]) -> Future[_R]:
        """Run ``work`` on one of the threads; it must not wait for other work of this pool."""
        return self._pool.submit(work)

    def ahead(self, tasks: Iterable[tuple[int, Callable[[], _R]]]) -> Iterator[_R]:
        """The results of tasks in their order, while the next tasks are being made.

        Args:
            tasks: each with the number of entries that it holds in memory: where these are many, the first task is
                waited for. They must not wait for others of this pool.
        """
        running: deque[tuple[int, Future[_R]]] = deque()
        for entries, task in tasks:
            running.append((entries, self._pool.submit(task)))
            del task  # which may hold a lot, and would until the next one is made
            while len(running) > _TASKS_AHEAD or (running and sum(held for held, _ in running) > _ENTRIES_AHEAD):
                yield running.popleft()[1].result()
        while running:
            yield running.popleft()[1].result()

    def map(self, work: Callable[[_T], _R], tasks: Iterable[_T]) -> Iterator[_R]:
        """The results in the order of ``tasks``; only a few tasks run ahead."""
        running: deque[Future[_R]] = deque()
        try:
            for task in tasks:
                running.append(self._pool.submit(work, task))
                if len(running) > 2 * self.threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:  # no work is left behind if the caller stops early
            for future in running:
                future.cancel()

    def ranges(
        self, size: int, step: int, work: Callable[[int, int], _R], progress: Progress = lambda _: None
    ) -> Iterator[_R]:
        """``work(start, stop)`` for each tile of ``size`` elements."""
        # Several tiles per task, where there are many: handing over a result costs as much as a small tile.
        stride = step * max(1, min(_BATCH // step, size // (step * 4 * self.threads)))

        def several(first: int) -> list[tuple[int, _R]]:
            stops = (min(start + step, size) for start in range(first, min(first + stride, size), step))
            return [
                (stop - start, work(start, stop)) for start, stop in zip(count(first, step), stops, strict=False)
            ]

        for results in self.map(several, range(0, size, stride)):
            for elements, result in results:
                progress(elements)
                yield result


class Threads:
    """The threads that write to live weights: an interrupt reaches the thread that waits, never one that writes.

    The pool lives as long as the object, and is made anew after a fork.
    """

    def __init__(self, count: int | None = None) -> None:
        """Args: ``count``: threads; all cores by default, but no more than 16."""
        self._count = count or min(usable_cores(), MOST_THREADS)
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The pool."""
        if self._pool is None or self._process != os.getpid():  # a fork copies no threads
            self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="shira-switch")
            self._process = os.getpid()
        return self._pool

    def map(self, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """``work`` of each item; when this returns or raises, no work is running any more."""
        futures: list[Future[_R]] = [self.executor.submit(work, item) for item in items]
        try:
            return list(map(Future.result, futures))
        except BaseException:
            _end(futures)
            raise
        finally:
            # An error holds this frame, and a future its error: the circle would keep the pool's threads.
            futures.clear()

    def run(self, work: Callable[[], Any]) -> None:
        """Run ``work`` to its end; an interrupt is raised after that."""
        _wait([future := self.executor.submit(work)])
        try:
            future.result()
        finally:
            del future  # as in map


def _end(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        future.cancel()
    _wait(futures)


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


_lock = threading.Lock()
_users = 0
_limits: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """BLAS on one thread until the last block of this kind ends: the setting is that of the process."""
    global _users, _limits  # noqa: PLW0603 - so does this count
    with _lock:
        _users += 1
        if _users == 1:
            _limits = threadpool_limits(1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limits.restore_original_limits()
