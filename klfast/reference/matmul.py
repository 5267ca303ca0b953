"""Products with a quantized or a dense weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor


def dequant_matmul(
    x: torch.Tensor, qt: QuantizedTensor, bias: torch.Tensor | None = None, activation: str = "exact"
) -> torch.Tensor:
    """Multiply x [..., K] by the dequantized [N, K], plus bias [N]: [..., N] in x's dtype, accumulated in float32.

    "int8" first rounds x per row and group of the weight: x ~ q * s with s = max|x| / 127 and q = round(x / s).
    """
    x32 = x.float()
    if activation == "int8":
        x32 = fake_quantize_rows(x32, qt.spec)
    y = x32 @ qt.dequantize(torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Multiply x [..., K] by weight [N, K], plus bias [N], in float32; round to x's dtype, then to ``dtype``."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype).to(dtype or x.dtype)


def fake_quantize_rows(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Round float32 [..., K] to int8 per row and group, symmetric, and multiply the scale back in."""
    k = x.shape[-1]
    length = spec.group_length(k)
    groups = F.pad(x, (0, -k % length)).unflatten(-1, (-1, length)) if k else x.unsqueeze(-2)
    scale = groups.abs().amax(-1, keepdim=True) / 127 if k else groups
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0)  # below it, 1 / scale overflows
    return ((groups * inverse).round().clamp(-127, 127) * scale).flatten(-2)[..., :k]
