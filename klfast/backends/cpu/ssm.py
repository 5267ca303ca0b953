"""State-space ops, by the C++ extension."""

from __future__ import annotations

import torch

from klfast import _C
from klfast.backends.cpu.extension import address, integers, resources, slots_view, view
from klfast.backends.ssm_operands import empty_channel_last, groups_of
from klfast.dispatch.arguments import (
    CausalConv1d,
    CausalConv1dUpdate,
    GatedDeltaRule,
    MambaChunkScan,
    SelectiveScan,
    SelectiveStateUpdate,
)


def causal_conv1d(a: CausalConv1d) -> torch.Tensor:
    """Convolve a sequence, channels side by side in the result."""
    out = empty_channel_last(a.x)
    width = a.weight.shape[1]
    tensors = (a.x, a.weight, a.bias, a.initial_states, a.final_states_out, out)
    _C.causal_conv1d(*map(view, tensors), None, 0, *a.x.shape, width, width - 1, width - 1, a.silu, *resources())
    return out


def causal_conv1d_update(a: CausalConv1dUpdate) -> torch.Tensor:
    """Convolve the steps after ``conv_state``, which is updated in place."""
    x, state, weight, bias, silu, seen, slots, padding = a  # one step takes microseconds, each field access about 20 ns
    out = empty_channel_last(x)
    length = state.shape[-1]
    slots, seen = integers(slots), integers(seen)
    tensors = (x, weight, bias, state, state, out)
    places = (slots_view(slots, padding), address(seen))
    _C.causal_conv1d(*map(view, tensors), *places, *x.shape, weight.shape[1], length, length, silu, *resources())
    return out


def selective_scan(a: SelectiveScan) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan a sequence; also return the last state, float32."""
    out = empty_channel_last(a.u)
    state = a.u.new_empty(a.u.shape[0], *a.A.shape, dtype=torch.float32)
    tensors = (a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, a.initial_states, out, state)
    constant = (a.B.dim() == 2, a.C.dim() == 2)
    sizes = (*a.u.shape, groups_of(a.B, a.C), a.A.shape[1])
    _C.selective_scan(*map(view, tensors), *sizes, *constant, a.delta_softplus, *resources())
    return out, state


def selective_state_update(a: SelectiveStateUpdate) -> torch.Tensor:
    """Take one step; the state is updated in place."""
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slots, padding = a
    out = x.new_empty(x.shape)
    slots = integers(slots)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, out)
    sizes = (*x.shape, *B.shape[1:])
    _C.selective_state_update(*map(view, tensors), slots_view(slots, padding), *sizes, dt_softplus, *resources())
    return out


def mamba_chunk_scan(a: MambaChunkScan) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan a sequence with one A and dt per head; also return the last state, float32, empty unless wanted."""
    batch, _, heads, dim = a.x.shape
    out = a.x.new_empty(a.x.shape)
    final = None
    if a.return_final_states:
        final = a.x.new_empty(batch, heads, dim, a.B.shape[-1], dtype=torch.float32)
    tensors = (a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias, a.initial_states, final, out)
    sizes = (*a.x.shape, *a.B.shape[2:])
    _C.mamba_chunk_scan(*map(view, tensors), *sizes, a.dt_softplus, a.dt_min, a.dt_max, *resources())
    return out, a.x.new_empty(0, dtype=torch.float32) if final is None else final


def gated_delta_rule(a: GatedDeltaRule) -> torch.Tensor:
    """Run the delta rule over a sequence or a step; the state is updated in place."""
    q, k, v, g, beta, state, scale, normalize = a
    out = v.new_empty(v.shape)
    sizes = (*v.shape[:2], *k.shape[2:], *v.shape[2:])
    _C.gated_delta_rule(*map(view, (q, k, v, g, beta, state, out)), *sizes, scale, normalize, *resources())
    return out
