"""State-space ops by Triton kernels, whose dimensions are views of each op's tensors, without copies."""

from __future__ import annotations

from typing import Any

import torch

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
    from klfast.kernels import causal_conv1d as kernel

    out = _convolve(a, a.initial_states, kernel.ONE_EACH)
    if a.final_states_out is not None and a.final_states_out.numel():
        kernel.plan_state(**_detached(x=a.x, past=a.initial_states, state=a.final_states_out)).run()
    return out


def causal_conv1d_update(a: CausalConv1dUpdate) -> torch.Tensor:
    """Convolve the steps after ``conv_state``, which is updated in place."""
    from klfast.kernels import causal_conv1d as kernel

    slots, seen = (None if t is None else t.contiguous() for t in (a.conv_state_indices, a.cache_seqlens))
    states = kernel.States(slots, a.pad_slot_id, seen)
    out = _convolve(a, a.conv_state, states)
    if a.conv_state.numel():
        kernel.plan_state(**_detached(x=a.x, past=a.conv_state, state=a.conv_state), states=states).run()
    return out


def _convolve(a: CausalConv1d | CausalConv1dUpdate, past: torch.Tensor | None, states: Any) -> torch.Tensor:
    from klfast.kernels import causal_conv1d as kernel

    out = empty_channel_last(a.x)
    if out.numel():
        bias = None if a.bias is None else a.bias.detach().contiguous()
        kernel.plan(a.x.detach(), a.weight.detach(), bias, past, out, a.silu, states).run()
    return out


def selective_scan(a: SelectiveScan) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan [B, D, L] as G heads of D / G channels, one per group of B and C; also return the last state, float32."""
    groups = groups_of(a.B, a.C)
    out = empty_channel_last(a.u)
    state = a.u.new_empty(a.u.shape[0], *a.A.shape, dtype=torch.float32)

    def timed(t: torch.Tensor) -> torch.Tensor:  # [B, D, L] -> [B, L, G, D / G]
        return t.transpose(1, 2).unflatten(2, (groups, -1))

    def headed(t: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return None if t is None else t.unflatten(dim, (groups, -1))

    def in_time(t: torch.Tensor) -> torch.Tensor | None:
        return t.permute(0, 3, 1, 2) if t.dim() == 4 else headed(t, 0)

    _scan(
        x=timed(a.u),
        dt=timed(a.delta),
        a=headed(a.A, 0),
        b=in_time(a.B),
        c=in_time(a.C),
        d=headed(a.D, 0),
        bias=headed(a.delta_bias, 0),
        z=None if a.z is None else timed(a.z),
        first=headed(a.initial_states, 1),
        last=headed(state, 1),
        y=timed(out),
        softplus=a.delta_softplus,
    )
    return out, state


def selective_state_update(a: SelectiveStateUpdate) -> torch.Tensor:
    """Take one step; the state is updated in place."""
    out = a.x.new_empty(a.x.shape)
    _scan(
        x=a.x.unsqueeze(1),
        dt=a.dt.unsqueeze(1),
        a=a.A,
        b=a.B.unsqueeze(1),
        c=a.C.unsqueeze(1),
        d=a.D,
        bias=a.dt_bias,
        z=None if a.z is None else a.z.unsqueeze(1),
        first=a.state,
        last=a.state,
        y=out.unsqueeze(1),
        softplus=a.dt_softplus,
        slots=None if a.state_batch_indices is None else a.state_batch_indices.contiguous(),
        padding=a.pad_slot_id,
    )
    return out


def mamba_chunk_scan(a: MambaChunkScan) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan a sequence with one A and dt per head; also return the last state, float32, empty unless wanted."""
    from klfast.kernels import ssd_scan
    from klfast.kernels.launch import family

    batch, _, heads, dim = a.x.shape
    states = a.B.shape[-1]
    out = a.x.new_empty(a.x.shape)
    final = a.x.new_empty(batch, heads, dim, states, dtype=torch.float32) if a.return_final_states else None
    same: dict[str, Any] = {
        "x": a.x,
        "b": a.B,
        "c": a.C,
        "d": a.D,
        "z": a.z,
        "first": a.initial_states,
        "last": final,
        "y": out,
        "softplus": a.dt_softplus,
        "dt_limit": (a.dt_min, a.dt_max),
    }
    if ssd_scan.is_for(a.x, a.B, a.C):
        for launch in ssd_scan.plan(**_detached(dt=a.dt, a=a.A, bias=a.dt_bias, **same), family=family(a.x.device)):
            launch.run()
    else:
        bias = None if a.dt_bias is None else a.dt_bias[:, None].expand(-1, dim)
        rates = a.A[:, None, None].expand(-1, dim, states)
        _scan(dt=a.dt[..., None].expand(a.x.shape), a=rates, bias=bias, **same)
    return out, a.x.new_empty(0, dtype=torch.float32) if final is None else final


def gated_delta_rule(a: GatedDeltaRule) -> torch.Tensor:
    """Run the delta rule over a sequence or a step; the state is updated in place."""
    from klfast.kernels import gated_delta_rule as kernel

    out = a.v.new_empty(a.v.shape)
    kernel.plan(**_detached(**a._asdict(), y=out)).run()
    return out


def _scan(*, x: torch.Tensor, **others: object) -> None:
    from klfast.kernels import selective_scan

    if x.shape[0] * x.shape[2] * x.shape[3]:
        selective_scan.plan(**_detached(x=x, **others)).run()


def _detached(**given: object) -> dict[str, object]:
    return {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
