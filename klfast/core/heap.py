"""What large tensors free, kept by the process for the next ones."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_MOST = 2**30  # bytes of a block that is kept, and about that much more once it is free
_USUAL = 2**25  # where glibc's thresholds end up by themselves in processes with large tensors; the other is twice that


@contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory until the end, where the C library is glibc; elsewhere do nothing.

    Otherwise blocks of 32 MiB and more go back to the system each time, which clears every page of the next one: a
    fifth of the time of a sweep's suffixes (docs/KERNEL_NOTES.md). At the end free memory goes back to the system, and
    the thresholds are set to where glibc mostly has them by then.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    try:
        libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, _MOST)
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
