"""Exit codes, and known errors as one line on stderr."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from shira_format._core.text import brief
from shira_format.errors import ShiraError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEBUG = "SHIRA_DEBUG"


def guarded(prog: str, command: Callable[[], int], *, failed: int = EXIT_FAILED) -> int:
    """Run a command; a known error becomes one line on stderr and the exit code ``failed``, Ctrl-C and SIGTERM become 130.

    With the environment variable SHIRA_DEBUG set, the error is raised with its traceback instead.
    """
    _terminate_like_interrupt()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        return _fail(prog, f"interrupted; {str(interrupt) or 'nothing was written'}", EXIT_INTERRUPTED)
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
    """Print an error as one line on stderr."""
    print(f"{prog}: error: {brief(message)}", file=sys.stderr)


def _terminate_like_interrupt() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that temporary files are removed."""

    def stop(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # no other may set a handler
        signal.signal(signal.SIGTERM, stop)
