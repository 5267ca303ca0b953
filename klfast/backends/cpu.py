"""CPU kernels: hands the addresses, shapes and strides of checked tensors to the C++ extension."""

from __future__ import annotations

import torch

from klfast import _C, ops, runtime
from klfast.backends import cpu_divergence, cpu_ssm
from klfast.backends.memory import DTYPE_CODES, address


def dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    y = x.new_empty((*x.shape[:-1], n))
    rows = x.reshape(-1, k) if k else x.reshape(y.numel() // max(n, 1), 0)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    packed, scale = packed.contiguous(), scale.contiguous()  # bound to names: they must outlive the call
    zero_point = None if zero_point is None else zero_point.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    _C.dequant_matmul(
        address(rows), DTYPE_CODES[x.dtype], rows.stride(0), address(packed), address(scale), DTYPE_CODES[scale.dtype],
        address(zero_point), address(bias), DTYPE_CODES[x.dtype if bias is None else bias.dtype], address(y),
        rows.shape[0], n, k, bits, max(1, k if group_size == -1 else min(group_size, k)), activation == "int8",
        torch.get_num_threads(), runtime.cpu_tier_limit(),
    )
    return y


def register() -> None:
    """Register every CPU kernel with its op."""
    ops.register_kernel("dequant_matmul", "CPU", dequant_matmul)
    cpu_divergence.register()
    cpu_ssm.register()
