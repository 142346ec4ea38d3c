"""The stages of a conversion on the workers of a ``dask.distributed`` cluster, one tensor a task.

Workers open the same inputs by the same paths, on storage that all of them reach. They return entries, which this process
writes in order, so that the bytes are those of a local run.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from shira_format._core.optional import optional_import
from shira_format._core.threads import Progress, Workers
from shira_format.convert.inputs import Conversion, ConversionInputs
from shira_format.errors import ShiraError, SourceError, WorkError
from shira_format.selection.stages import Pending, Stage

_C = TypeVar("_C")
_R = TypeVar("_R")

RETRIES = 5  # of a task whose worker was lost, or could not read for the moment
CONNECT_TIMEOUT = 60  # seconds to wait for a scheduler, and for a first worker
_TASKS_PER_THREAD = 4  # tasks that are submitted ahead


class ClusterEngine:
    """An engine on a cluster; a context manager."""

    def __init__(
        self, scheduler: str, conversion: Conversion, inputs: ConversionInputs, progress: Progress
    ) -> None:
        """Connect to the scheduler at an address such as ``tcp://host:8786``; ``inputs`` are those that were opened here.

        Raises:
            WorkError: it does not answer, has no workers, or the package is not installed.
        """
        with optional_import("a cluster needs dask.distributed", "dask", WorkError):
            from distributed import Client
        try:
            self._client = Client(scheduler, set_as_default=False, timeout=CONNECT_TIMEOUT)
            self._client.wait_for_workers(1, timeout=CONNECT_TIMEOUT)
        except (OSError, TimeoutError, ValueError) as error:
            raise WorkError(f"{scheduler}: {error}") from None
        self._scheduler, self._conversion, self._progress = scheduler, conversion, progress
        self._source, self._files = json.dumps(inputs.source), inputs.states()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def map(self, stage: Stage[_C, _R], changes: Sequence[_C]) -> Iterator[Pending[_R]]:
        """See :class:`shira_format.selection.stages.Engine`."""
        threads = max(1, sum(self._client.nthreads().values()))
        running: deque[tuple[Any, int]] = deque()
        try:
            for change in changes:
                named = cast(Any, change)
                # Not pure: the same task of an earlier run must not stand in for this one, whose inputs may differ.
                future = self._client.submit(
                    compute, self._conversion, self._source, self._files, named.name, stage, pure=False, retries=RETRIES,
                    key=None,
                )  # fmt: skip
                running.append((future, named.size * stage.passes))
                if len(running) > _TASKS_PER_THREAD * threads:
                    yield self._next(running)
            while running:
                yield self._next(running)
        finally:
            self._client.cancel([future for future, _ in running])

    def _next(self, running: deque[tuple[Any, int]]) -> Pending[Any]:
        future, size = running.popleft()
        try:
            result = future.result()
        except ShiraError:
            raise
        except Exception as error:
            raise WorkError(f"{self._scheduler}: a worker failed: {type(error).__name__}: {error}") from error
        self._progress(size)
        return getattr(result, "size", 0), lambda: result


def compute(conversion: Conversion, source: str, files: Any, name: str, stage: Stage[Any, _R]) -> _R:
    """One stage for one change; runs on a worker.

    Raises:
        SourceError: what the worker opens is another source than that of ``source``.
    """
    inputs = _opened(cast(Any, conversion), source, files)
    changes = {change.name: change for change in inputs.changes}
    with Workers(1) as workers:
        _, result = stage(changes[name], workers, lambda _: None)
        return result()


@lru_cache(maxsize=2)
def _opened(conversion: Conversion, source: str, files: Any) -> ConversionInputs:  # noqa: ARG001 - other files, other inputs
    inputs = conversion.open()
    if json.dumps(inputs.source) != source:
        raise SourceError(
            f"{inputs.source_file}: the worker's is another file, or it has changed while it was read"
        )
    return inputs
