"""The gated delta rule, token by token: S = e^g_t S, S += k_t (beta_t (v_t - S^T k_t))^T, o_t = scale S^T q_t.

A program keeps BV columns of a head's state in registers and walks through time; columns do not depend on each other,
so heads, sequences and blocks of columns run in parallel. The decay is one number a head, or one a key channel (KDA).
"""

from __future__ import annotations

import torch
from klfast.kernels.launch import Launch, cdiv, power_of_2, strided

import triton
import triton.language as tl


@triton.jit
def gated_delta_rule(
    q_ptr,
    k_ptr,  # float [B, L, H / heads_per_key, K]
    v_ptr,  # float [B, L, H, V]
    g_ptr,  # float [B, L, H, K]
    beta_ptr,  # float [B, L, H]
    state_ptr,  # float [B, H, K, V], read and written
    y_ptr,  # [B, L, H, V]
    L,
    H,
    K,
    V,
    heads_per_key,
    scale,
    q_b,
    q_l,
    q_h,
    q_k,
    k_b,
    k_l,
    k_h,
    k_k,
    v_b,
    v_l,
    v_h,
    v_v,
    g_b,
    g_l,
    g_h,
    g_k,
    beta_b,
    beta_l,
    beta_h,
    state_b,
    state_h,
    state_k,
    state_v,
    y_b,
    y_l,
    y_h,
    y_v,
    NORMALIZE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Run BV columns of one head through all tokens."""
    n_v = tl.cdiv(V, BV)
    i_bh = tl.program_id(0) // n_v
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = i_h // heads_per_key
    o_v = (tl.program_id(0) % n_v).to(tl.int64) * BV + tl.arange(0, BV)
    o_k = tl.arange(0, BK).to(tl.int64)
    m_v, m_k = o_v < V, o_k < K
    m = m_k[:, None] & m_v[None, :]
    p_q, p_k = q_ptr + i_b * q_b + i_g * q_h + o_k * q_k, k_ptr + i_b * k_b + i_g * k_h + o_k * k_k
    p_v, p_y = v_ptr + i_b * v_b + i_h * v_h + o_v * v_v, y_ptr + i_b * y_b + i_h * y_h + o_v * y_v
    p_beta = beta_ptr + i_b * beta_b + i_h * beta_h
    p_g = g_ptr + i_b * g_b + i_h * g_h
    if BY_CHANNEL:
        p_g += o_k * g_k
    p_state = state_ptr + i_b * state_b + i_h * state_h + o_k[:, None] * state_k + o_v[None, :] * state_v
    S = tl.load(p_state, mask=m, other=0.0).to(tl.float32)
    for _ in range(0, L):
        q, k = tl.load(p_q, mask=m_k, other=0.0).to(tl.float32), tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        if NORMALIZE:
            q = q / tl.sqrt(tl.sum(q * q, axis=0) + 1e-6)
            k = k / tl.sqrt(tl.sum(k * k, axis=0) + 1e-6)
        v, beta = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32), tl.load(p_beta).to(tl.float32)
        if BY_CHANNEL:
            S = S * tl.exp(tl.load(p_g, mask=m_k, other=0.0).to(tl.float32))[:, None]
        else:
            S = S * tl.exp(tl.load(p_g).to(tl.float32))
        change = beta * (v - tl.sum(S * k[:, None], axis=0))
        S = S + k[:, None] * change[None, :]
        y = scale * tl.sum(S * q[:, None], axis=0)
        tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=m_v)
        p_q, p_k, p_v, p_g, p_beta, p_y = p_q + q_l, p_k + k_l, p_v + v_l, p_g + g_l, p_beta + beta_l, p_y + y_l
    tl.store(p_state, S.to(state_ptr.dtype.element_ty), mask=m)


DIMS = {"q": "blhk", "k": "blhk", "v": "blhv", "g": "blhk", "beta": "blh", "state": "bhkv", "y": "blhv"}


def plan(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    y: torch.Tensor,
    scale: float,
    normalize: bool,
) -> Launch:
    """Return the launch for operands of the dimensions in DIMS, any strides; g may also be [B, L, H]."""
    batch, length, heads, values = v.shape
    keys = k.shape[3]
    by_channel = g.dim() == 4
    BK = power_of_2(keys)
    BV = min(power_of_2(values), max(1, 1024 // BK))
    args = strided(DIMS, q=q, k=k, v=v, g=g if by_channel else g.unsqueeze(3), beta=beta, state=state, y=y) | dict(
        L=length,
        H=heads,
        K=keys,
        V=values,
        heads_per_key=heads // k.shape[2],
        scale=scale,
        NORMALIZE=normalize,
        BY_CHANNEL=by_channel,
        BK=BK,
        BV=BV,
    )
    return Launch(
        gated_delta_rule, (cdiv(values, BV) * batch * heads,), args, dict(num_warps=1 if BK * BV <= 256 else 4)
    )
