"""Lock that lets only one process at a time go on from a resume file or folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from klfast.core.errors import InvalidInputError

try:
    import fcntl
except ImportError:  # not on Windows
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

_LONGEST = 200  # bytes that a lock's file says


@contextmanager
def held(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Hold the lock of ``path``: a file beside it that names this process, removed afterwards. None needs no lock.

    The lock ends with the process, even if it is killed.

    Raises:
        InvalidInputError: another process holds it.
        OSError: the folder cannot be written.
    """
    if path is None or not _HAS_LOCKS:
        yield
        return
    beside = f"{os.fspath(path)}.lock"
    handle = _take(beside, path)
    try:
        with suppress(OSError):  # a full disk
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} on {platform.node()}".encode()[:_LONGEST])
        yield
    finally:
        with suppress(OSError):  # a file that stays is taken over
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
            holder = os.read(handle, _LONGEST).decode(errors="replace")
            os.close(handle)
            raise InvalidInputError(
                f"another process{holder and f' ({holder})'} is working on {os.fspath(path)}; wait for it, stop it, or "
                "name another file"
            ) from None
        except OSError:  # a file system without locks
            return handle
        os.close(handle)  # the process that held it has just ended and removed the file


def _is_at(path: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
