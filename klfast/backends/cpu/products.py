"""Products by the C++ extension, into a tensor that the caller made."""

from __future__ import annotations

import torch

from klfast import _C
from klfast.backends.cpu.memory import DTYPE_CODES, address
from klfast.dispatch import pins


def dequant_matmul_into(y, x, packed, scale, zero_point, bias, k, bits, group_size, activation="exact"):
    """y [..., N], contiguous, in x's dtype or wider, from x [..., K] and a weight in the plain layout."""
    rows, stride = _rows(x, k)
    packed, scale = packed.contiguous(), scale.contiguous()  # bound to names: they must outlive the call
    zero_point = None if zero_point is None else zero_point.contiguous()
    bias = None if bias is None else bias.contiguous()
    n = y.shape[-1]
    _C.dequant_matmul(
        address(rows),
        DTYPE_CODES[x.dtype],
        stride,
        address(packed),
        address(scale),
        DTYPE_CODES[scale.dtype],
        address(zero_point),
        address(bias),
        DTYPE_CODES[x.dtype if bias is None else bias.dtype],
        address(y),
        DTYPE_CODES[y.dtype],
        y.numel() // max(n, 1),
        n,
        k,
        bits,
        max(1, k if group_size == -1 else min(group_size, k)),
        activation == "int8",
        torch.get_num_threads(),
        pins.cpu_tier_limit(),
    )


def linear_into(y, x, weight, bias=None, *, rounded_to):
    """y [..., N], contiguous, from x [..., K] and weight [N, K]; values are rounded to a dtype no wider than y's."""
    n, k = weight.shape
    rows, stride = _rows(x, k)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _C.linear(
        address(rows),
        DTYPE_CODES[x.dtype],
        stride,
        address(weight),
        DTYPE_CODES[weight.dtype],
        weight.stride(0),
        address(bias),
        DTYPE_CODES[x.dtype if bias is None else bias.dtype],
        address(y),
        DTYPE_CODES[y.dtype],
        DTYPE_CODES[rounded_to],
        y.numel() // max(n, 1),
        n,
        k,
        torch.get_num_threads(),
        pins.cpu_tier_limit(),
    )


def _rows(x, k):
    """x [..., K] with its last dimension contiguous, and the elements from row to row. Quick for what is contiguous."""
    if x.is_contiguous():
        return x, k
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)
