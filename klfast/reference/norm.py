"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x, weight, gate, eps, group_size):
    """weight v / sqrt(mean(v^2) + eps) for v = x silu(gate), x [A, B, D]; the mean over each group of group_size channels."""
    v = x.float() if gate is None else x.float() * F.silu(gate.float())
    grouped = v.unflatten(-1, (-1, group_size))
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.float()).to(torch.promote_types(x.dtype, weight.dtype))
