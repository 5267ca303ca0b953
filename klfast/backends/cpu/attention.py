"""Attention of one query per head over a cache, by the C++ extension."""

from __future__ import annotations

import torch

from klfast import _C
from klfast.backends.cpu.extension import resources, view
from klfast.dispatch.arguments import DecodeAttention


def decode_attention(a: DecodeAttention) -> torch.Tensor:
    """Attend in q's dtype."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (a.q, a.k, a.v))
    (batch, heads, key_dim), (groups, keys), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    out = q.new_empty(batch, heads, value_dim)
    _C.decode_attention(
        *map(view, (q, k, v, out)), batch, heads, groups, keys, key_dim, value_dim, a.scale, *resources()
    )
    return out
