"""softmax(scale q k^T) v with one query per head: a pass over the keys, in parts if there are too few heads.

A program takes one head and a part of the keys, a block at a time; heads that share keys and values find them in cache.
Sums run elementwise over blocks of keys, relative to the largest score so far, and across threads once at the end.
"""

from __future__ import annotations

import torch
from klfast.kernels.launch import Launch, cdiv, power_of_2, strided

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["keys", "part_keys"])  # they grow with each token, which must not trigger a compilation
def decode_attention(
    q_ptr,  # float [B, H, Dk]
    k_ptr,  # float [B, G, S, Dk]
    v_ptr,  # float [B, G, S, Dv]
    y_ptr,  # [B, H, Dv], contiguous; with parts float32 [B, H, parts, Dv], relative to e^peak
    stats_ptr,  # float32 [B, H, parts, 2]: peak and the sum of weights; None without parts
    scale,
    heads,
    shared_by,
    keys,
    key_dim,
    value_dim,
    part_keys,
    q_b,
    q_h,
    q_d,
    k_b,
    k_g,
    k_s,
    k_d,
    v_b,
    v_g,
    v_s,
    v_d,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Attend to one part of the keys with one query head."""
    i_head, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_head // heads, i_head % heads
    i_g = i_h // shared_by
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = (o_k < key_dim)[None, :], (o_v < value_dim)[None, :]
    q = (
        tl.load(q_ptr + i_b * q_b + i_h * q_h + o_k[None, :] * q_d, mask=m_k, other=0.0).to(tl.float32) * scale
    )  # [1, BK]
    p_k = k_ptr + i_b * k_b + i_g * k_g + o_k[None, :] * k_d
    p_v = v_ptr + i_b * v_b + i_g * v_g + o_v[None, :] * v_d
    first = i_part * part_keys
    last = tl.minimum(first + part_keys, keys)
    peak = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((BS,), tl.float32)
    acc = tl.zeros((BS, BV), tl.float32)
    for start in range(first, last, BS):
        o_s = tl.minimum(start + tl.arange(0, BS), last - 1).to(tl.int64)[:, None]
        valid = start + tl.arange(0, BS) < last
        b_k = tl.load(p_k + o_s * k_s, mask=m_k, other=0.0).to(tl.float32)  # [BS, BK]
        b_v = tl.load(p_v + o_s * v_s, mask=m_v, other=0.0).to(tl.float32)  # [BS, BV]
        score = tl.where(valid, tl.sum(b_k * q, axis=1), -float("inf"))
        top = tl.maximum(peak, tl.max(score, axis=0))
        shrink, weight = tl.exp(peak - top), tl.exp(score - top)
        peak = top
        total = total * shrink + weight
        acc = acc * shrink + tl.where(valid[:, None], weight[:, None] * b_v, 0.0)
    y = tl.sum(acc, axis=0)
    i_out = i_head * tl.num_programs(1) + i_part
    if stats_ptr is None:
        y /= tl.sum(total, axis=0)
    else:
        tl.store(stats_ptr + 2 * i_out, peak)
        tl.store(stats_ptr + 2 * i_out + 1, tl.sum(total, axis=0))
    tl.store(y_ptr + i_out * value_dim + o_v, y.to(y_ptr.dtype.element_ty), mask=o_v < value_dim)


@triton.jit(do_not_specialize=["parts"])
def combine_parts(part_ptr, stats_ptr, y_ptr, parts, value_dim, BP: tl.constexpr, BV: tl.constexpr):
    """Combine the results of ``decode_attention`` for up to BP parts of the keys into y [B, H, Dv]."""
    i_head = tl.program_id(0).to(tl.int64)
    o_p, o_v = tl.arange(0, BP), tl.program_id(1) * BV + tl.arange(0, BV)
    m_p, m_v = o_p < parts, o_v < value_dim
    p_stats = stats_ptr + 2 * (i_head * parts + o_p)
    peak = tl.load(p_stats, mask=m_p, other=-float("inf"))
    share = tl.where(m_p, tl.exp(peak - tl.max(peak, axis=0)), 0.0)
    share /= tl.sum(share * tl.load(p_stats + 1, mask=m_p, other=0.0), axis=0)
    b_part = tl.load(
        part_ptr + (i_head * parts + o_p)[:, None] * value_dim + o_v[None, :],
        mask=m_p[:, None] & m_v[None, :],
        other=0.0,
    )
    tl.store(
        y_ptr + i_head * value_dim + o_v, tl.sum(share[:, None] * b_part, axis=0).to(y_ptr.dtype.element_ty), mask=m_v
    )


DIMS = {"q": "bhd", "k": "bgsd", "v": "bgsd"}
SMALLEST_PART = 128
MOST_PARTS = 32


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, scale: float, *, cores: int
) -> list[Launch]:
    """Return the launches for q [B, H, Dk], k [B, G, S, Dk] and v [B, G, S, Dv], any strides, and contiguous y."""
    (batch, heads, key_dim), (groups, keys), value_dim = q.shape, k.shape[1:3], v.shape[-1]
    parts = max(1, min(cdiv(keys, SMALLEST_PART), cdiv(4 * cores, max(batch * heads, 1)), MOST_PARTS))
    part_keys = cdiv(keys, parts)
    parts = cdiv(keys, part_keys)
    out, stats = y, None
    if parts > 1:
        out = torch.empty(batch, heads, parts, value_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(batch, heads, parts, 2, dtype=torch.float32, device=q.device)
    BK, BV = power_of_2(key_dim), power_of_2(value_dim)
    args = strided(DIMS, q=q, k=k, v=v) | dict(
        y_ptr=out,
        stats_ptr=stats,
        scale=scale,
        heads=heads,
        shared_by=heads // groups,
        keys=keys,
        key_dim=key_dim,
        value_dim=value_dim,
        part_keys=part_keys,
        BS=max(1, min(64, 2048 // max(BK, BV))),
        BK=BK,
        BV=BV,
    )
    launches = [Launch(decode_attention, (batch * heads, parts), args, dict(num_warps=8))]
    if parts > 1:
        args = dict(
            part_ptr=out,
            stats_ptr=stats,
            y_ptr=y,
            parts=parts,
            value_dim=value_dim,
            BP=power_of_2(MOST_PARTS),
            BV=min(BV, 64),
        )
        launches.append(Launch(combine_parts, (batch * heads, cdiv(value_dim, args["BV"])), args, dict(num_warps=4)))
    return launches
