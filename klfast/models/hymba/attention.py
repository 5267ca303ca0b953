"""The attention branch: rotary positions, who sees whom, and grouped attention with values wider than keys.

Positions count the memory tokens, which hold 0..M-1; the first token of the text is at M. A negative position is
padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.models.hymba.configuration import HymbaConfig


def rotary_tables(config: HymbaConfig, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin [B, 1, L, key_dim] of the positions [B, L], computed in float32; None for a model without rotation."""
    if not config.rope:
        return None
    # From the configuration at each call: transformers does not restore a buffer that no file holds.
    exponents = torch.arange(0, config.key_dim, 2, device=positions.device).float() / config.key_dim
    angles = positions[:, None, :, None].float() * (1.0 / config.rope_base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Queries or keys [B, heads, L, key_dim] turned by their positions, first half against second half."""
    if tables is None:
        return x
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def visible(queries: torch.Tensor, keys: torch.Tensor, memory: int, window: int | None) -> torch.Tensor:
    """Which keys each query sees, bool [B, 1, Q, K], from positions [B, Q] and [B, K].

    Text sees what is not after it and, with a window, no more than ``window`` positions back or among the memory
    tokens. Padding sees itself alone, so that its rows stay finite.
    """
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    seen = (k <= q) & (k >= 0)
    if window is not None:
        seen &= (q - k <= window) | (k < memory)
    return seen | ((q < 0) & (k == q))


def attention_mask(queries: torch.Tensor, keys: torch.Tensor, memory: int, window: int | None, padded: bool) -> torch.Tensor | None:
    """``visible``, or None where that is every key up to the query's own place.

    Without padding, keys lie in the order of their positions, and a cache of a windowed layer holds no key that its
    next query does not see.
    """
    length = queries.shape[1]
    prefill = keys.shape[1] == length
    if not padded and (length == 1 or (prefill and (window is None or length <= memory + window + 1))):
        return None
    return visible(queries, keys, memory, window)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(key_dim)) v for each query head, heads side by side: [B, Q, heads * value_dim].

    Args:
        q: [B, heads, Q, key_dim].
        k, v: [B, kv_heads, K, key_dim] and [B, kv_heads, K, value_dim]; query head j takes head j // (heads / kv_heads).
        mask: bool, from ``attention_mask``.
    """
    batch, heads, length, key_dim = q.shape
    groups, value_dim = k.shape[1], v.shape[-1]
    if length == 1:  # the query heads of a group are queries of one head, and no key is copied
        q = q.view(batch, groups, heads // groups, key_dim)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=key_dim**-0.5).reshape(batch, 1, heads * value_dim)
    if value_dim > key_dim:  # the fast kernels want equal widths; zeros add nothing to a product
        q, k = (F.pad(t, (0, value_dim - key_dim)) for t in (q, k))
    causal = mask is None
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=key_dim**-0.5, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, length, heads * value_dim)
