"""Lines that several reports have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from shira_format._core.notices import NamesNotice
from shira_format._core.text import file_size, printable


class _AboutNames(Protocol):
    """A report with notices and with names that were left out, by the reason."""

    notices: list[str]
    left_out: dict[str, list[str]]


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


def about_names(report: _AboutNames) -> list[str]:
    """What was done with names, and which were left out, by the reason."""
    lines = [printable(notice) for notice in report.notices if isinstance(notice, NamesNotice)]
    return lines + [
        f"left out, {printable(why)}: {some(names, noun=' tensors')}" for why, names in report.left_out.items()
    ]


def written(output: Path | None, size: int | None) -> str:
    """What was written, and its size; None for a dry run."""
    if output is None:
        return "dry run: nothing was written"
    return f"{printable(str(output))}: {file_size(size or 0)}"


def path_or_none(output: Path | None) -> str | None:
    """A path as a JSON value."""
    return None if output is None else str(output)
