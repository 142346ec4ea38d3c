"""Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shira_format._core.text import brief

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(frozen=True)
class Printer:
    """How a command prints: ``--json`` and ``--quiet``."""

    json: bool
    quiet: bool

    def result(self, as_json: Callable[[], Any], as_text: Callable[[], str]) -> None:
        """Print the result on stdout."""
        if self.json:
            print_json(as_json())
        else:
            print(as_text())

    def notice(self, message: str) -> None:
        """Print on stderr what is not the result."""
        if not self.quiet:
            print(brief(message), file=sys.stderr)

    def notes(self, messages: Iterable[str]) -> None:
        """Print each message on stderr after ``note:``."""
        for message in messages:
            self.notice(f"note: {message}")

    def warnings(self, messages: Iterable[str]) -> None:
        """Print each message on stderr after ``warning:``."""
        for message in messages:
            self.notice(f"warning: {message}")

    def bar(self, unit: str, total: int | None = None, *, scale: bool = False) -> tqdm[Any]:
        """A progress bar on stderr, shown only on a terminal."""
        from tqdm import tqdm

        hidden = self.quiet or not sys.stderr.isatty()
        return tqdm(total=total, unit=unit, unit_scale=scale, disable=hidden, leave=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    print(json_text(value, ascii_only=not unicode))


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """JSON in which everything that is not printable is escaped: no name of a stranger moves a cursor or reorders a line.

    Raises:
        ValueError: NaN or infinity.
    """
    text = json.dumps(value, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]  # which takes DEL for printable
