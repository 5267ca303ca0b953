"""CPU kernels of the state-space ops."""

from __future__ import annotations

import torch

from klfast import _C
from klfast.backends import operands
from klfast.backends.cpu.memory import view
from klfast.dispatch import pins
from klfast.dispatch.registry import register_kernel


def register() -> None:
    for name, kernel in (
        ("causal_conv1d", causal_conv1d),
        ("causal_conv1d_update", causal_conv1d_update),
        ("selective_scan", selective_scan),
        ("selective_state_update", selective_state_update),
        ("mamba_chunk_scan", mamba_chunk_scan),
        ("rms_norm", rms_norm),
    ):
        register_kernel(name, "CPU", kernel, sees_addresses=True)


def _machine():
    return torch.get_num_threads(), pins.cpu_tier_limit()


def causal_conv1d(x, weight, bias, initial_states, final_states_out, silu):
    out = operands.empty_channel_last(x)
    past = weight.shape[1] - 1
    states = (initial_states, final_states_out)
    _C.causal_conv1d(
        *map(view, (x, weight, bias, *states, out)), *x.shape, weight.shape[1], past, past, silu, *_machine()
    )
    return out


def causal_conv1d_update(x, conv_state, weight, bias, silu):
    out = operands.empty_channel_last(x)
    length = conv_state.shape[-1]
    tensors = (x, weight, bias, conv_state, conv_state, out)
    _C.causal_conv1d(*map(view, tensors), *x.shape, weight.shape[1], length, length, silu, *_machine())
    return out


def selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_states, delta_softplus):
    out = operands.empty_channel_last(u)
    state = u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_states, out, state)
    _C.selective_scan(*map(view, tensors), *u.shape, *B.shape[1:3], delta_softplus, *_machine())
    return out, state


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    out = x.new_empty(x.shape)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, out)
    _C.selective_state_update(*map(view, tensors), *x.shape, *B.shape[1:], dt_softplus, *_machine())
    return out


def mamba_chunk_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, return_final_states):
    batch, length, heads, dim = x.shape
    out = x.new_empty(x.shape)
    final = x.new_empty(batch, heads, dim, B.shape[-1], dtype=torch.float32) if return_final_states else None
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, final, out)
    _C.mamba_chunk_scan(*map(view, tensors), *x.shape, *B.shape[2:], dt_softplus, dt_min, dt_max, *_machine())
    return out, x.new_empty(0, dtype=torch.float32) if final is None else final


def rms_norm(x, weight, gate, eps, group_size):
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    _C.rms_norm(*map(view, (x, weight, gate, out)), *x.shape, group_size, eps, *_machine())
    return out
