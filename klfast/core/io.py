"""Atomic writes of files and folders; JSON parsing."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from klfast.core import temporaries
from klfast.core.errors import InvalidInputError

# Errors of renameat2 where exchanging is unsupported; EPERM comes from sandboxes that filter system calls.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def parse_json(text: str | bytes) -> object:
    """Parse JSON; raise ValueError if it is invalid or nested too deeply for Python's parser."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to a temporary beside ``path``, flush it and rename it to ``path``.

    Even if the write is interrupted, ``path`` holds either its old content or all of the new one; the next write
    removes leftovers of a killed one. An existing file keeps its permissions.

    Raises:
        OSError: the folder is missing (FileNotFoundError) or not writable, the disk is full, or ``path`` is not a
            regular file. The error names ``path``.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with file_atomic(path) as beside:
        beside.write_bytes(data)


@contextmanager
def file_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty file beside ``path``, which replaces ``path`` when the block ends without an error.

    Until then ``path`` is unchanged; after an error the new file is removed. Errors and permissions as for
    ``write_atomic``.
    """
    path = _target(path)
    _require_kind(path, stat.S_ISREG)
    temporaries.clear_leftovers(path)
    beside, mode = temporaries.name_beside(path), _mode(path)
    with _naming(beside, path):
        try:
            opener = functools.partial(os.open, mode=0o666 if mode is None else mode)
            with open(beside, "xb", opener=opener):
                if mode is not None:
                    os.chmod(beside, mode)
            yield beside
            _flush(beside)
            os.replace(beside, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside)
        _flush(path.parent)


@contextmanager
def folder_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside ``path``, which replaces ``path`` when the block ends without an error.

    Until then ``path`` is unchanged; after an error the new folder is removed. Files are flushed to disk first. The two
    folders are exchanged in one step where the system supports it (Linux, most file systems). Elsewhere the old one is
    renamed first; if the process dies before the new one follows, ``recover`` and the next write restore the old one.
    The caller decides whether an existing folder may be replaced.

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
            with _staying(beside):
                yield beside
            for entry in [*beside.rglob("*"), beside]:
                _flush(entry)
            _take_place(beside, path)
            _flush(path.parent)
        finally:
            _settle(beside, path)


@contextmanager
def _staying(folder: Path) -> Iterator[None]:
    """Raise FileNotFoundError at the end if the folder was removed; the writers of some files make it again."""
    try:
        handle = os.open(folder, os.O_RDONLY)  # while it is open, no new folder passes for it
    except PermissionError:  # Windows, or permissions without reading
        yield
        return
    try:
        yield
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    finally:
        os.close(handle)


def recover(path: str | os.PathLike[str]) -> None:
    """Restore a folder that a killed ``folder_atomic`` had renamed, if ``path`` does not exist."""
    path = _target(path)
    if not path.exists():
        temporaries.clear_leftovers(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder in one step, as others see it; the next write to ``path`` removes what a kill leaves.

    Raises:
        OSError: it cannot be removed.
    """
    path = _target(path)
    beside = temporaries.name_beside(path)
    os.rename(path, beside)
    temporaries.remove(beside)


def require_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raise the OSError that writing the file (or folder) ``path`` would end in, before the work begins."""
    path = _target(path)
    _require_kind(path, stat.S_ISDIR if folder else stat.S_ISREG)
    beside = temporaries.name_beside(path)
    with _naming(beside, path):
        try:
            os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside)


def require_suffix(path: str | os.PathLike[str], what: str, suffixes: Sequence[str]) -> None:
    """Raise InvalidInputError unless the file's name ends in one of the suffixes; ``what`` names what is written."""
    suffix = Path(path).suffix
    if suffix not in suffixes:
        *most, last = suffixes
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise InvalidInputError(
            f"{what} is written as {wanted}, not {suffix or 'without a suffix'!r}; rename {os.fspath(path)}"
        )


def require_utf8(path: str | os.PathLike[str]) -> None:
    """Raise InvalidInputError if a path is not UTF-8, in which safetensors and tokenizers open files."""
    name = os.fspath(path)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        remedy = (
            "rename it"
            if encoding == "utf-8"
            else f"Python takes paths for {encoding}: set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8"
        )
        raise InvalidInputError(f"the name of {name} is not UTF-8, as models' files need; {remedy}") from None


def _target(path: str | os.PathLike[str]) -> Path:
    """Resolve symlinks: the target is replaced, not the link."""
    return Path(os.path.realpath(path))


def _mode(path: Path) -> int | None:
    """Return the permissions of ``path``, None if it does not exist."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(path.stat().st_mode)
    return None


def _require_kind(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise OSError if ``path`` exists and is of another kind, such as a folder, a device or a pipe for a file."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not is_kind(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENOTDIR if is_kind is stat.S_ISDIR else errno.EINVAL
            raise OSError(code, "it is not a regular file" if code == errno.EINVAL else os.strerror(code), str(path))


@contextmanager
def _naming(beside: Path, path: Path) -> Iterator[None]:
    """Make an OSError name the target, not the temporary beside it, which no longer exists when the error is read."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # NumPy's "4 requested and 0 written"
            raise OSError(errno.EIO, str(error), str(path)) from error
        if error.filename is None:
            error.filename = str(path)
        else:
            error.filename = os.fsdecode(error.filename).replace(str(beside), str(path))
            if error.filename2 is not None:
                error.filename2 = None
        raise


def _take_place(beside: Path, path: Path) -> None:
    """Rename ``beside`` to ``path``; the previous content moves to a temporary name."""
    if not path.exists():
        os.rename(beside, path)
    elif not _exchange(beside, path):
        os.rename(path, temporaries.old_name(beside))
        os.rename(beside, path)


def _settle(beside: Path, path: Path) -> None:
    """Leave one folder, at ``path``. Goes by what is on disk, since an interrupt may come between any two steps."""
    old = temporaries.old_name(beside)
    if old.exists() and not path.exists():
        try:
            os.rename(old, path)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; its old content is now in {old}", str(path)) from error
    temporaries.remove(beside)
    temporaries.remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; return False if the system or file system does not support it."""
    renameat2 = find_renameat2()
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
def find_renameat2() -> Callable[..., int] | None:
    """Return the C library's function that can exchange two names, None where there is none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


def _flush(path: Path) -> None:
    # Not every folder can be opened or flushed.
    ignored = (errno.EINVAL, errno.ENOTSUP, errno.EACCES) if path.is_dir() else ()
    try:
        # Windows flushes only what is open for writing.
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in ignored:
            raise
