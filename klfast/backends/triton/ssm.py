"""State-space ops by Triton kernels: each op's tensors as the kernels' dimensions name them, without copies."""

from __future__ import annotations

import torch

from klfast.backends import operands


def causal_conv1d(x, weight, bias, initial_states, final_states_out, silu):
    out = _convolve(x, weight, bias, initial_states, silu)
    if final_states_out is not None:
        _keep_last(final_states_out, x, initial_states)
    return out


def causal_conv1d_update(x, conv_state, weight, bias, silu):
    out = _convolve(x, weight, bias, conv_state, silu)
    _keep_last(conv_state, x, conv_state)
    return out


def _convolve(x, weight, bias, past, silu):
    from klfast.kernels import causal_conv1d as kernel

    out = operands.empty_channel_last(x)
    if out.numel():
        kernel.plan(
            x.detach(), weight.detach(), None if bias is None else bias.detach().contiguous(), past, out, silu
        ).run()
    return out


def _keep_last(state, x, before):
    """The last values of ``before`` (zeros if None), then x, into state [B, D, S]."""
    count, length = state.shape[-1], x.shape[-1]
    if length < count:
        kept = (
            state.new_zeros(*state.shape[:2], count - length)
            if before is None
            else before[..., before.shape[-1] - (count - length) :]
        )
        x = torch.cat((kept.to(torch.promote_types(kept.dtype, x.dtype)), x), -1)
    state.copy_(x[..., x.shape[-1] - count :])


def selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_states, delta_softplus):
    """[B, D, L] as heads of D / G channels each, one for each group of B and C."""
    batch, channels, length = u.shape
    groups = B.shape[1]
    out = operands.empty_channel_last(u)
    state = u.new_empty(batch, *A.shape, dtype=torch.float32)

    def timed(t):  # [B, D, L] -> [B, L, G, D / G]
        return None if t is None else t.transpose(1, 2).unflatten(2, (groups, -1))

    def headed(t, dim):
        return None if t is None else t.unflatten(dim, (groups, -1))

    B, C = (t.permute(0, 3, 1, 2) for t in (B, C))
    _scan(
        x=timed(u),
        dt=timed(delta),
        a=headed(A, 0),
        b=B,
        c=C,
        d=headed(D, 0),
        bias=headed(delta_bias, 0),
        z=timed(z),
        first=headed(initial_states, 1),
        last=headed(state, 1),
        y=timed(out),
        softplus=delta_softplus,
    )
    return out, state


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    out = x.new_empty(x.shape)
    x, dt, z, y = (None if t is None else t.unsqueeze(1) for t in (x, dt, z, out))
    _scan(
        x=x,
        dt=dt,
        a=A,
        b=B.unsqueeze(1),
        c=C.unsqueeze(1),
        d=D,
        bias=dt_bias,
        z=z,
        first=state,
        last=state,
        y=y,
        softplus=dt_softplus,
    )
    return out


def mamba_chunk_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, return_final_states):
    from klfast.kernels import ssd_scan
    from klfast.kernels.launch import family

    batch, _, heads, dim = x.shape
    out = x.new_empty(x.shape)
    final = x.new_empty(batch, heads, dim, B.shape[-1], dtype=torch.float32) if return_final_states else None
    same = dict(
        x=x,
        b=B,
        c=C,
        d=D,
        z=z,
        first=initial_states,
        last=final,
        y=out,
        softplus=dt_softplus,
        dt_limit=(dt_min, dt_max),
    )
    if ssd_scan.is_for(x, B, C):
        for launch in ssd_scan.plan(**_detached(dt=dt, a=A, bias=dt_bias, **same), family=family(x.device)):
            launch.run()
    else:
        bias = None if dt_bias is None else dt_bias[:, None].expand(-1, dim)
        _scan(dt=dt[..., None].expand(x.shape), a=A[:, None, None].expand(-1, dim, B.shape[-1]), bias=bias, **same)
    return out, x.new_empty(0, dtype=torch.float32) if final is None else final


def _scan(*, x, **operands):
    from klfast.kernels import selective_scan

    if x.shape[0] * x.shape[2] * x.shape[3]:
        selective_scan.plan(**_detached(x=x, **operands)).run()


def _detached(**operands):
    return {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in operands.items()}
