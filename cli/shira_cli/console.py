"""What all commands share: results on stdout, notices on stderr, one line for a known error, exit codes."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shira_format import ShiraError, __version__
from shira_format._core import text

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEBUG = "SHIRA_DEBUG"


def parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser with the example at the end of its help, and the options that every command has."""
    made = argparse.ArgumentParser(
        prog=prog, description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return made


def add_output_options(to: argparse.ArgumentParser) -> None:
    """``--json`` and ``--quiet``."""
    to.add_argument("--json", action="store_true", help="print the result as JSON")
    to.add_argument("--quiet", action="store_true", help="no notices, warnings or progress bars on stderr")


def run(prog: str, command: Callable[[], int], *, failed: int = EXIT_FAILED) -> int:
    """Run a command and turn known errors into one line on stderr and an exit code: ``failed``, or 130 for Ctrl-C.

    With the environment variable SHIRA_DEBUG set, the traceback is shown instead.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail(prog, "interrupted; nothing was written", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed
    except ShiraError as error:
        return _fail(prog, str(error), failed)
    except OSError as error:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = str(error.strerror or error)
        return _fail(prog, f"{names}: {reason}" if names else reason, failed)
    except MemoryError:
        return _fail(prog, "out of memory; nothing was written", failed)
    return code


def _fail(prog: str, message: str, code: int) -> int:
    if os.environ.get(DEBUG):
        raise  # noqa: PLE0704 - called from except blocks only
    complain(prog, message)
    return code


def complain(prog: str, message: str) -> None:
    """Say on stderr, in one line, why there is no result or not the one that was hoped for."""
    print(f"{prog}: error: {text.printable(message)}", file=sys.stderr)


def usage_error(prog: str, message: str) -> NoReturn:
    """End the program as argparse does for a wrong option."""
    print(f"{prog}: error: {message}", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)


def terminate_like_interrupt() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that temporary files go."""

    def stop(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def notice(message: str, *, quiet: bool) -> None:
    """Tell something on stderr that is not the result."""
    if not quiet:
        print(text.printable(message), file=sys.stderr)


def check_output(path: Path, *, force: bool) -> None:
    """Raise ShiraError if ``path`` cannot be written, or exists and ``--force`` is missing."""
    if path.is_dir():
        raise ShiraError(f"{path}: is a folder, not a file to write")
    if not path.parent.is_dir():
        raise ShiraError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not force:
        raise ShiraError(f"{path}: exists; --force replaces it")


def check_output_folder(path: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Raise ShiraError if a folder cannot be written at ``path``, or is there and ``--force`` is missing.

    A folder that holds an input, or the work itself, is never replaced.
    """
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


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode, allow_nan=False))
