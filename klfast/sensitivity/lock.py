"""One sweep at a time on a resume file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from klfast.core.errors import InvalidInputError

try:
    import fcntl
except ImportError:  # a system without it
    fcntl = None


@contextmanager
def held(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of ``path``, a file beside it that is gone afterwards. It ends with the process, even a killed one.

    Raises:
        InvalidInputError: another process holds it.
        OSError: the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    beside = f"{os.fspath(path)}.lock"
    handle = _take(beside, path)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)  # while it is held: see _take
        os.close(handle)


def _take(beside: str, path: str | os.PathLike[str]) -> int:
    while True:
        try:
            handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(beside, handle):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise InvalidInputError(
                f"another sweep is working on {os.fspath(path)}; wait for it, stop it, or name another file"
            ) from None
        except OSError:  # a file system without locks
            return handle
        os.close(handle)  # the lock of a sweep that has just ended, and removed it


def _is_at(path: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
