"""Standard output and error of the process: characters that they cannot encode, and failing writes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

_Code = str | int | None  # as sys.exit takes it


def run(command: Callable[[], None]) -> None:
    """Run a command and exit with its code; a failed write does not end in a traceback.

    Unexpected errors keep their traceback, with a line that asks for a report.
    """
    _make_writable()
    code: _Code = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # before the command begins
        code = 130
    except OSError as error:  # help that cannot be written
        code = _fail(f"cannot write to standard output: {error}")
    except Exception:  # noqa: BLE001 (the last resort)
        traceback.print_exc()
        code = _fail("unexpected error; please report it with the lines above and the output of `klfast doctor`")
    sys.exit(_flushed(code))


def _make_writable() -> None:
    """Replace closed streams by the null device, and write characters that an encoding lacks as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the life of the process)
        elif stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _flushed(code: _Code) -> _Code:
    """Flush standard output and return the exit code: Python itself would end with a traceback and code 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and not code:  # an earlier failure has printed a line
            _fail(f"cannot write to standard output: {error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _fail(message: str) -> int:
    print(f"klfast: {message}", file=sys.stderr)
    return 1
