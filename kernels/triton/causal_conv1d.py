"""causal_conv1d and its update: y_t = act(bias + sum_k weight_k seq_{t + k}), where seq is the past, then x."""

from __future__ import annotations

import torch
from klfast.kernels.launch import Launch, cdiv, strided
from klfast.kernels.ssm_common import silu

import triton
import triton.language as tl


@triton.jit
def causal_conv1d(
    x_ptr,  # float [B, D, L]
    w_ptr,  # float [D, WIDTH]
    bias_ptr,  # float [D] or None
    past_ptr,  # float [B, D, S], the inputs before x; None for zeros
    y_ptr,  # [B, D, L]
    D,
    L,
    S,
    x_b,
    x_d,
    x_l,
    w_d,
    w_k,
    past_b,
    past_d,
    past_s,
    y_b,
    y_d,
    y_l,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """Compute BL outputs of BD channels of one sequence."""
    n_t = tl.cdiv(L, BL)
    i_b = (tl.program_id(0) // n_t).to(tl.int64)
    o_t = (tl.program_id(0) % n_t).to(tl.int64) * BL + tl.arange(0, BL)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    m_d = o_d < D
    m = (o_t < L)[:, None] & m_d[None, :]
    p_x = x_ptr + i_b * x_b + o_d[None, :] * x_d  # [1, BD]
    acc = tl.zeros((BL, BD), dtype=tl.float32)
    for k in tl.static_range(WIDTH):
        o_x = o_t + (k - WIDTH + 1)
        b_x = tl.load(p_x + o_x[:, None] * x_l, mask=m & (o_x >= 0)[:, None], other=0.0).to(tl.float32)
        if past_ptr is not None:
            p_past = past_ptr + i_b * past_b + o_d[None, :] * past_d + (S + o_x)[:, None] * past_s
            b_x += tl.load(p_past, mask=m & (o_x < 0)[:, None], other=0.0).to(tl.float32)
        b_w = tl.load(w_ptr + o_d * w_d + k * w_k, mask=m_d, other=0.0).to(tl.float32)
        acc += b_x * b_w[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if SILU:
        acc = silu(acc)
    tl.store(y_ptr + i_b * y_b + o_t[:, None] * y_l + o_d[None, :] * y_d, acc.to(y_ptr.dtype.element_ty), mask=m)


DIMS = {"x": "bdl", "w": "dk", "past": "bds", "y": "bdl"}


def plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    y: torch.Tensor,
    is_silu: bool,
) -> Launch:
    """Return the launch for x [B, D, L] after ``past`` [B, D, S >= W-1] (None: zeros), any strides, contiguous bias."""
    batch, channels, length = x.shape
    BL, BD = (1, 128) if length == 1 else (8, 64)
    args = strided(DIMS, x=x, w=weight, past=past, y=y) | dict(
        bias_ptr=bias,
        D=channels,
        L=length,
        S=0 if past is None else past.shape[2],
        WIDTH=weight.shape[1],
        SILU=is_silu,
        BD=BD,
        BL=BL,
    )
    return Launch(causal_conv1d, (cdiv(length, BL) * batch, cdiv(channels, BD)), args, dict(num_warps=4))
