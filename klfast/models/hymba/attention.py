"""The attention branch: rotary positions, masks, and grouped attention with values wider than keys.

Positions count the memory tokens, which hold 0..M-1; the first token of the text is at M. A negative position is
padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from klfast import ops
from klfast.dispatch import registry
from klfast.models.hymba.configuration import HymbaConfig


def rotary_tables(
    config: HymbaConfig, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return cos and sin [B, 1, L, key_dim] of positions [B, L], computed in float32; None without rotation."""
    if not config.rope:
        return None
    # Computed from the configuration at each call: transformers does not restore a buffer that no file holds.
    exponents = torch.arange(0, config.key_dim, 2, device=positions.device).float() / config.key_dim
    angles = positions[:, None, :, None].float() * (1.0 / config.rope_base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Rotate queries or keys [B, heads, L, key_dim] by their positions, first half against second half."""
    if tables is None:
        return x
    cos, sin = (table.to(x.dtype) for table in tables)  # autocast may compute x in another dtype than the model's
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def visible(queries: torch.Tensor, keys: torch.Tensor, memory: int, window: int | None) -> torch.Tensor:
    """Return which keys each query sees, bool [B, 1, Q, K], from positions [B, Q] and [B, K].

    Text sees itself and everything before it; with a window, only the memory tokens and at most ``window`` positions
    back. Padding sees only itself, so that its rows stay finite.
    """
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    seen = (k <= q) & (k >= 0)
    if window is not None:
        seen &= (q - k <= window) | (k < memory)
    return seen | ((q < 0) & (k == q))


_Block = tuple[int, int, int, torch.Tensor]


@dataclass(frozen=True)
class Blocks:
    """A long windowed prefill, cut into blocks of queries: time and memory grow with L * window, not with L^2.

    Attributes:
        memory: number of memory tokens, which every block sees.
        parts: for each block (start, stop, first, mask): its queries are start..stop, its keys the memory tokens and
            first..stop, and mask [1, 1, stop - start, keys] tells which of them each query sees.
    """

    memory: int
    parts: tuple[_Block, ...]

    @staticmethod
    def of(length: int, memory: int, window: int, device: torch.device) -> Blocks:
        """Cut a prefill of ``length`` positions, memory tokens included."""
        size = max(window // 2, _SMALLEST_BLOCK)
        parts: list[_Block] = []
        repeated: torch.Tensor | None = None
        positions = torch.arange(length, device=device).unsqueeze(0)
        for start in range(0, length, size):
            stop, first = min(start + size, length), max(start - window, memory)
            mask = repeated if stop - start == size else None
            if mask is None:
                keys = torch.cat((positions[:, :memory], positions[:, first:stop]), dim=1)
                mask = visible(positions[:, start:stop], keys, memory, window)
                if first > memory:
                    repeated = mask  # later whole blocks differ from this one only by a shift
            parts.append((start, stop, first, mask))
        return Blocks(memory, tuple(parts))


_SMALLEST_BLOCK = 128

Mask = torch.Tensor | Blocks | None


def attention_mask(queries: torch.Tensor, keys: torch.Tensor, memory: int, window: int | None, padded: bool) -> Mask:
    """Return which keys each query sees: bool [B, 1, Q, K], blocks of a window, or None for all keys up to the query's.

    Without padding, keys are in the order of their positions, and the cache of a windowed layer holds only keys that
    its next query sees.
    """
    length = queries.shape[1]
    if not padded and length == 1:
        return None
    if padded or keys.shape[1] > length:
        return visible(queries, keys, memory, window)
    if window is None or length <= memory + window + 1:
        return None
    return Blocks.of(length, memory, window, queries.device)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Compute softmax(q k^T / sqrt(key_dim)) v for each query head; return [B, Q, heads * value_dim].

    Args:
        q: [B, heads, Q, key_dim].
        k: [B, kv_heads, K, key_dim]; query head j takes head j // (heads / kv_heads).
        v: [B, kv_heads, K, value_dim].
        mask: from ``attention_mask``.
    """
    batch, heads, length, key_dim = q.shape
    groups, value_dim = k.shape[1], v.shape[-1]
    scale = key_dim**-0.5
    if length == 1:
        has_kernel = q.is_cpu or registry.has_kernel("decode_attention", q.device.type.upper())
        if mask is None and has_kernel and not torch.is_grad_enabled():
            return ops.decode_attention(q.squeeze(2), k, v, scale).reshape(batch, 1, heads * value_dim)
        assert not isinstance(mask, Blocks)  # they are for more than one query
        # A group's query heads become queries of one head, so that no key is copied.
        q = q.reshape(batch, groups, heads // groups, key_dim)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(batch, 1, heads * value_dim)
    if value_dim > key_dim:  # torch's fast kernels need equal widths; zeros add nothing to a product
        q, k = (F.pad(t, (0, value_dim - key_dim)) for t in (q, k))
    if isinstance(mask, Blocks):
        out = torch.cat([_attend_block(q, k, v, mask.memory, part, scale) for part in mask.parts], dim=2)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, length, heads * value_dim)


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, memory: int, part: _Block, scale: float
) -> torch.Tensor:
    start, stop, first, mask = part
    if first == memory:
        k, v = k[:, :, :stop], v[:, :, :stop]
    else:
        k, v = (torch.cat((t[:, :, :memory], t[:, :, first:stop]), dim=2) for t in (k, v))
    return F.scaled_dot_product_attention(q[:, :, start:stop], k, v, mask, scale=scale, enable_gqa=True)
