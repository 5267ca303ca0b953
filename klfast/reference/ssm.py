"""The reference of the state-space ops: plain torch, step by step, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.dispatch.arguments import (
    CausalConv1d,
    CausalConv1dUpdate,
    GatedDeltaRule,
    MambaChunkScan,
    SelectiveScan,
    SelectiveStateUpdate,
)


def causal_conv1d(a: CausalConv1d) -> torch.Tensor:
    """Convolve x [B, D, L] causally, depthwise with weight [D, W], after initial_states [B, D, W-1] (zeros)."""
    past = a.weight.shape[1] - 1
    before = a.x.new_zeros(*a.x.shape[:2], past) if a.initial_states is None else a.initial_states
    sequence = torch.cat((before.float(), a.x.float()), dim=-1)
    if a.final_states_out is not None:
        a.final_states_out.copy_(sequence[..., sequence.shape[-1] - past :])
    return _channel_last(_convolve(sequence, a.weight, a.bias, a.silu), a.x)


def causal_conv1d_update(a: CausalConv1dUpdate) -> torch.Tensor:
    """Convolve x [B, D, L] that follows conv_state [B, D, S >= W-1], which keeps the last S values."""
    if a.conv_state_indices is not None or a.cache_seqlens is not None:
        return _causal_conv1d_update_elsewhere(a)
    sequence = torch.cat((a.conv_state.float(), a.x.float()), dim=-1)
    a.conv_state.copy_(sequence[..., a.x.shape[-1] :])
    needed = a.x.shape[-1] + a.weight.shape[1] - 1
    return _channel_last(_convolve(sequence[..., sequence.shape[-1] - needed :], a.weight, a.bias, a.silu), a.x)


def _causal_conv1d_update_elsewhere(a: CausalConv1dUpdate) -> torch.Tensor:
    """Update copies of the states, in order of time, and put them back where they belong."""
    entries, slots = _entries(a.x, a.conv_state_indices, a.pad_slot_id)
    x, state = a.x[entries], a.conv_state[slots]
    seen = state.new_zeros(len(x), dtype=torch.int64) if a.cache_seqlens is None else a.cache_seqlens[entries]
    state = _rolled(state, seen)
    out = _channel_last(torch.zeros_like(a.x), a.x)
    out[entries] = causal_conv1d_update(a._replace(x=x, conv_state=state, cache_seqlens=None, conv_state_indices=None))
    a.conv_state[slots] = state if a.cache_seqlens is None else _rolled(state, -seen - x.shape[-1])
    return out


def _rolled(t: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return t [B, D, S] with value (i + by) % S at i, for ``by`` int [B]."""
    order = (torch.arange(t.shape[2], device=t.device) + by[:, None]) % max(t.shape[2], 1)
    return t.gather(2, order[:, None].expand_as(t))


def _entries(x: torch.Tensor, slots: torch.Tensor | None, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entries of a batch that have a state, and the slots of these."""
    if slots is None:
        every = torch.arange(len(x), device=x.device)
        return every, every
    entries = (slots != padding).nonzero()[:, 0]
    return entries, slots[entries].long()


def _convolve(sequence: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
    length = sequence.shape[-1] - weight.shape[1] + 1
    y = sum(weight[:, k, None].float() * sequence[..., k : k + length] for k in range(weight.shape[1]))
    assert isinstance(y, torch.Tensor)  # W is at least 1
    if bias is not None:
        y = y + bias.float()[:, None]
    return F.silu(y) if silu else y


def _channel_last(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return y.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def selective_scan(a: SelectiveScan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [B, D, L], y_t = (C_t . h_t + D u_t) silu(z_t), and the last h [B, D, N].

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t with dt = softplus(delta + delta_bias); h_0 = initial_states (zeros).
    """
    u, A = a.u, a.A.float()
    dt = _step_size(a.delta, None if a.delta_bias is None else a.delta_bias[:, None], a.delta_softplus)
    B, C = (_of_channels(t.float(), u) for t in (a.B, a.C))
    if a.initial_states is None:
        h = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32)
    else:
        h = a.initial_states.float().clone()
    y = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    for t in range(u.shape[-1]):
        step, x = dt[..., t, None], u[..., t, None].float()
        h = torch.exp(step * A) * h + step * x * B[..., t]
        y[..., t] = (h * C[..., t]).sum(-1)
    return _channel_last(_finish(y, u, None if a.D is None else a.D[:, None], a.z), u), h


def _of_channels(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return B or C as [B, D, N, L] for u [B, D, L]."""
    if t.dim() == 2:  # constant in time
        return t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1])
    return t.repeat_interleave(u.shape[1] // t.shape[1], 1)


def selective_state_update(a: SelectiveStateUpdate) -> torch.Tensor:
    """Take one step of the recurrence; the state is updated in place."""
    if a.state_batch_indices is not None:
        entries, slots = _entries(a.x, a.state_batch_indices, a.pad_slot_id)
        x, dt, B, C = (t[entries] for t in (a.x, a.dt, a.B, a.C))
        z = None if a.z is None else a.z[entries]
        state, out = a.state[slots], torch.zeros_like(a.x)
        out[entries] = selective_state_update(
            a._replace(state=state, x=x, dt=dt, B=B, C=C, z=z, state_batch_indices=None)
        )
        a.state[slots] = state
        return out
    dt = _step_size(a.dt, a.dt_bias, a.dt_softplus)[..., None]
    repeats = a.x.shape[1] // a.B.shape[1]
    B, C = (t.float().repeat_interleave(repeats, 1)[:, :, None] for t in (a.B, a.C))  # [B, H, 1, N]
    h = torch.exp(dt * a.A.float()) * a.state.float() + dt * a.x[..., None].float() * B
    a.state.copy_(h)
    return _finish((h * C).sum(-1), a.x, a.D, a.z).to(a.x.dtype)


def mamba_chunk_scan(a: MambaChunkScan) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence with one A and dt per head: y [B, L, H, P], final state [B, H, P, N] (empty if not wanted)."""
    x, A = a.x, a.A.float()[:, None, None]
    dt = _step_size(a.dt, a.dt_bias, a.dt_softplus).clamp(a.dt_min, a.dt_max)
    repeats = x.shape[2] // a.B.shape[2]
    B, C = (t.float().repeat_interleave(repeats, 2)[..., None, :] for t in (a.B, a.C))  # [B, L, H, 1, N]
    shape = (x.shape[0], *x.shape[2:], B.shape[-1])
    h = x.new_zeros(shape, dtype=torch.float32) if a.initial_states is None else a.initial_states.float()
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        h = torch.exp(step * A) * h + step * x[:, t, ..., None].float() * B[:, t]
        y[:, t] = (h * C[:, t]).sum(-1)
    if a.return_final_states:
        final = h.clone(memory_format=torch.contiguous_format)
    else:
        final = x.new_empty(0, dtype=torch.float32)
    return _finish(y, x, a.D, a.z).to(x.dtype), final


def gated_delta_rule(a: GatedDeltaRule) -> torch.Tensor:
    """Run S = exp(g_t) S, S += k_t (beta_t (v_t - S^T k_t))^T, o_t = scale S^T q_t; the state S is updated in place.

    g_t is one number a head, or one a key channel (a row of S).
    """
    q, k, v, g, beta, state = (t.float() for t in a[:6])
    if a.normalize:
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))  # [B, L, H, K]
    decay = torch.exp(g if g.dim() == 4 else g[..., None])[..., None]  # [B, L, H, K or 1, 1]
    out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    for t in range(v.shape[1]):
        state = decay[:, t] * state
        change = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, ..., None]).sum(-2))
        state = state + k[:, t, ..., None] * change[..., None, :]
        out[:, t] = a.scale * (state * q[:, t, ..., None]).sum(-2)
    a.state.copy_(state)
    return out.to(a.v.dtype)


def _step_size(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt


def _finish(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    if D is not None:
        y = y + D.float() * x.float()
    return y if z is None else y * F.silu(z.float())
