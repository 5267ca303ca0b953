"""Values of a few bits in int32 words, and the float matrix that a quantized tensor stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.quant.types import Layout, QuantizedTensor


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Signed values of int32 [R, ceil(count * bits / 32)]: int8 [R, count] (q - q_min is stored, low bits first)."""
    rows, columns = words.shape
    stored = words.reshape(-1).view(torch.uint8).view(rows, 4 * columns)
    if bits == 4:
        stored = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(-2)
    return (stored[:, :count].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``unpack``: int8 [R, C] to int32 [R, ceil(C * bits / 32)], unused high bits zero."""
    stored = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    stored = F.pad(stored, (0, -stored.shape[1] % (32 // bits)))
    if bits == 4:
        stored = stored[:, 0::2] | (stored[:, 1::2] << 4)
    rows, columns = stored.shape
    return stored.reshape(-1).view(torch.int32).view(rows, columns // 4)


def dequantize(qt: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(q - zero_point) * scale as [N, K], computed in ``dtype`` (the scale's by default)."""
    qt = qt.to_layout(Layout.PLAIN)
    dtype = dtype or qt.scale.dtype
    n, k = qt.shape
    length = qt.spec.group_length(k)
    values = unpack(qt.packed, qt.spec.bits, k).to(dtype)
    if qt.zero_point is not None:
        zero_point = unpack(qt.zero_point.T, qt.spec.bits, n).T.to(dtype)
        values = values - zero_point.repeat_interleave(length, 1)[:, :k]
    return values * qt.scale.to(dtype).repeat_interleave(length, 1)[:, :k]
