"""Attention of one query a head on a cache, in Triton."""

from __future__ import annotations

import torch


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from klfast.kernels import decode_attention as kernel
    from klfast.kernels.launch import cores

    y = q.new_empty(*q.shape[:2], v.shape[-1])
    if y.numel():
        for launch in kernel.plan(q.detach(), k.detach(), v.detach(), y, scale, cores=cores(q.device)):
            launch.run()
    return y
