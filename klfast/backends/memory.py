"""What the C++ extension is told of a tensor, and large tensors made for it."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/numeric.h

_LARGE = 1 << 24  # bytes; smaller blocks the C library reuses by itself
_kept: list[mmap.mmap] = []
_lock = threading.Lock()


def address(tensor: torch.Tensor | None) -> int:
    """Where the tensor's first element lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def view(tensor: torch.Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """Address, element type and strides (csrc/view_caster.h)."""
    return None if tensor is None else (tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride())


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, not initialised.

    The C library gives large blocks back to the system at once, and fresh pages cost more than filling them (the logits of
    1,024 tokens: 0.03 to 0.4 s). So the last large block freed is kept for the next, on large pages, and meanwhile marked
    as free for the system to take (MADV_FREE): it is no burden on a machine short of memory.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return torch.empty(*shape, dtype=dtype)
    block = _block(count * dtype.itemsize)
    buffer = (ctypes.c_char * len(block)).from_buffer(block)
    weakref.finalize(buffer, _keep, block).atexit = False
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def _block(size: int) -> mmap.mmap:
    with _lock:
        if _kept and size <= len(_kept[0]) <= 2 * size:
            return _kept.pop()
    block = mmap.mmap(-1, size)
    _advise(block, "MADV_HUGEPAGE")
    return block


def _keep(block: mmap.mmap) -> None:
    _advise(block, "MADV_FREE")
    with _lock:
        _kept[:] = [block]


def _advise(block: mmap.mmap, name: str) -> None:
    """A hint, for systems that know of it."""
    if hasattr(mmap, name):
        try:
            block.madvise(getattr(mmap, name))
        except OSError:
            pass
