"""Names for what is written beside a target before it is complete, and the removal of what killed runs left behind.

``.NAME.MACHINE-PID-START-RANDOM.tmp`` becomes NAME when it is complete; ``.old`` is what NAME held before. The name says
which process made it, so that a later run can tell whether that process is gone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

NEW, OLD = "tmp", "old"
_MARK = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{16}\.(tmp|old)")
_FOREIGN_SECONDS = (
    24 * 3600
)  # processes of other machines cannot be seen, so only what is as old as this counts as left behind


def name_beside(target: Path) -> Path:
    """A new name beside ``target`` that belongs to this process."""
    pid = os.getpid()
    return target.with_name(f"{_prefix(target)}.{_machine()}-{pid}-{_start(pid) or 0}-{secrets.token_hex(8)}.{NEW}")


def old_name(beside: Path) -> Path:
    """Where the target stands while ``beside`` takes its place."""
    return beside.with_suffix(f".{OLD}")


def clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside ``target``; put its old content back if it was moved away and nothing followed.

    Whatever belongs to a process that may still be at work stays. A folder that cannot be searched or changed is left as
    it is: the write that follows tells why.
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
    """The target's name with a dot before it; a digest of a name so long that nothing could be appended."""
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
    """Whether the process may still run. In doubt it does."""
    if os.name != "posix":  # elsewhere os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it belongs to somebody else
    found = _start(pid)
    return found is None or not start or found == start


def _start(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _machine() -> str:
    """What tells this machine, its present start and this container's process numbers from others."""
    parts = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(read().strip())
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()[:8]
