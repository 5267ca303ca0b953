"""The truth of the state-space ops: plain torch, one step after the other, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv1d(x, weight, bias, initial_states, final_states_out, silu):
    """Depthwise causal convolution of x [B, D, L] with weight [D, W], after initial_states [B, D, W-1] (zeros)."""
    past = weight.shape[1] - 1
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], past)
    sequence = torch.cat((initial_states.float(), x.float()), dim=-1)
    if final_states_out is not None:
        final_states_out.copy_(sequence[..., sequence.shape[-1] - past :])
    return _channel_last(_convolve(sequence, weight, bias, silu), x)


def causal_conv1d_update(x, conv_state, weight, bias, silu):
    """The same for x [B, D, L] that follows conv_state [B, D, S >= W-1], which keeps the last S values."""
    sequence = torch.cat((conv_state.float(), x.float()), dim=-1)
    conv_state.copy_(sequence[..., x.shape[-1] :])
    needed = x.shape[-1] + weight.shape[1] - 1
    return _channel_last(_convolve(sequence[..., sequence.shape[-1] - needed :], weight, bias, silu), x)


def _convolve(sequence, weight, bias, silu):
    length = sequence.shape[-1] - weight.shape[1] + 1
    y = sum(weight[:, k, None].float() * sequence[..., k : k + length] for k in range(weight.shape[1]))
    if bias is not None:
        y = y + bias.float()[:, None]
    return F.silu(y) if silu else y


def _channel_last(y, like):
    return y.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_states, delta_softplus):
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = (C_t . h_t + D u_t) silu(z_t): y [B, D, L], last h [B, D, N].

    u, delta, z [B, D, L]; A [D, N]; B, C [B, G, N, L]; D, delta_bias [D]; dt = softplus(delta + delta_bias). h starts
    as initial_states [B, D, N] (zeros).
    """
    dt = _step_size(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus)
    repeats = u.shape[1] // B.shape[1]
    B, C = (t.float().repeat_interleave(repeats, 1) for t in (B, C))  # [B, D, N, L]
    h = (
        u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32)
        if initial_states is None
        else initial_states.float().clone()
    )
    y = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    for t in range(u.shape[-1]):
        step, x = dt[..., t, None], u[..., t, None].float()
        h = torch.exp(step * A.float()) * h + step * x * B[..., t]
        y[..., t] = (h * C[..., t]).sum(-1)
    return _channel_last(_finish(y, u, None if D is None else D[:, None], z), u), h


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """One step of the recurrence, state [B, H, P, N] in place; x, dt, z [B, H, P]; A [H, P, N]; B, C [B, G, N]; D, dt_bias [H, P]."""
    dt = _step_size(dt, dt_bias, dt_softplus)[..., None]
    repeats = x.shape[1] // B.shape[1]
    B, C = (t.float().repeat_interleave(repeats, 1)[:, :, None] for t in (B, C))  # [B, H, 1, N]
    h = torch.exp(dt * A.float()) * state.float() + dt * x[..., None].float() * B
    state.copy_(h)
    return _finish((h * C).sum(-1), x, D, z).to(x.dtype)


def mamba_chunk_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, return_final_states):
    """The recurrence with one A and dt a head: x, z [B, L, H, P]; dt [B, L, H]; A, dt_bias [H]; B, C [B, L, G, N]; D [H, P].

    Returns y [B, L, H, P] and the final state [B, H, P, N] (empty unless asked for).
    """
    dt = _step_size(dt, dt_bias, dt_softplus).clamp(dt_min, dt_max)
    repeats = x.shape[2] // B.shape[2]
    B, C = (t.float().repeat_interleave(repeats, 2)[..., None, :] for t in (B, C))  # [B, L, H, 1, N]
    shape = (x.shape[0], *x.shape[2:], B.shape[-1])
    h = x.new_zeros(shape, dtype=torch.float32) if initial_states is None else initial_states.float()
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        h = torch.exp(step * A.float()[:, None, None]) * h + step * x[:, t, ..., None].float() * B[:, t]
        y[:, t] = (h * C[:, t]).sum(-1)
    final = (
        h.clone(memory_format=torch.contiguous_format) if return_final_states else x.new_empty(0, dtype=torch.float32)
    )
    return _finish(y, x, D, z).to(x.dtype), final


def _step_size(dt, bias, softplus):
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt


def _finish(y, x, D, z):
    if D is not None:
        y = y + D.float() * x.float()
    return y if z is None else y * F.silu(z.float())
