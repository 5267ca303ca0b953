"""What the C++ extension is told: tensor descriptors, threads, the tier."""

from __future__ import annotations

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/core/dtype.h


def address(tensor: torch.Tensor | None) -> int:
    """Where the tensor's first element lies; 0 for none and for a tensor without elements.

    Raises:
        InvalidInputError: its memory was freed, or never allocated.
    """
    return 0 if tensor is None else tensor.data_ptr() or _nowhere(tensor)


def view(tensor: torch.Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """Address (as ``address`` gives it), element type and strides (csrc/python/view_caster.h)."""
    return (
        None if tensor is None else (tensor.data_ptr() or _nowhere(tensor), DTYPE_CODES[tensor.dtype], tensor.stride())
    )


def _nowhere(tensor: torch.Tensor) -> int:
    if tensor.numel():
        raise InvalidInputError(
            f"a {list(tensor.shape)} tensor has no memory: its storage was freed or never allocated; pass a tensor with data"
        )
    return 0


def resources() -> tuple[int, int]:
    """Threads that a kernel may use, and the pinned tier (``pins.cpu_tier_limit``)."""
    return torch.get_num_threads(), pins.cpu_tier_limit()
