"""rms_norm: y = weight v / sqrt(mean(v^2) + eps), v = x silu(gate), the mean over each group of channels.

The gate may also be multiplied in last, and be a sigmoid; the weight may be stored with an offset.
"""

from __future__ import annotations

import torch
from klfast.kernels.launch import Launch, cdiv, power_of_2, strided
from klfast.kernels.ssm_common import silu

import triton
import triton.language as tl


@triton.jit
def activated(p_gate, m, SIGMOID: tl.constexpr):
    """Load a gate and apply its activation."""
    gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-gate)) if SIGMOID else silu(gate)


@triton.jit
def rms_norm(
    x_ptr,  # float [A, B, D]
    w_ptr,  # float [D]
    gate_ptr,  # float [A, B, D] or None
    y_ptr,  # [A, B, D]
    rows,
    B,
    group,
    eps,
    weight_offset,
    x_a,
    x_b,
    x_d,
    w_d,
    gate_a,
    gate_b,
    gate_d,
    y_a,
    y_b,
    y_d,
    NORM_BEFORE_GATE: tl.constexpr,
    SIGMOID_GATE: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
):
    """Normalise one group of channels of BR rows."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_g = tl.arange(0, BG).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * group + o_g
    m_g = (o_g < group)[None, :]
    m = (o_r < rows)[:, None] & m_g
    i_a, i_b = (o_r // B)[:, None], (o_r % B)[:, None]
    v = tl.load(x_ptr + i_a * x_a + i_b * x_b + o_d[None, :] * x_d, mask=m, other=0.0).to(tl.float32)  # [BR, BG]
    if gate_ptr is not None and not NORM_BEFORE_GATE:
        v *= activated(gate_ptr + i_a * gate_a + i_b * gate_b + o_d[None, :] * gate_d, m, SIGMOID_GATE)
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / group + eps)
    w = tl.load(w_ptr + o_d[None, :] * w_d, mask=m_g, other=0.0).to(tl.float32) + weight_offset
    y = v * scale[:, None] * w
    if gate_ptr is not None and NORM_BEFORE_GATE:
        y *= activated(gate_ptr + i_a * gate_a + i_b * gate_b + o_d[None, :] * gate_d, m, SIGMOID_GATE)
    tl.store(y_ptr + i_a * y_a + i_b * y_b + o_d[None, :] * y_d, y.to(y_ptr.dtype.element_ty), mask=m)


DIMS = {"x": "abd", "w": "d", "gate": "abd", "y": "abd"}


def plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    y: torch.Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    sigmoid_gate: bool = False,
    weight_offset: float = 0.0,
) -> Launch:
    """Return the launch for x, gate and y [A, B, D], weight [D], any strides; a program keeps groups in registers."""
    rows, channels = x.shape[0] * x.shape[1], x.shape[2]
    BG = power_of_2(group_size)
    BR = min(power_of_2(rows), max(1, 1024 // BG))
    args = strided(DIMS, x=x, w=weight, gate=gate, y=y) | dict(
        rows=rows,
        B=x.shape[1],
        group=group_size,
        eps=eps,
        weight_offset=weight_offset,
        NORM_BEFORE_GATE=norm_before_gate,
        SIGMOID_GATE=sigmoid_gate,
        BR=BR,
        BG=BG,
    )
    warps = min(16, max(1, BR * BG // 512))
    return Launch(rms_norm, (cdiv(rows, BR), channels // group_size), args, dict(num_warps=warps))
