"""Results on stdout, everything else on stderr; and whether a path may be written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_format import ShiraError
from shira_format._core.text import printable

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
            print(printable(message), file=sys.stderr)

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
    print(json.dumps(value, indent=2, ensure_ascii=not unicode, allow_nan=False))


def check_output(path: Path | None, *, force: bool) -> None:
    """Raise ShiraError if the file ``path`` cannot be written, or exists and ``--force`` is missing; None is fine."""
    if path is None:
        return
    if path.is_dir():
        raise ShiraError(f"{path}: is a folder, not a file to write")
    if not path.parent.is_dir():
        raise ShiraError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not force:
        raise ShiraError(f"{path}: exists; --force replaces it")


def check_output_folder(path: Path | None, inputs: Sequence[Path], *, force: bool) -> None:
    """Raise ShiraError if a folder cannot be written at ``path``, or exists and ``--force`` is missing; None is fine.

    A folder that holds an input or the working directory is never replaced.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ShiraError(f"{path}: the folder {path.parent} does not exist")
    if not path.exists():
        return
    if not force:
        raise ShiraError(f"{path}: exists; --force replaces it")
    if not path.is_dir():
        raise ShiraError(f"{path}: is a file, not a folder to write")
    here = path.resolve()
    for other in (Path.cwd(), *(p for p in inputs if isinstance(p, Path))):
        if here == other.resolve() or here in other.resolve().parents:
            raise ShiraError(f"{path}: holds {other}, and is not replaced")
