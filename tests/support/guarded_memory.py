"""Tensors that end where readable memory ends, so that an overrun of one byte kills the test run."""

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy whose last byte is the last of a page, followed by an inaccessible page."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page)
    region = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if _libc.mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size)
    return copy.view(tensor.shape).copy_(tensor)
