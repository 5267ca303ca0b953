"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.dispatch.arguments import RmsNorm


def rms_norm(a: RmsNorm) -> torch.Tensor:
    """Return weight v / sqrt(mean(v^2) + eps), v = x silu(gate), x [A, B, D]; the mean is over group_size channels."""
    v = a.x.float() if a.gate is None else a.x.float() * F.silu(a.gate.float())
    grouped = v.unflatten(-1, (-1, a.group_size))
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + a.eps)
    return (normed.flatten(-2) * a.weight.float()).to(torch.promote_types(a.x.dtype, a.weight.dtype))
