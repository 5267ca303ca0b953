"""The float dtypes that klfast computes in, their short names, and tensors as bytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, bfloat16 or float16"  # for messages


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Names of dtypes for a message: "torch.float32 or torch.bfloat16"."""
    return " or ".join(map(str, dtypes))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values, row by row, as uint8 [bytes]; without a copy if it is contiguous."""
    dense = tensor.contiguous()
    # reshape(-1) would keep the stride of a single value, which may be any, and view takes none but 1.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
