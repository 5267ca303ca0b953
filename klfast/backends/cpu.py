"""CPU kernels: hands the addresses, shapes and strides of checked tensors to the C++ extension."""

from __future__ import annotations

import torch

from klfast import _C, ops, runtime
from klfast.backends import cpu_divergence, cpu_ssm

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/numeric.h


def register() -> None:
    """Register every CPU kernel with its op."""
    cpu_divergence.register()
    cpu_ssm.register()
