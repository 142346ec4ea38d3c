"""The threads of this machine: tiles of one change after the other, with results in order.

Work goes in tiles of fixed size, one thread each with BLAS on one thread, so that no value depends on how many threads
there are.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from shira_format.arrays import Array, scratch
from shira_format.changes import Change, Ends, tile_size

_T = TypeVar("_T")
_R = TypeVar("_R")

Progress = Callable[[int], object]


def usable_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


class Workers:
    """A pool of threads, as a context manager."""

    def __init__(self, threads: int | None = None) -> None:
        """Args: ``threads``: all cores by default."""
        self.threads = threads or usable_cores()
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
        """Run ``work`` on some thread; it must not wait for others of this pool."""
        return self._pool.submit(work)

    def map(self, work: Callable[[_T], _R], tasks: Iterable[_T]) -> Iterator[_R]:
        """The results in the order of ``tasks``; few are ahead of the one that is waited for."""
        running: deque[Future[_R]] = deque()
        try:
            for task in tasks:
                running.append(self._pool.submit(work, task))
                if len(running) > 2 * self.threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:  # whoever stops asking early leaves no work behind
            for future in running:
                future.cancel()

    def ranges(
        self, size: int, step: int, work: Callable[[int, int], _R], progress: Progress = lambda _: None
    ) -> Iterator[_R]:
        """``work(start, stop)`` for each tile of ``size`` elements."""
        starts = range(0, size, step)
        for start, result in zip(starts, self.map(lambda s: work(s, min(s + step, size)), starts), strict=True):
            progress(min(step, size - start))
            yield result

    def tiles(
        self,
        change: Change,
        work: Callable[[int, Array, Array, Ends | None], _R],
        progress: Progress = lambda _: None,
    ) -> Iterator[_R]:
        """``work(start, values, magnitudes, ends)`` for each tile: its first flat index, and its elements, flat."""

        def one(start: int, stop: int) -> _R:
            values = scratch("values", stop - start, change.dtype)
            magnitudes = scratch("magnitudes", stop - start, change.dtype)
            with np.errstate(over="ignore", invalid="ignore"):  # found, and named, by the energy
                ends = change.tile(start, stop, values)
                np.abs(values, out=magnitudes)
            return work(start, values, magnitudes, ends)

        return self.ranges(change.size, tile_size(change), one, progress)


_lock = threading.Lock()
_users = 0
_limits: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """BLAS on one thread until the last of those who asked for it is done: the setting belongs to the process."""
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
