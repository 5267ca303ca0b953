"""Names of temporaries beside a target, and the removal of those that killed runs left behind.

``.NAME.MACHINE-PID-START-RANDOM.tmp`` becomes NAME when complete; ``.old`` is the previous NAME. The name identifies
the process that made it, so that a later run can tell whether that process is gone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

NEW, OLD = "tmp", "old"
_MARK = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{16}\.(tmp|old)")
_FOREIGN_SECONDS = 24 * 3600  # other machines' processes cannot be seen: only temporaries this old count as left behind


def name_beside(target: Path) -> Path:
    """Return a new name beside ``target`` that belongs to this process."""
    pid = os.getpid()
    return target.with_name(f"{_prefix(target)}.{_machine()}-{pid}-{start_time(pid) or 0}-{secrets.token_hex(8)}.{NEW}")


def old_name(beside: Path) -> Path:
    """Return the target's name while ``beside`` takes its place."""
    return beside.with_suffix(f".{OLD}")


def scratch_folder(name: str) -> Path:
    """Make a folder for this process where ``tempfile`` would; remove those that killed ones left under the name."""
    target = Path(tempfile.gettempdir(), name)
    clear_leftovers(target)
    folder = name_beside(target)
    folder.mkdir(0o700)
    return folder


def clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside ``target``; restore its old content if it was moved away but not replaced.

    Temporaries of processes that may still be running stay. A folder that cannot be listed or changed is left as it is:
    the write that follows reports why.
    """
    with suppress(OSError):
        left = [target.with_name(entry) for entry in os.listdir(target.parent) if _is_left(target, entry)]
        for path in left:
            if path.suffix == f".{OLD}" and not os.path.lexists(target):
                os.rename(path, target)
        for path in left:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _prefix(target: Path) -> str:
    """Return the target's name after a dot, or a digest of it if it is too long to append to."""
    name = os.fsencode(target.name)
    return f".{target.name}" if len(name) <= 160 else f".{hashlib.sha256(name).hexdigest()[:32]}"


def _is_left(target: Path, entry: str) -> bool:
    prefix = _prefix(target)
    mark = _MARK.fullmatch(entry[len(prefix) :]) if entry.startswith(prefix) else None
    if mark is None:
        return False
    if mark[1] == _machine():
        return not _is_alive(int(mark[2]), int(mark[3]))
    return time.time() - _last_change(target.with_name(entry)) > _FOREIGN_SECONDS


def _last_change(path: Path) -> float:
    times = [path.lstat().st_mtime]
    for folder, _, files in os.walk(path):
        times += [os.lstat(os.path.join(folder, name)).st_mtime for name in [".", *files]]
    return max(times)


def _is_alive(pid: int, start: int) -> bool:
    """Return False if the process has certainly ended."""
    if os.name != "posix":  # elsewhere os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it belongs to another user
    found = start_time(pid)
    return found is None or not start or found == start


def start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot, None where the system does not report it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _machine() -> str:
    """Return an identifier of this machine, its current boot and this container's process numbers."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()[:8]
