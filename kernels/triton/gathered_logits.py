"""gathered_logits: a token's hidden states in S models times a few rows of the head, others for each token.

A program takes one token, BJ of its rows and BS models: the rows come from memory once, and no copy of them is made.
float32 operands are split into three bfloat16 parts, so that no product is rounded.
"""

from __future__ import annotations

import torch
from klfast.kernels.dequant_common import float_product
from klfast.kernels.launch import INTERPRETED, Launch, cdiv, power_of_2, strided

import triton
import triton.language as tl


@triton.jit
def gathered_logits(
    hidden_ptr,  # float [S, T, K]
    head_ptr,  # float [V, K]
    index_ptr,  # int64 [T, J]
    y_ptr,  # float32 [S, T, J]
    S,
    J,
    K,
    V,
    hidden_s,
    hidden_t,
    hidden_k,
    head_v,
    head_k,
    index_t,
    index_j,
    y_s,
    y_t,
    y_j,
    BJ: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Compute BJ logits of one token in BS models; NaN for rows that the head lacks."""
    i_t = tl.program_id(0).to(tl.int64)
    o_j, o_k = tl.program_id(1) * BJ + tl.arange(0, BJ), tl.arange(0, BK)
    o_s = tl.program_id(2).to(tl.int64) * BS + tl.arange(0, BS)
    m_j, m_s = o_j < J, o_s < S
    o_v = tl.load(index_ptr + i_t * index_t + o_j * index_j, mask=m_j, other=0)
    is_row = (o_v >= 0) & (o_v < V)
    p_w = head_ptr + o_v[:, None] * head_v + o_k[None, :] * head_k
    p_x = hidden_ptr + i_t * hidden_t + o_s[None, :] * hidden_s + o_k[:, None] * hidden_k
    acc = tl.zeros((BJ, BS), dtype=tl.float32)
    for first in range(0, K, BK):
        m_k = first + o_k < K
        b_w = tl.load(p_w, mask=(m_j & is_row)[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_s[None, :] & m_k[:, None], other=0.0)
        acc = float_product(b_x, b_w, acc, UPCAST, IN_PARTS)
        p_w += BK * head_k
        p_x += BK * hidden_k
    acc = tl.where(is_row[:, None], acc, float("nan"))
    p_y = y_ptr + i_t * y_t + o_s[None, :] * y_s + o_j[:, None] * y_j
    tl.store(p_y, acc, mask=m_j[:, None] & m_s[None, :])


DIMS = {"hidden": "stk", "head": "vk", "index": "tj", "y": "stj"}


def plan(hidden: torch.Tensor, head: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> Launch:
    """Return the launch for hidden [S, T, K], head [V, K], index [T, J] and y [S, T, J], any strides."""
    (students, tokens, features), entries = hidden.shape, index.shape[1]
    in_parts = hidden.dtype != head.dtype or hidden.dtype == torch.float32
    BJ, BS = max(16, min(32, power_of_2(entries))), 16
    args = strided(DIMS, hidden=hidden, head=head, index=index, y=y) | dict(
        S=students,
        J=entries,
        K=features,
        V=head.shape[0],
        BJ=BJ,
        BS=BS,
        BK=16 if in_parts else 32,
        UPCAST=INTERPRETED,
        IN_PARTS=in_parts,
    )
    return Launch(gathered_logits, (tokens, cdiv(entries, BJ), cdiv(students, BS)), args, dict(num_warps=4))
