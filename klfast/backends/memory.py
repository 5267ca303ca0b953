"""What the C++ extension is told of a tensor."""

from __future__ import annotations

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/numeric.h


def address(tensor: torch.Tensor | None) -> int:
    """Where the tensor's first element lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
