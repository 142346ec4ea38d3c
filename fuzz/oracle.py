"""When a case is a violation: another exception than the documented ones, too much time, or too much memory."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz import system
from fuzz.targets import MEGABYTE, Target
from shira_format.errors import ShiraError

ACCEPTED, REFUSED, VIOLATION = "accepted", "refused", "violation"
TIMES_THE_FILES = 4


class Violation(AssertionError):
    """A promise is broken: said by a target that sees it itself."""


class _Meter:
    """CPU seconds and peak memory of a case, without those of :func:`aside`."""

    def __init__(self) -> None:
        self._resume(seconds=0.0, peak=0)

    def _resume(self, seconds: float, peak: int) -> None:
        self._seconds, self._peak = seconds, peak
        system.forget_peak()
        self._memory, self._began = system.memory(), time.process_time()

    def pause(self) -> tuple[float, int]:
        """The seconds and the bytes until now."""
        seconds = self._seconds + time.process_time() - self._began
        return seconds, max(self._peak, system.peak() - self._memory)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Not measured."""
        seconds, peak = self.pause()
        try:
            yield
        finally:
            self._resume(seconds, peak)


_meter = _Meter()


@contextmanager
def aside() -> Iterator[None]:
    """The work of a target's own oracle, such as the plain reader, which counts for neither time nor memory."""
    with _meter.aside():
        yield


def judge(target: Target, folder: Path) -> tuple[str, str]:
    """The outcome of a case, and what is wrong with it.

    Time and memory above the limits are measured twice: the first time may include an import or a compilation.
    """
    outcome, why = _judge_once(target, folder)
    return _judge_once(target, folder) if outcome == VIOLATION and why.startswith(_LIMIT) else (outcome, why)


_LIMIT = "limit: "


def _judge_once(target: Target, folder: Path) -> tuple[str, str]:
    global _meter  # noqa: PLW0603 - one case at a time
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    _meter = _Meter()
    try:
        target.check(folder)
        outcome = ACCEPTED
    except (ShiraError, OSError):
        outcome = REFUSED
    except Exception:
        return VIOLATION, traceback.format_exc()
    seconds, peak = _meter.pause()
    if seconds > target.seconds:
        return VIOLATION, f"{_LIMIT}{seconds:.1f} CPU seconds; {target.seconds:g} are allowed"
    if peak > (most := TIMES_THE_FILES * size + target.room):
        return (
            VIOLATION,
            f"{_LIMIT}{peak / MEGABYTE:.0f} MiB for files of {size} bytes; {most / MEGABYTE:.0f} are allowed",
        )
    return outcome, ""
