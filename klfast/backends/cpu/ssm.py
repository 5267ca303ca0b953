"""State-space ops, by the C++ extension."""

from __future__ import annotations

import torch

from klfast import _C
from klfast.backends import operands
from klfast.backends.cpu.extension import resources, view


def causal_conv1d(x, weight, bias, initial_states, final_states_out, silu):
    out = operands.empty_channel_last(x)
    past = weight.shape[1] - 1
    states = (initial_states, final_states_out)
    _C.causal_conv1d(
        *map(view, (x, weight, bias, *states, out)), *x.shape, weight.shape[1], past, past, silu, *resources()
    )
    return out


def causal_conv1d_update(x, conv_state, weight, bias, silu):
    out = operands.empty_channel_last(x)
    length = conv_state.shape[-1]
    tensors = (x, weight, bias, conv_state, conv_state, out)
    _C.causal_conv1d(*map(view, tensors), *x.shape, weight.shape[1], length, length, silu, *resources())
    return out


def selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_states, delta_softplus):
    out = operands.empty_channel_last(u)
    state = u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_states, out, state)
    _C.selective_scan(*map(view, tensors), *u.shape, *B.shape[1:3], delta_softplus, *resources())
    return out, state


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    out = x.new_empty(x.shape)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, out)
    _C.selective_state_update(*map(view, tensors), *x.shape, *B.shape[1:], dt_softplus, *resources())
    return out


def mamba_chunk_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, return_final_states):
    batch, length, heads, dim = x.shape
    out = x.new_empty(x.shape)
    final = x.new_empty(batch, heads, dim, B.shape[-1], dtype=torch.float32) if return_final_states else None
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, final, out)
    _C.mamba_chunk_scan(*map(view, tensors), *x.shape, *B.shape[2:], dt_softplus, dt_min, dt_max, *resources())
    return out, x.new_empty(0, dtype=torch.float32) if final is None else final
