"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.dispatch.arguments import RmsNorm


def rms_norm(a: RmsNorm) -> torch.Tensor:
    """Return weight v / sqrt(mean(v^2) + eps), v = x silu(gate), x [A, B, D]; the mean is over group_size channels."""
    v, gate = a.x.float(), None
    if a.gate is not None:
        gate = a.gate.float().sigmoid() if a.sigmoid_gate else F.silu(a.gate.float())
        if not a.norm_before_gate:
            v, gate = v * gate, None
    grouped = v.unflatten(-1, (-1, a.group_size))
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + a.eps)
    y = normed.flatten(-2) * (a.weight.float() + a.weight_offset)
    return (y if gate is None else y * gate).to(torch.promote_types(a.x.dtype, a.weight.dtype))
