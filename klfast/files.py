"""Writing files and folders so that nobody ever sees half of one; reading JSON."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def parse_json(text: str | bytes) -> object:
    """What a JSON text holds. ValueError if it is none, or nested more deeply than Python's parser can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path``: beside it first, flushed to disk, then renamed over it.

    Whatever stops the write, ``path`` holds either what it held before or all of ``content``. An existing file keeps
    its permissions. A missing folder is an error of the caller (FileNotFoundError), as with ``open``.
    """
    path = Path(path)
    if path.is_symlink():  # replace what the link points at, not the link
        path = path.resolve()
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, _mode(path))
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _mode(path: Path) -> int:
    """The permissions of ``path``, or those that a new file gets (mkstemp's own are private)."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


@contextmanager
def folder_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside ``path`` to write into; it takes the place of ``path`` when the block ends without an error.

    What stood at ``path`` stays until then; after an error nothing of the new folder is left. Files are flushed to disk
    first. Whether an existing folder may be replaced is for the caller to decide.
    """
    path = Path(path).resolve()
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = beside.with_suffix(".old")
    try:
        os.chmod(beside, _mode(path) if path.is_dir() else _mode(beside / "new") | 0o111)
        yield beside
        for entry in [*beside.rglob("*"), beside]:
            _flush(entry)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(beside, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
        _flush(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
