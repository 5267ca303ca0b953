"""Memory for large results on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections import deque

import torch

_LARGE = 1 << 24  # bytes; the C library reuses smaller blocks by itself
# The last large block freed. No lock: a deque's methods are atomic, so a finalizer may run in the middle of ``_block``,
# and a fork finds it whole.
_kept: deque[mmap.mmap] = deque(maxlen=1)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor on the CPU.

    The C library gives large blocks back to the system at once, and fresh pages cost more than filling them (the logits
    of 1,024 tokens: 0.03 to 0.4 s). So the last large block freed is kept for the next, on huge pages where the system
    has them. Meanwhile it is marked as free (MADV_FREE): the system may reclaim it when memory is short.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return torch.empty(*shape, dtype=dtype)
    block = _block(count * dtype.itemsize)
    buffer = (ctypes.c_char * len(block)).from_buffer(block)
    weakref.finalize(buffer, _keep, block).atexit = False
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def _block(size: int) -> mmap.mmap:
    try:
        block = _kept.pop()
    except IndexError:
        pass
    else:
        if size <= len(block) <= 2 * size:
            return block
        _kept.append(block)
    # Private: a forked process gets its own copy, as with any other memory.
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate a result of {size} bytes") from error
    _advise(block, "MADV_HUGEPAGE")
    return block


def _keep(block: mmap.mmap) -> None:
    _advise(block, "MADV_FREE")
    _kept.append(block)


def _advise(block: mmap.mmap, name: str) -> None:
    """Give the system a hint, where it supports it."""
    if hasattr(mmap, name):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            block.madvise(getattr(mmap, name))
