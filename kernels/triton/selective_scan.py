"""Mamba's recurrence h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = (C_t . h_t + D x_t) silu(z_t), step by step.

One kernel serves selective_scan, mamba_chunk_scan and selective_state_update: each has heads [H] of channels [P] with a
state [N]; a dimension that an operand does not depend on has stride 0. A program keeps the states of BP channels of a
head in registers and walks through time, so only channels, heads and sequences run in parallel; ssd_scan.py works on
chunks where each head has one A and dt.
"""

from __future__ import annotations

import torch
from klfast.kernels.launch import Launch, cdiv, power_of_2, strided
from klfast.kernels.ssm_common import NO_LIMIT, at_least, at_most, is_state, of_slot, silu, softplus

import triton
import triton.language as tl


@triton.jit
def load_of_channels(p, o_p, o_n, m):
    """Return the values of channels and states at offsets o_p [BP] and o_n [BN], zeros where masked."""
    return tl.load(p + o_p[:, None] + o_n[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def selective_scan(
    x_ptr,
    dt_ptr,  # float [B, L, H, P]
    a_ptr,  # float [H, P, N]
    b_ptr,
    c_ptr,  # float [B, L, H / heads_per_group, N] or, constant in time, [H, P, N]
    d_ptr,
    bias_ptr,  # float [H, P] or None
    z_ptr,  # float [B, L, H, P] or None
    first_ptr,
    last_ptr,  # the states before and after, [COUNT, H, P, N], or None; they may be one tensor
    slots_ptr,  # int [B], which of the states belongs to each sequence; None: the one of its number
    y_ptr,  # [B, L, H, P]
    L,
    H,
    P,
    N,
    COUNT,
    padding,
    heads_per_group,
    dt_min,
    dt_max,
    x_b,
    x_l,
    x_h,
    x_p,
    dt_b,
    dt_l,
    dt_h,
    dt_p,
    a_h,
    a_p,
    a_n,
    b_b,
    b_l,
    b_g,
    b_p,
    b_n,
    c_b,
    c_l,
    c_g,
    c_p,
    c_n,
    d_h,
    d_p,
    bias_h,
    bias_p,
    z_b,
    z_l,
    z_h,
    z_p,
    first_b,
    first_h,
    first_p,
    first_n,
    last_b,
    last_h,
    last_p,
    last_n,
    y_b,
    y_l,
    y_h,
    y_p,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Run BP channels of one head through all steps."""
    n_p = tl.cdiv(P, BP)
    i_bh = tl.program_id(0) // n_p
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = i_h // heads_per_group
    o_p = (tl.program_id(0) % n_p).to(tl.int64) * BP + tl.arange(0, BP)
    o_n = tl.arange(0, BN).to(tl.int64)
    m_p, m_n = o_p < P, o_n < N
    m = m_p[:, None] & m_n[None, :]
    i_state, m_state = i_b, m
    if slots_ptr is not None:
        i_state = tl.load(slots_ptr + i_b).to(tl.int64)
        m_state = m & is_state(i_state, padding, COUNT)
    p_x, p_dt = x_ptr + i_b * x_b + i_h * x_h + o_p * x_p, dt_ptr + i_b * dt_b + i_h * dt_h + o_p * dt_p
    if CONSTANT_B:
        b = load_of_channels(b_ptr + i_h * b_g, o_p * b_p, o_n * b_n, m)
    else:
        p_b = b_ptr + i_b * b_b + i_g * b_g + o_n * b_n
    if CONSTANT_C:
        c = load_of_channels(c_ptr + i_h * c_g, o_p * c_p, o_n * c_n, m)
    else:
        p_c = c_ptr + i_b * c_b + i_g * c_g + o_n * c_n
    p_y = y_ptr + i_b * y_b + i_h * y_h + o_p * y_p
    if z_ptr is not None:
        p_z = z_ptr + i_b * z_b + i_h * z_h + o_p * z_p
    A = load_of_channels(a_ptr + i_h * a_h, o_p * a_p, o_n * a_n, m)
    bias = tl.zeros((BP,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + i_h * bias_h + o_p * bias_p, mask=m_p, other=0.0).to(tl.float32)
    skip = tl.zeros((BP,), tl.float32)
    if d_ptr is not None:
        skip = tl.load(d_ptr + i_h * d_h + o_p * d_p, mask=m_p, other=0.0).to(tl.float32)
    h = tl.zeros((BP, BN), dtype=tl.float32)
    if first_ptr is not None:
        h = load_of_channels(first_ptr + i_state * first_b + i_h * first_h, o_p * first_p, o_n * first_n, m_state)
    for _ in range(0, L):
        x = tl.load(p_x, mask=m_p, other=0.0).to(tl.float32)
        dt = tl.load(p_dt, mask=m_p, other=0.0).to(tl.float32) + bias
        if SOFTPLUS:
            dt = softplus(dt)
        if CLAMP:
            dt = at_most(at_least(dt, dt_min), dt_max)
        if not CONSTANT_B:
            b = tl.load(p_b, mask=m_n, other=0.0).to(tl.float32)[None, :]
            p_b += b_l
        if not CONSTANT_C:
            c = tl.load(p_c, mask=m_n, other=0.0).to(tl.float32)[None, :]
            p_c += c_l
        h = tl.exp(dt[:, None] * A) * h + (dt * x)[:, None] * b
        y = tl.sum(
            tl.where(m_n[None, :], h * c, 0.0), axis=1
        )  # masked, since an infinite x makes NaN beyond the last state
        if d_ptr is not None:
            y += skip * x
        if z_ptr is not None:
            y *= silu(tl.load(p_z, mask=m_p, other=0.0).to(tl.float32))
            p_z += z_l
        if slots_ptr is not None:
            y = of_slot(y, i_state, padding, COUNT)
        tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=m_p)
        p_x, p_dt, p_y = p_x + x_l, p_dt + dt_l, p_y + y_l
    if last_ptr is not None:
        p_last = last_ptr + i_state * last_b + i_h * last_h + o_p[:, None] * last_p + o_n[None, :] * last_n
        tl.store(p_last, h.to(last_ptr.dtype.element_ty), mask=m_state)


DIMS = {
    "x": "blhp",
    "dt": "blhp",
    "a": "hpn",
    "b": "blgpn",
    "c": "blgpn",
    "d": "hp",
    "bias": "hp",
    "z": "blhp",
    "first": "bhpn",
    "last": "bhpn",
    "y": "blhp",
}


def plan(
    *,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    y: torch.Tensor,
    softplus: bool,
    dt_limit: tuple[float, float] = NO_LIMIT,
    slots: torch.Tensor | None = None,
    padding: int = -1,
) -> Launch:
    """Return the launch for operands of the dimensions in DIMS, any strides (0 for a dimension without dependence).

    b and c are [B, L, G, N] or, constant in time, [H, P, N]. ``slots`` int [B] says which of the states ``first`` and
    ``last`` belongs to each sequence, ``padding`` the slot of those without one.
    """
    batch, length, heads, channels = x.shape
    size = b.shape[-1]
    groups = next((t.shape[2] for t in (b, c) if t.dim() == 4), heads)
    constant = dict(CONSTANT_B=b.dim() == 3, CONSTANT_C=c.dim() == 3)
    b, c = (t[None, None] if t.dim() == 3 else t.unsqueeze(3) for t in (b, c))
    BN = power_of_2(size)
    BP = min(power_of_2(channels), max(1, 512 // BN))
    args = strided(DIMS, x=x, dt=dt, a=a, b=b, c=c, d=d, bias=bias, z=z, first=first, last=last, y=y) | constant
    args |= dict(
        slots_ptr=slots,
        COUNT=0 if last is None else last.shape[0],
        padding=padding,
        L=length,
        H=heads,
        P=channels,
        N=size,
        heads_per_group=heads // groups,
        dt_min=dt_limit[0],
        dt_max=dt_limit[1],
        SOFTPLUS=softplus,
        CLAMP=dt_limit != NO_LIMIT,
        BP=BP,
        BN=BN,
    )
    return Launch(
        selective_scan, (cdiv(channels, BP) * batch * heads,), args, dict(num_warps=1 if BP * BN <= 256 else 4)
    )
