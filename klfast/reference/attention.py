"""Attention of one query per head over a cache."""

from __future__ import annotations

import torch


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend with q [B, H, Dk] to k [B, G, S, Dk] and v [B, G, S, Dv]: [B, H, Dv], computed in float32."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # [B, G, H / G, Dk]
    weights = (scale * grouped @ k.float().transpose(-1, -2)).softmax(-1)
    return (weights @ v.float()).flatten(1, 2).to(q.dtype)
