"""Writing files and folders so that nobody ever sees half of one; reading JSON."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from klfast.core import temporaries

_NO_EXCHANGE = (
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EPERM,
)  # the last from sandboxes that filter system calls


def parse_json(text: str | bytes) -> object:
    """What a JSON text holds. ValueError if it is not JSON, or nested more deeply than Python's parser can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path``: beside it first, flushed to disk, then renamed over it.

    Whatever stops the write, ``path`` holds either what it held before or all of ``content``; what a killed write leaves
    beside it is removed by the next one. An existing file keeps its permissions.

    Raises:
        OSError: the folder is missing (FileNotFoundError) or cannot be written, the disk is full, ``path`` is not a
            regular file. The error names ``path``.
    """
    path = _target(path)
    _require_kind(path, stat.S_ISREG)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporaries.clear_leftovers(path)
    beside, mode = temporaries.name_beside(path), _mode(path)
    with _naming(beside, path):
        try:
            with open(
                beside, "xb", opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else mode)
            ) as file:
                if mode is not None:
                    os.chmod(beside, mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside)
        _flush(path.parent)


@contextmanager
def folder_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside ``path`` to write into; it takes the place of ``path`` when the block ends without an error.

    What stood at ``path`` stays until then; after an error nothing of the new folder is left. Files are flushed to disk
    first. The two folders change places in one step where the system can do that (Linux, most file systems). Elsewhere
    the old one is renamed first; should the process die before the new one follows, ``recover`` and the next write put
    the old one back. Whether an existing folder may be replaced is for the caller to decide.

    Raises:
        OSError: as for ``write_atomic``.
    """
    path = _target(path)
    _require_kind(path, stat.S_ISDIR)
    temporaries.clear_leftovers(path)
    beside, mode = temporaries.name_beside(path), _mode(path)
    with _naming(beside, path):
        try:
            os.mkdir(beside, 0o777 if mode is None else mode)
            if mode is not None:
                os.chmod(beside, mode)
            yield beside
            for entry in [*beside.rglob("*"), beside]:
                _flush(entry)
            _take_place(beside, path)
            _flush(path.parent)
        finally:
            _settle(beside, path)


def recover(path: str | os.PathLike[str]) -> None:
    """Put back a folder that a killed ``folder_atomic`` had renamed, if nothing stands at ``path``."""
    path = _target(path)
    if not path.exists():
        temporaries.clear_leftovers(path)


def require_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raise, before the work begins, the OSError that writing the file (or the folder) ``path`` would end in."""
    path = _target(path)
    _require_kind(path, stat.S_ISDIR if folder else stat.S_ISREG)
    beside = temporaries.name_beside(path)
    with _naming(beside, path):
        try:
            os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside)


def _target(path: str | os.PathLike[str]) -> Path:
    """What a link points at is replaced, not the link."""
    return Path(os.path.realpath(path))


def _mode(path: Path) -> int | None:
    """The permissions of what exists."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(path.stat().st_mode)
    return None


def _require_kind(path: Path, is_kind) -> None:
    """Raise OSError if something of another kind stands at ``path``: a folder for a file, a device or pipe for either."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not is_kind(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENOTDIR if is_kind is stat.S_ISDIR else errno.EINVAL
            raise OSError(code, "it is not a regular file" if code == errno.EINVAL else os.strerror(code), str(path))


@contextmanager
def _naming(beside: Path, path: Path) -> Iterator[None]:
    """Have an OSError name the target in the place of the temporary beside it, which is gone when the error is read."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        elif error.filename is not None:
            error.filename = os.fsdecode(error.filename).replace(str(beside), str(path))
            if error.filename2 is not None:
                error.filename2 = None
        raise


def _take_place(beside: Path, path: Path) -> None:
    """Rename ``beside`` to ``path``; what stood there then stands under one of the temporary names."""
    if not path.exists():
        os.rename(beside, path)
    elif not _exchange(beside, path):
        os.rename(path, temporaries.old_name(beside))
        os.rename(beside, path)


def _settle(beside: Path, path: Path) -> None:
    """Leave one folder, at ``path``. What is on disk decides, since an interrupt may come between any two steps."""
    old = temporaries.old_name(beside)
    if old.exists() and not path.exists():
        try:
            os.rename(old, path)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; what stood there is now in {old}", str(path)) from error
    temporaries.remove(beside)
    temporaries.remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


@functools.cache
def _renameat2():
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


def _flush(path: Path) -> None:
    passes = (
        (errno.EINVAL, errno.ENOTSUP, errno.EACCES) if path.is_dir() else ()
    )  # not every folder can be opened or flushed
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in passes:
            raise
