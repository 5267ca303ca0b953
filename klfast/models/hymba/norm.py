"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import nn

from klfast import ops
from klfast.dispatch import registry
from klfast.nn import direct_call


class HymbaRMSNorm(nn.Module):
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32; x's shape and dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., size]."""
        gradients = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not gradients and (x.is_cpu or registry.has_kernel("rms_norm", x.device.type.upper())):
            y = direct_call.rms_norm(x, self.weight, self.eps)
            return (ops.rms_norm(x, self.weight, eps=self.eps) if y is None else y).to(x.dtype)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
