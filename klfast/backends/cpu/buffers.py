"""Memory for large results on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections import deque

import torch

# A forked process gets its own copy, as with any other memory. Windows has neither forks nor these flags.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_LARGE = 1 << 24  # bytes; the C library reuses smaller blocks by itself
# The last large block freed. No lock: a deque's methods are atomic, so a finalizer may run in the middle of ``take``,
# and a fork finds it whole.
kept: deque[mmap.mmap] = deque(maxlen=1)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor on the CPU.

    The C library gives large blocks back to the system at once, and fresh pages cost more than filling them (the logits
    of 1,024 tokens: 0.03 to 0.4 s). So the last large block freed is kept for the next, on huge pages where the system
    has them. Meanwhile it is marked as free (MADV_FREE): the system may reclaim it when memory is short.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return torch.empty(*shape, dtype=dtype)
    block = take(count * dtype.itemsize)
    buffer = (ctypes.c_char * len(block)).from_buffer(block)
    weakref.finalize(buffer, keep, block).atexit = False
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def take(size: int) -> mmap.mmap:
    """Return a block of at least ``size`` bytes: the one that is kept, unless it is too small or far too large."""
    try:
        block = kept.pop()
    except IndexError:
        pass
    else:
        if size <= len(block) <= 2 * size:
            return block
        kept.append(block)
    try:
        block = mmap.mmap(-1, size, **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"cannot allocate a result of {size} bytes") from error
    advise(block, "MADV_HUGEPAGE")
    return block


def keep(block: mmap.mmap) -> None:
    """Keep a block that is no longer used, instead of the one kept so far."""
    advise(block, "MADV_FREE")
    kept.append(block)


def advise(block: mmap.mmap, name: str) -> None:
    """Give the system a hint, where it supports it."""
    if hasattr(mmap, name):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            block.madvise(getattr(mmap, name))
