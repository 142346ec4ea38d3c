"""Selecting tensors by regexes on their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from shira_format.errors import SourceError

NOT_CHOSEN = "by --include and --exclude"  # a reason to leave out names


def name_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """A test for names: some regex of ``include`` is found in it (if there are any), and none of ``exclude``.

    Raises:
        SourceError: not a regular expression.
    """
    try:
        wanted, unwanted = [re.compile(p) for p in include], [re.compile(p) for p in exclude]
    except re.error as error:
        raise SourceError(f"not a regular expression: {error.pattern!r}: {error}") from None
    return lambda name: (
        (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    )
