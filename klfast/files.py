"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
