"""Packages that only some users need: whoever lacks one reads how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shira_format.errors import ShiraError, SourceError


@contextmanager
def optional_import(need: str, extra: str, error: type[ShiraError] = SourceError) -> Iterator[None]:
    """Import packages in this block; if one is missing, the message has ``need`` and the extra that brings it.

    Raises:
        SourceError: or ``error``: a package is not installed.

    Example:
        >>> with optional_import("exact ranks need python-flint", "analysis"):
        ...     import flint
    """
    try:
        yield
    except ImportError:
        raise error(f"{need}: pip install 'shira-format[{extra}]'") from None
