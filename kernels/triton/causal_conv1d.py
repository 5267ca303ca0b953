"""causal_conv1d and its update: y_t = act(bias + sum_k weight_k seq_{t + k}), where seq is the past, then x.

The past of an entry of the batch is its state, at its slot if there are slots. If it is known how many steps each entry
has seen, the states are rings: step t lies at t % S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from klfast.kernels.launch import Launch, cdiv, strided
from klfast.kernels.ssm_common import is_state, of_slot, silu

import triton
import triton.language as tl


@triton.jit
def place_in_ring(seen_ptr, i_b, S):
    """Return where the first step after those seen lies in a ring of S values."""
    return (tl.load(seen_ptr + i_b) % S + S) % S


@triton.jit
def causal_conv1d(
    x_ptr,  # float [B, D, L]
    w_ptr,  # float [D, WIDTH]
    bias_ptr,  # float [D] or None
    past_ptr,  # float [COUNT, D, S], the inputs before x; None for zeros
    slots_ptr,  # int [B] or None: the entry's own number
    seen_ptr,  # int [B] or None
    y_ptr,  # [B, D, L]
    D,
    L,
    S,
    COUNT,
    padding,
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
    i_state, m_past = i_b, m
    if slots_ptr is not None:
        i_state = tl.load(slots_ptr + i_b).to(tl.int64)
        m_past = m & is_state(i_state, padding, COUNT)
    acc = tl.zeros((BL, BD), dtype=tl.float32)
    for k in tl.static_range(WIDTH):
        o_x = o_t + (k - WIDTH + 1)
        b_x = tl.load(p_x + o_x[:, None] * x_l, mask=m & (o_x >= 0)[:, None], other=0.0).to(tl.float32)
        if past_ptr is not None:
            o_past = S + o_x
            if seen_ptr is not None:
                o_past = (place_in_ring(seen_ptr, i_b, S) + o_past) % S
            p_past = past_ptr + i_state * past_b + o_d[None, :] * past_d + o_past[:, None] * past_s
            b_x += tl.load(p_past, mask=m_past & (o_x < 0)[:, None], other=0.0).to(tl.float32)
        b_w = tl.load(w_ptr + o_d * w_d + k * w_k, mask=m_d, other=0.0).to(tl.float32)
        acc += b_x * b_w[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if SILU:
        acc = silu(acc)
    if slots_ptr is not None:
        acc = of_slot(acc, i_state, padding, COUNT)
    tl.store(y_ptr + i_b * y_b + o_t[:, None] * y_l + o_d[None, :] * y_d, acc.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def keep_last(
    x_ptr,  # float [B, D, L]
    past_ptr,  # float [COUNT, D, S] or None: zeros
    slots_ptr,
    seen_ptr,  # as above
    state_ptr,  # [COUNT, D, S]; may be past_ptr
    D,
    L,
    S,
    COUNT,
    padding,
    x_b,
    x_d,
    x_l,
    past_b,
    past_d,
    past_s,
    state_b,
    state_d,
    state_s,
    BD: tl.constexpr,
):
    """Write the last S values of the past, then x, of BD channels of one sequence; to a ring only those of x."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    i_state, m = i_b, o_d < D
    if slots_ptr is not None:
        i_state = tl.load(slots_ptr + i_b).to(tl.int64)
        m = m & is_state(i_state, padding, COUNT)
    for s in range(0, S):  # upwards: a value is read before its place is written
        t = L - S + s
        if seen_ptr is not None:
            t = L - 1 - (place_in_ring(seen_ptr, i_b, S) + L % S + 2 * S - 1 - s) % S
        is_new = t >= 0
        value = tl.load(x_ptr + i_b * x_b + o_d * x_d + t.to(tl.int64) * x_l, mask=m & is_new, other=0.0).to(tl.float32)
        if seen_ptr is None and past_ptr is not None:
            p_past = past_ptr + i_state * past_b + o_d * past_d + (S + t) * past_s
            value += tl.load(p_past, mask=m & (t < 0), other=0.0).to(tl.float32)
        p_state = state_ptr + i_state * state_b + o_d * state_d + s * state_s
        m_new = m if seen_ptr is None else m & is_new
        tl.store(p_state, value.to(state_ptr.dtype.element_ty), mask=m_new)


DIMS = {"x": "bdl", "w": "dk", "past": "bds", "y": "bdl", "state": "bds"}


@dataclass(frozen=True)
class States:
    """Where the states [COUNT, D, S] of a batch are.

    Attributes:
        slots: int [B]: which one belongs to each entry; None: the one of its number.
        padding: the slot of entries without a state.
        seen: int [B], how many steps each has seen, if the states are rings; else None.
    """

    slots: torch.Tensor | None = None
    padding: int = -1
    seen: torch.Tensor | None = None

    def args(self, states: torch.Tensor | None) -> dict:
        """Return kernel arguments, also for no states."""
        count, size = (0, 0) if states is None else (states.shape[0], states.shape[2])
        return dict(slots_ptr=self.slots, seen_ptr=self.seen, S=size, COUNT=count, padding=self.padding)


ONE_EACH = States()


def plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    y: torch.Tensor,
    is_silu: bool,
    states: States = ONE_EACH,
) -> Launch:
    """Return the launch for x [B, D, L] after ``past`` [B, D, S >= W-1] (None: zeros), any strides, contiguous bias."""
    batch, channels, length = x.shape
    BL, BD = (1, 128) if length == 1 else (8, 64)
    args = strided(DIMS, x=x, w=weight, past=past, y=y) | states.args(past)
    args |= dict(bias_ptr=bias, D=channels, L=length, WIDTH=weight.shape[1], SILU=is_silu, BD=BD, BL=BL)
    return Launch(causal_conv1d, (cdiv(length, BL) * batch, cdiv(channels, BD)), args, dict(num_warps=4))


def plan_state(x: torch.Tensor, past: torch.Tensor | None, state: torch.Tensor, states: States = ONE_EACH) -> Launch:
    """Return the launch that writes to ``state`` [B, D, S] what it is after x [B, D, L]; it may be ``past``."""
    batch, channels, length = x.shape
    args = strided(DIMS, x=x, past=past, state=state) | states.args(state) | dict(D=channels, L=length, BD=128)
    return Launch(keep_last, (batch, cdiv(channels, 128)), args, dict(num_warps=4))
