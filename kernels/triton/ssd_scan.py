"""Mamba-2's recurrence (one A and dt per head) in chunks of BL steps, with matrix instructions: state-space duality.

With l_t the sum of dt A up to step t of a chunk and h [N, P] the state before it:

    y_t = exp(l_t) C_t h  +  sum over s <= t of (C_t . B_s) exp(l_t - l_s) dt_s x_s  +  D x_t
    h'  = exp(l_last) h   +  sum over s of B_s exp(l_last - l_s) dt_s x_s

One kernel goes from chunk to chunk, with a tile of the state in registers, and stores the state before each; another
computes the outputs of all chunks at once. B, C and x enter products unchanged. Operands computed in float32 are split
into two bfloat16 parts, which lose at most 2^-16 of a term; float16 operands multiplied with these are split in two as
well, which loses nothing.

l_t - l_s is never computed by subtracting two rounded prefix sums, which would cancel after long steps. For the states,
the steps after s are summed separately. For the outputs, l is the sum of multiples of 2^-10, which is exact, and of
rests of at most 2^-11: l_t - l_s has an error of at most 2^-22, and 2^-24 of itself.

A NaN or infinity in B, C or dt appears where the recurrence carries it; one in x_s also in that channel's outputs
before s in its chunk, where it is multiplied by 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from klfast.kernels.dequant_common import top_bits
from klfast.kernels.launch import INTERPRETED, Launch, cdiv, options, power_of_2, strided
from klfast.kernels.ssm_common import NO_LIMIT, at_least, at_most, silu, softplus

import triton
import triton.language as tl

NEGLIGIBLE = tl.constexpr(-104.0)  # e^-104 is 0 in float32, so longer steps need not be distinguished
TO_MULTIPLES = tl.constexpr(12288.0)  # 1.5 * 2^13: added to numbers below 2^12, it leaves no bits below 2^-10


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """Return acc + a @ b for one 16-bit type."""
    DTYPE: tl.constexpr = tl.float32 if UPCAST else a.dtype
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc)


@triton.jit
def dot_bfloat16(a, b, acc, UPCAST: tl.constexpr):
    """Return acc + a @ b for any a and a bfloat16 b."""
    if a.dtype != tl.bfloat16:
        high = top_bits(a.to(tl.float32))
        acc = dot((a - high).to(tl.bfloat16), b, acc, UPCAST)
        a = high.to(tl.bfloat16)
    return dot(a, b, acc, UPCAST)


@triton.jit
def multiply(a, b, acc, UPCAST: tl.constexpr):
    """Return acc + a @ b; if the types differ, an operand that is not bfloat16 is split into two bfloat16 parts."""
    if a.dtype == b.dtype:
        return dot(a, b, acc, UPCAST)
    if b.dtype != tl.bfloat16:
        high = top_bits(b.to(tl.float32))
        acc = dot_bfloat16(a, (b - high).to(tl.bfloat16), acc, UPCAST)
        b = high.to(tl.bfloat16)
    return dot_bfloat16(a, b, acc, UPCAST)


@triton.jit
def step_sizes(p_dt, o_t, end, A, bias, dt_l, dt_min, dt_max, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    """Return (dt, dt A) of steps o_t; 0 from ``end`` on."""
    dt = tl.load(p_dt + tl.minimum(o_t, end - 1).to(tl.int64) * dt_l).to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    if CLAMP:
        dt = at_most(at_least(dt, dt_min), dt_max)
    return tl.where(o_t < end, dt, 0.0), tl.where(o_t < end, at_least(dt * A, NEGLIGIBLE), 0.0)


@triton.jit
def ssd_states(
    x_ptr,  # 16-bit float [B, L, H, P]
    dt_ptr,  # float [B, L, H]
    a_ptr,  # float [H]
    b_ptr,  # of x's type, [B, L, H / heads_per_group, N]
    bias_ptr,  # float [H] or None
    first_ptr,
    last_ptr,  # the states before and after all chunks, [B, H, P, N], or None
    states_ptr,  # float32 [B * H, chunks, N, P], the states before each chunk
    L,
    H,
    P,
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
    a_h,
    b_b,
    b_l,
    b_g,
    b_n,
    bias_h,
    first_b,
    first_h,
    first_p,
    first_n,
    last_b,
    last_h,
    last_p,
    last_n,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    N: tl.constexpr,
    BL: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute a tile of the states of one head before each chunk, and after the last."""
    n_n: tl.constexpr = N // BN
    n_p = P // BP
    i_bh = tl.program_id(0) // (n_n * n_p)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = i_h // heads_per_group
    o_n = tl.program_id(0) % n_n * BN + tl.arange(0, BN).to(tl.int64)
    o_p = tl.program_id(0) // n_n % n_p * BP + tl.arange(0, BP).to(tl.int64)
    p_x, p_b = x_ptr + i_b * x_b + i_h * x_h + o_p[None, :] * x_p, b_ptr + i_b * b_b + i_g * b_g + o_n[:, None] * b_n
    p_states = states_ptr + i_bh.to(tl.int64) * tl.cdiv(L, BL) * N * P + o_n[:, None] * P + o_p[None, :]
    p_dt = dt_ptr + i_b * dt_b + i_h * dt_h
    A = tl.load(a_ptr + i_h * a_h).to(tl.float32)
    bias = 0.0 if bias_ptr is None else tl.load(bias_ptr + i_h * bias_h).to(tl.float32)
    h = tl.zeros((BN, BP), dtype=tl.float32)
    if first_ptr is not None:
        h = tl.load(first_ptr + i_b * first_b + i_h * first_h + o_n[:, None] * first_n + o_p[None, :] * first_p).to(
            tl.float32
        )
    for start in range(0, L, BL):
        tl.store(p_states, h)
        p_states += N * P
        end = tl.minimum(start + BL, L)
        o_t = start + tl.arange(0, BL)
        o_row = tl.minimum(o_t, end - 1).to(tl.int64)  # [BL]
        dt, step = step_sizes(p_dt, o_t, end, A, bias, dt_l, dt_min, dt_max, SOFTPLUS, CLAMP)
        _, next_step = step_sizes(p_dt, o_t + 1, end, A, bias, dt_l, dt_min, dt_max, SOFTPLUS, CLAMP)
        weight = dt * tl.exp(tl.cumsum(next_step, axis=0, reverse=True))
        x = tl.load(p_x + o_row[:, None] * x_l).to(tl.float32) * weight[:, None]  # [BL, BP]
        h = multiply(tl.load(p_b + o_row[None, :] * b_l), x, h * tl.exp(tl.sum(step, axis=0)), UPCAST)
    if last_ptr is not None:
        tl.store(
            last_ptr + i_b * last_b + i_h * last_h + o_n[:, None] * last_n + o_p[None, :] * last_p,
            h.to(last_ptr.dtype.element_ty),
        )


@triton.jit
def ssd_outputs(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    states_ptr,  # as in ssd_states
    c_ptr,  # like b_ptr
    d_ptr,  # float [H, P] or None
    z_ptr,  # float [B, L, H, P] or None
    y_ptr,  # [B, L, H, P]
    L,
    H,
    P,
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
    a_h,
    b_b,
    b_l,
    b_g,
    b_n,
    c_b,
    c_l,
    c_g,
    c_n,
    d_h,
    d_p,
    bias_h,
    z_b,
    z_l,
    z_h,
    z_p,
    y_b,
    y_l,
    y_h,
    y_p,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    N: tl.constexpr,
    BL: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the outputs of one chunk for BP channels of one head."""
    n_p, chunks = P // BP, tl.cdiv(L, BL)
    i_bh = tl.program_id(0) // (n_p * chunks)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = i_h // heads_per_group
    i_chunk = tl.program_id(0) // n_p % chunks
    o_p = tl.program_id(0) % n_p * BP + tl.arange(0, BP).to(tl.int64)
    o_n = tl.arange(0, BN).to(tl.int64)
    o_t = i_chunk * BL + tl.arange(0, BL)
    o_row = tl.minimum(o_t, L - 1).to(tl.int64)  # [BL]
    p_b = b_ptr + i_b * b_b + i_g * b_g + o_n[:, None] * b_n + o_row[None, :] * b_l  # [BN, BL]
    p_c = c_ptr + i_b * c_b + i_g * c_g + o_n[None, :] * c_n + o_row[:, None] * c_l  # [BL, BN]
    p_h = states_ptr + (i_bh.to(tl.int64) * chunks + i_chunk) * N * P + o_n[:, None] * P + o_p[None, :]  # [BN, BP]
    scores, y = tl.zeros((BL, BL), dtype=tl.float32), tl.zeros((BL, BP), dtype=tl.float32)
    for _ in range(0, N // BN):
        C = tl.load(p_c)
        scores = multiply(C, tl.load(p_b), scores, UPCAST)
        y = multiply(C, tl.load(p_h), y, UPCAST)
        p_b, p_c, p_h = p_b + BN * b_n, p_c + BN * c_n, p_h + BN * P

    A = tl.load(a_ptr + i_h * a_h).to(tl.float32)
    bias = 0.0 if bias_ptr is None else tl.load(bias_ptr + i_h * bias_h).to(tl.float32)
    dt, step = step_sizes(dt_ptr + i_b * dt_b + i_h * dt_h, o_t, L, A, bias, dt_l, dt_min, dt_max, SOFTPLUS, CLAMP)
    coarse = (step + TO_MULTIPLES) - TO_MULTIPLES
    log, rest = tl.cumsum(coarse, axis=0), tl.cumsum(step - coarse, axis=0)
    between = (log[:, None] - log[None, :]) + (rest[:, None] - rest[None, :])
    scores = tl.where(o_t[:, None] >= o_t[None, :], scores * tl.exp(between) * dt[None, :], 0.0)
    x = tl.load(x_ptr + i_b * x_b + i_h * x_h + o_p[None, :] * x_p + o_row[:, None] * x_l)  # [BL, BP]
    y = multiply(scores, x, y * tl.exp(log + rest)[:, None], UPCAST)
    if d_ptr is not None:
        y += x.to(tl.float32) * tl.load(d_ptr + i_h * d_h + o_p * d_p).to(tl.float32)[None, :]
    if z_ptr is not None:
        y *= silu(tl.load(z_ptr + i_b * z_b + i_h * z_h + o_p[None, :] * z_p + o_row[:, None] * z_l).to(tl.float32))
    p_y = y_ptr + i_b * y_b + i_h * y_h + o_p[None, :] * y_p + o_row[:, None] * y_l
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=tl.broadcast_to((o_t < L)[:, None], (BL, BP)))


DIMS = {
    "x": "blhp",
    "dt": "blh",
    "a": "h",
    "b": "blgn",
    "c": "blgn",
    "d": "hp",
    "bias": "h",
    "z": "blhp",
    "first": "bhpn",
    "last": "bhpn",
    "y": "blhp",
}


@dataclass(frozen=True)
class Config:
    """Configuration: chunks of BL steps; tiles of at most BN states and BP channels."""

    BL: int
    BN: int
    BP: int
    num_warps: int
    num_stages: int = 1
    grf_mode: str | None = None


STATES = {"nvidia": Config(64, 64, 32, 4), "intel": Config(32, 32, 32, 8, grf_mode="256")}
OUTPUTS = {"nvidia": Config(64, 64, 64, 4), "intel": Config(32, 16, 32, 4, grf_mode="256")}  # of chunks as long


def is_for(x: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> bool:
    """Return True if the kernels support the operands.

    They need a type of the matrix instructions, powers of two as numbers of channels and states, and at least 16 steps.
    """
    fits = x.shape[1] >= 16 and all(16 <= size == power_of_2(size) for size in (x.shape[3], b.shape[3]))
    return fits and x.dtype == b.dtype == c.dtype in (torch.bfloat16, torch.float16)


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
    dt_limit: tuple[float, float],
    family: str,
) -> list[Launch]:
    """Return the launches for operands of the dimensions in DIMS, any strides; see ``is_for``."""
    batch, length, heads, channels = x.shape
    size, chunks = b.shape[3], cdiv(length, STATES[family].BL)
    both = strided(DIMS, x=x, dt=dt, a=a, b=b, bias=bias) | dict(
        states_ptr=torch.empty(batch * heads, chunks, size, channels, device=x.device),
        L=length,
        H=heads,
        P=channels,
        heads_per_group=heads // b.shape[2],
        dt_min=dt_limit[0],
        dt_max=dt_limit[1],
        SOFTPLUS=softplus,
        CLAMP=dt_limit != NO_LIMIT,
        N=size,
        UPCAST=INTERPRETED,
    )

    def launch(kernel, config: Config, is_chunk_each: bool, **tensors) -> Launch:
        BP = min(channels, config.BP)
        # With more states than channels in a tile, Triton 3.6's outputs on an H100 are wrong or leave shared memory.
        BN = min(size, config.BN, BP) if is_chunk_each else min(size, config.BN)
        args = both | strided(DIMS, **tensors) | dict(BL=config.BL, BN=BN, BP=BP)
        return Launch(
            kernel, (channels // BP * (chunks if is_chunk_each else size // BN) * batch * heads,), args, options(config)
        )

    states = launch(ssd_states, STATES[family], False, first=first, last=last)
    return [states, launch(ssd_outputs, OUTPUTS[family], True, c=c, d=d, z=z, y=y)]
