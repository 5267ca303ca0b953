"""What the C++ extension is told of a tensor, and tensors made for it."""

from __future__ import annotations

import torch

from klfast import _C

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/numeric.h


def address(tensor: torch.Tensor | None) -> int:
    """Where the tensor's first element lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, not initialised; on large pages from 8 MiB on, where fresh small ones cost more than the arithmetic."""
    out = torch.empty(*shape, dtype=dtype)
    if out.nbytes >= 1 << 23:
        _C.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
