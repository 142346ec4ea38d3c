"""Selecting tensors by regexes on their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from shira_format.errors import SourceError

_SHOWN = 200  # characters of a pattern in a message
NOT_CHOSEN = "by --include and --exclude"  # a reason to leave out names


def compiled(text: str, what: str = "") -> re.Pattern[str]:
    """The regular expression ``text`` of a user; messages call it ``what``, such as ``"--layer "``.

    Raises:
        SourceError: it is none, or too large or too deep for ``re``.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise SourceError(f"not a regular expression: {what}{shown!r}: {error}") from None


def name_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """A test for names: some regex of ``include`` is found in it (if there are any), and none of ``exclude``.

    Raises:
        SourceError: not a regular expression.
    """
    wanted, unwanted = [compiled(p) for p in include], [compiled(p) for p in exclude]
    return lambda name: (
        (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    )
