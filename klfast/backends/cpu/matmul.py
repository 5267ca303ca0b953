"""CPU kernels: hands the addresses, shapes and strides of checked tensors to the C++ extension."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast import _C
from klfast.backends.cpu import divergence as cpu_divergence
from klfast.backends.cpu import ssm as cpu_ssm
from klfast.backends.cpu.memory import empty, view
from klfast.backends.cpu.products import dequant_matmul_into, linear_into
from klfast.backends.operands import FEW_ROWS
from klfast.dispatch import pins, registry
from klfast.quant.layouts import parts_in
from klfast.quant.types import Layout

RELAID = "the weight is in a layout for GPUs; convert it once with .to_layout."


def dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    if layout != "plain":
        pins.slow_path("dequant_matmul", list(x.shape), RELAID, how="with another pass over the weight")
        packed, scale, zero_point = parts_in(Layout.PLAIN, packed, scale, zero_point, n, k, bits, group_size, layout)
    y = x.new_empty((*x.shape[:-1], n))
    dequant_matmul_into(y, x, packed, scale, zero_point, bias, k, bits, group_size, activation)
    return y


def why_torch_multiplies(x, weight=None, bias=None, dtype=None):
    """Why ``linear`` takes torch's own product, with a conversion after it; empty if its kernel is faster (docs/KERNEL_NOTES.md).

    torch is faster in float32, and for many rows of what the CPU multiplies natively: 16-bit types on AMX, bfloat16 by
    AVX-512-BF16 unless the result is wider. Without such instructions torch is several times slower; and so it is
    for few rows of 16-bit types.
    """
    if pins.pinned() in pins.CPU_TIERS:
        return ""
    if x.dtype == torch.float32:
        return "torch's own product is faster in float32."
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return ""
    if not pins.why_not("amx"):
        return "torch's own product is faster for many rows where the CPU has AMX."
    if x.dtype == torch.bfloat16 == (dtype or x.dtype) and not pins.why_not("avx512bf16"):
        return "torch's own product is faster for many rows of bfloat16 where the CPU has AVX-512-BF16."
    return ""


def linear(x, weight, bias, dtype):
    n = weight.shape[0]
    dtype = dtype or x.dtype
    if why_torch_multiplies(x, weight, bias, dtype):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)
    y = empty(*x.shape[:-1], n, dtype=dtype)
    linear_into(y, x, weight, bias, rounded_to=x.dtype)
    return y


def decode_attention(q, k, v, scale):
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, key_dim), (groups, keys), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    out = q.new_empty(batch, heads, value_dim)
    _C.decode_attention(
        *map(view, (q, k, v, out)),
        batch,
        heads,
        groups,
        keys,
        key_dim,
        value_dim,
        scale,
        torch.get_num_threads(),
        pins.cpu_tier_limit(),
    )
    return out


def register() -> None:
    """Register every CPU kernel with its op."""
    registry.register_kernel("dequant_matmul", "CPU", dequant_matmul)
    registry.register_kernel("linear", "CPU", linear, handed_over=why_torch_multiplies)
    registry.register_kernel("decode_attention", "CPU", decode_attention)
    cpu_divergence.register()
    cpu_ssm.register()
