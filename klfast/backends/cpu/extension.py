"""Arguments of the C++ extension: tensor descriptors, threads, the tier."""

from __future__ import annotations

from typing import overload

import torch

from klfast.core import forks  # noqa: F401 (forked processes run kernels on one thread)
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/core/dtype.h


def address(tensor: torch.Tensor | None) -> int:
    """Return the address of the first element; 0 for None and for a tensor without elements.

    Raises:
        InvalidInputError: its memory was freed, or never allocated.
    """
    return 0 if tensor is None else tensor.data_ptr() or _nowhere(tensor)


def integers(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return int64 values side by side, as the extension reads them; keep the result until it has."""
    return None if tensor is None else tensor.to(torch.int64).contiguous()


def slots_view(slots: torch.Tensor | None, padding: int) -> tuple[int, int] | None:
    """Return the address of slots as ``integers`` gives them, and padding (csrc/python/slots_caster.h)."""
    return None if slots is None else (address(slots), padding)


@overload
def view(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]: ...
@overload
def view(tensor: torch.Tensor | None) -> tuple[int, int, tuple[int, ...]] | None: ...


def view(tensor: torch.Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """Return the address (see ``address``), element type and strides (csrc/python/view_caster.h)."""
    return (
        None if tensor is None else (tensor.data_ptr() or _nowhere(tensor), DTYPE_CODES[tensor.dtype], tensor.stride())
    )


def _nowhere(tensor: torch.Tensor) -> int:
    if tensor.numel():
        raise InvalidInputError(
            f"a {list(tensor.shape)} tensor has no memory: its storage was freed or never allocated; "
            "pass a tensor with data"
        )
    return 0


def resources() -> tuple[int, int]:
    """Return the number of threads that a kernel may use, and the pinned tier (``pins.cpu_tier_limit``)."""
    return torch.get_num_threads(), pins.cpu_tier_limit()
