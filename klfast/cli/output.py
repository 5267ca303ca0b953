"""Standard output and error of the process: letters that they cannot show, and writes that fail."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def run(command: Callable[[], None]) -> None:
    """Run a command and exit with its code; no failed write ends in a traceback.

    An error that klfast does not know keeps its traceback, and a line asks for a report.
    """
    _make_writable()
    try:
        command()
        code = 0
    except SystemExit as end:
        code = end.code
    except OSError as error:  # help that cannot be written
        code = _fail(f"cannot write to standard output: {error}")
    except Exception:
        traceback.print_exc()
        code = _fail("this error is new to klfast; please report it with the lines above and what `klfast doctor` says")
    sys.exit(_flushed(code))


def _make_writable() -> None:
    """Closed streams lead nowhere, and letters that an encoding lacks are written as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _flushed(code: object) -> object:
    """The exit code, after what is still to be written: Python itself would end with a traceback and code 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and not code:  # of an earlier failure there is a line
            _fail(f"cannot write to standard output: {error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _fail(message: str) -> int:
    print(f"klfast: {message}", file=sys.stderr)
    return 1
