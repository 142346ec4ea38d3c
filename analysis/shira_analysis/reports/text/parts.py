"""Lines that several reports have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shira_format._core.text import file_size, printable


def shape(sizes: Sequence[int]) -> str:
    """``[2, 3]`` as 2x3; of a scalar nothing."""
    return "x".join(map(str, sizes))


def some(names: Sequence[str], most: int = 8, noun: str = "") -> str:
    """Names in one line; of many, the first, and how many there are."""
    text = ", ".join(map(printable, names[:most]))
    return text if len(names) <= most else f"{text}, ... ({len(names)}{noun})"


def and_more(names: Sequence[str], most: int = 3) -> str:
    """Names in one line; of many, the first, and how many more there are."""
    more = len(names) - most
    return ", ".join(map(printable, names[:most])) + (f" and {more} more" if more > 0 else "")


def written(output: Path | None, size: int | None) -> str:
    """What was written, and its size; None for a dry run."""
    if output is None:
        return "dry run: nothing was written"
    return f"{printable(str(output))}: {file_size(size or 0)}"


def path_or_none(output: Path | None) -> str | None:
    """A path as a JSON value."""
    return None if output is None else str(output)
