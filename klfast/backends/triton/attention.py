"""Attention of one query per head over a cache, in Triton."""

from __future__ import annotations

import torch

from klfast.dispatch.arguments import DecodeAttention


def decode_attention(a: DecodeAttention) -> torch.Tensor:
    """Attend in q's dtype."""
    from klfast.kernels import decode_attention as kernel
    from klfast.kernels.launch import cores

    y = a.q.new_empty(*a.q.shape[:2], a.v.shape[-1])
    if y.numel():
        for launch in kernel.plan(*(t.detach() for t in a[:3]), y, a.scale, cores=cores(a.q.device)):
            launch.run()
    return y
