"""A lock for many readers (forward passes) or one writer (a change of weights)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Readers wait while a writer writes or waits; the writing thread may enter again, as writer or reader."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writer: int | None = None  # a thread
        self._depth = 0
        self._held = threading.local()  # depth of this thread's reads

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Shared."""
        me = threading.get_ident()
        with self._turn:
            inside = getattr(self._held, "reads", 0)
            # A thread that already reads or writes must not wait for a writer that waits for it.
            self._turn.wait_for(
                lambda: inside or self._writer == me or (self._writer is None and not self._waiting)
            )
            self._readers += 1
            self._held.reads = inside + 1
        try:
            yield
        finally:
            with self._turn:
                self._readers -= 1
                self._held.reads -= 1
                self._turn.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone.

        Raises:
            RuntimeError: this thread is reading, and would deadlock.
        """
        me = threading.get_ident()
        with self._turn:
            if self._writer != me:
                if getattr(self._held, "reads", 0):
                    raise RuntimeError("weights cannot change within serving() of the same thread")
                self._waiting += 1
                try:
                    self._turn.wait_for(lambda: self._writer is None and not self._readers)
                finally:
                    self._waiting -= 1
                    self._turn.notify_all()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._turn:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._turn.notify_all()
