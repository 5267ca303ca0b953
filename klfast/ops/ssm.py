"""The state-space ops: schemas, argument checks, fakes and public wrappers; part of klfast.ops.

The wrappers have the signatures of their CUDA originals in the packages causal_conv1d and mamba_ssm, so that they can
replace them. Tensors are float32, bfloat16 or float16, types may be mixed, any strides; all arithmetic is in float32.
Features of the originals that are missing here (packed sequences, cache indices, complex A) raise InvalidInputError.
"""

from __future__ import annotations

import math

import torch

from klfast.backends.operands import empty_channel_last
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import (
    CausalConv1d,
    CausalConv1dUpdate,
    MambaChunkScan,
    SelectiveScan,
    SelectiveStateUpdate,
    schema,
)
from klfast.dispatch.checks import check_groups, check_sizes, public, refuse_options
from klfast.dispatch.registry import define
from klfast.reference import ssm as reference_ssm


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise InvalidInputError(f'{op}: activation must be None, "silu" or "swish", got {activation!r}')
    return activation is not None


# causal_conv1d ----------------------------------------------------------------------------------------------------


def _check_conv(op: str, a: CausalConv1d | CausalConv1dUpdate, state: torch.Tensor | None, state_name: str) -> None:
    sizes: dict[str, int] = {}
    check_sizes(op, sizes, x=(a.x, "BDL"), weight=(a.weight, "DW"), bias=(a.bias, "D"), **{state_name: (state, "BDS")})
    if sizes["W"] < 1:
        raise InvalidInputError(f"{op}: weight must be [D, W] with W at least 1, got {list(a.weight.shape)}")
    if state is not None and sizes["S"] < sizes["W"] - 1:
        raise InvalidInputError(
            f"{op}: {state_name} must hold at least {sizes['W'] - 1} values per channel, got {sizes['S']}"
        )


def _check_causal_conv1d(a: CausalConv1d) -> None:
    for name, state in (("initial_states", a.initial_states), ("final_states_out", a.final_states_out)):
        _check_conv("causal_conv1d_fn", a, state, name)
        if state is not None and state.shape[-1] != (past := a.weight.shape[-1] - 1):
            raise InvalidInputError(
                f"causal_conv1d_fn: {name} must be [{a.x.shape[0]}, {a.x.shape[1]}, {past}], got {list(state.shape)}"
            )


def _fake_conv(a: CausalConv1d | CausalConv1dUpdate) -> torch.Tensor:
    return empty_channel_last(a.x)


define(
    schema("causal_conv1d", CausalConv1d, "Tensor"),
    arguments=CausalConv1d,
    check=_check_causal_conv1d,
    fake=_fake_conv,
    reference=reference_ssm.causal_conv1d,
)


@public
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convolve causally, depthwise: ``act(bias + sum_k weight[:, k] seq[..., t + k])``, seq = initial_states, then x.

    Args:
        x: [B, D, L].
        weight: [D, W], W at least 1.
        bias: [D], optional.
        initial_states: [B, D, W-1], zeros if absent.
        return_final_states: also return the last W-1 values of seq, [B, D, W-1] in x's dtype.
        final_states_out: written with these; optional.
        activation: None, "silu" or "swish" (the same).

    Returns:
        [B, D, L] in x's dtype, channels side by side in memory; with return_final_states also the final states.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or activation, or ``seq_idx``.

    Signature: causal_conv1d.causal_conv1d_fn.
    """
    refuse_options("causal_conv1d_fn", seq_idx=seq_idx)
    silu = _is_silu("causal_conv1d_fn", activation)
    # torch.compile's inductor fails on an op whose output argument is None.
    wanted = return_final_states or torch.compiler.is_compiling()
    if wanted and final_states_out is None and x.dim() == 3 and weight.dim():
        final_states_out = x.new_empty(*x.shape[:2], max(weight.shape[-1] - 1, 0))
    args = (x, weight, bias, initial_states, final_states_out, silu)
    out = torch.ops.klfast.causal_conv1d.default(*args)
    if not return_final_states:
        return out
    assert final_states_out is not None  # the op has refused other shapes
    return out, final_states_out


def _check_causal_conv1d_update(a: CausalConv1dUpdate) -> None:
    _check_conv("causal_conv1d_update", a, a.conv_state, "conv_state")


define(
    schema("causal_conv1d_update", CausalConv1dUpdate, "Tensor"),
    arguments=CausalConv1dUpdate,
    check=_check_causal_conv1d_update,
    fake=_fake_conv,
    reference=reference_ssm.causal_conv1d_update,
)


@public
def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: None = None,
    conv_state_indices: None = None,
) -> torch.Tensor:
    """Continue causal_conv1d_fn with the next steps: x follows conv_state, which is updated in place.

    Args:
        x: [B, D] (one step) or [B, D, L].
        conv_state: [B, D, S], S at least W-1, any float dtype: the last S values seen.
        weight, bias, activation: as in causal_conv1d_fn.

    Returns:
        x's shape and dtype.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or activation, or ``cache_seqlens`` or ``conv_state_indices``.

    Signature: causal_conv1d.causal_conv1d_update.
    """
    op = "causal_conv1d_update"
    refuse_options(op, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    one_step = x.dim() == 2
    args = (x.unsqueeze(-1) if one_step else x, conv_state, weight, bias, _is_silu(op, activation))
    out = torch.ops.klfast.causal_conv1d_update.default(*args)
    return out.squeeze(-1) if one_step else out


# selective_scan ---------------------------------------------------------------------------------------------------


def _check_selective_scan(a: SelectiveScan) -> None:
    sizes: dict[str, int] = {}
    op = "selective_scan_fn"
    check_sizes(
        op,
        sizes,
        u=(a.u, "BDL"),
        delta=(a.delta, "BDL"),
        A=(a.A, "DN"),
        B=(a.B, "BGNL"),
        C=(a.C, "BGNL"),
        D=(a.D, "D"),
        z=(a.z, "BDL"),
        delta_bias=(a.delta_bias, "D"),
        initial_states=(a.initial_states, "BDN"),
    )
    check_groups(op, "channels", sizes["D"], sizes["G"])


def _fake_selective_scan(a: SelectiveScan) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_channel_last(a.u), a.u.new_empty(a.u.shape[0], *a.A.shape, dtype=torch.float32)


define(
    schema("selective_scan", SelectiveScan, "(Tensor, Tensor)"),
    arguments=SelectiveScan,
    check=_check_selective_scan,
    fake=_fake_selective_scan,
    reference=reference_ssm.selective_scan,
)


def _grouped(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return B or C as [B, G, N, L]: from [B, N, L] (one group) or [D, N] (constant in time, one group per channel)."""
    if t.dim() == 3:
        return t.unsqueeze(1)
    return t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1]) if t.dim() == 2 else t


@public
def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_states: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run Mamba's recurrence: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = (C_t . h_t + D u_t) silu(z_t).

    Args:
        u, delta: [B, D, L]; dt = softplus(delta + delta_bias) with delta_softplus, else delta + delta_bias.
        A: real [D, N].
        B, C: [B, N, L], [B, G, N, L] with G a divisor of D, or [D, N]; both of the same kind.
        D, delta_bias: [D], optional.
        z: [B, D, L], optional gate.
        return_last_state: also return h_L, float32 [B, D, N].
        initial_states: h_0 [B, D, N], zeros if absent; pass the last state of a sequence to continue it.

    Returns:
        y [B, D, L] in u's dtype, channels side by side in memory; with return_last_state also h_L.

    Raises:
        InvalidInputError: a wrong dtype (complex ones included), shape or device.

    Signature: mamba_ssm.ops.selective_scan_interface.selective_scan_fn, plus initial_states as in
    mamba_chunk_scan_combined.
    """
    if u.dim() == 3:
        B, C = _grouped(B, u), _grouped(C, u)
    args = (u, delta, A, B, C, D, z, delta_bias, initial_states, delta_softplus)
    out, last_state = torch.ops.klfast.selective_scan.default(*args)
    return (out, last_state) if return_last_state else out


# selective_state_update -------------------------------------------------------------------------------------------


def _check_selective_state_update(a: SelectiveStateUpdate) -> None:
    sizes: dict[str, int] = {}
    op = "selective_state_update"
    check_sizes(
        op,
        sizes,
        state=(a.state, "BHPN"),
        x=(a.x, "BHP"),
        dt=(a.dt, "BHP"),
        A=(a.A, "HPN"),
        B=(a.B, "BGN"),
        C=(a.C, "BGN"),
        D=(a.D, "HP"),
        z=(a.z, "BHP"),
        dt_bias=(a.dt_bias, "HP"),
    )
    check_groups(op, "heads", sizes["H"], sizes["G"])


def _fake_selective_state_update(a: SelectiveStateUpdate) -> torch.Tensor:
    return a.x.new_empty(a.x.shape)


define(
    schema("selective_state_update", SelectiveStateUpdate, "Tensor"),
    arguments=SelectiveStateUpdate,
    check=_check_selective_state_update,
    fake=_fake_selective_state_update,
    reference=reference_ssm.selective_state_update,
)


@public
def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """Take one step of selective_scan_fn's recurrence; ``state`` is updated in place, rounded to its dtype.

    Args:
        state: [B, D, N], or [B, H, P, N] with heads.
        x, dt: [B, D] or [B, H, P]; dt = softplus(dt + dt_bias) with dt_softplus.
        A: real [D, N] or [H, P, N].
        B, C: [B, N] or [B, G, N] with G a divisor of H.
        D, dt_bias: [D] or [H, P], optional.
        z: like x, optional gate.

    Returns:
        y in x's shape and dtype.

    Raises:
        InvalidInputError: a wrong dtype (complex ones included), shape or device.

    Signature: mamba_ssm.ops.triton.selective_state_update.selective_state_update.
    """
    headless = state.dim() == 3
    if headless:  # one head that holds all channels
        state, x, dt, A = state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0)
        z = None if z is None else z.unsqueeze(1)
        D, dt_bias = (None if t is None else t.unsqueeze(0) for t in (D, dt_bias))
    if B.dim() == 2:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    args = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    out = torch.ops.klfast.selective_state_update.default(*args)
    return out.squeeze(1) if headless else out


# mamba_chunk_scan -------------------------------------------------------------------------------------------------


def _check_mamba_chunk_scan(a: MambaChunkScan) -> None:
    sizes: dict[str, int] = {}
    op = "mamba_chunk_scan_combined"
    check_sizes(
        op,
        sizes,
        x=(a.x, "BLHP"),
        dt=(a.dt, "BLH"),
        A=(a.A, "H"),
        B=(a.B, "BLGN"),
        C=(a.C, "BLGN"),
        D=(a.D, "HP"),
        z=(a.z, "BLHP"),
        dt_bias=(a.dt_bias, "H"),
        initial_states=(a.initial_states, "BHPN"),
    )
    check_groups(op, "heads", sizes["H"], sizes["G"])
    if not a.dt_min <= a.dt_max:
        raise InvalidInputError(f"{op}: dt_limit must be (low, high) with low <= high, got ({a.dt_min}, {a.dt_max})")


def _fake_mamba_chunk_scan(a: MambaChunkScan) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = a.x.shape
    shape = (batch, heads, dim, a.B.shape[-1]) if a.return_final_states else (0,)
    return a.x.new_empty(a.x.shape), a.x.new_empty(shape, dtype=torch.float32)


define(
    schema("mamba_chunk_scan", MambaChunkScan, "(Tensor, Tensor)"),
    arguments=MambaChunkScan,
    check=_check_mamba_chunk_scan,
    fake=_fake_mamba_chunk_scan,
    reference=reference_ssm.mamba_chunk_scan,
)


@public
def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run Mamba-2's recurrence (SSD): selective_scan_fn with one A and one dt per head.

    Args:
        x: [B, L, H, P].
        dt: [B, L, H]; dt = softplus(dt + dt_bias) with dt_softplus, then clamped to dt_limit.
        A: real [H].
        B, C: [B, L, G, N] with G a divisor of H.
        chunk_size: ignored: the result does not depend on it, and the kernels choose their own.
        D: [H] or [H, P], optional.
        z: [B, L, H, P], optional gate.
        dt_bias: [H], optional.
        initial_states: [B, H, P, N], zeros if absent.
        return_final_states: also return the last state, float32 [B, H, P, N].

    Returns:
        y [B, L, H, P] in x's dtype; with return_final_states also the last state.

    Raises:
        InvalidInputError: a wrong dtype (complex ones included), shape or device, or ``seq_idx``, ``cu_seqlens`` or
            ``return_varlen_states``.

    Signature: mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined.
    """
    refuse_options(
        "mamba_chunk_scan_combined", seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states
    )
    if D is not None and D.dim() == 1 and x.dim() == 4:
        D = D[:, None].expand(-1, x.shape[-1])
    low, high = map(float, dt_limit)
    args = (x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, low, high, return_final_states)
    out, final_states = torch.ops.klfast.mamba_chunk_scan.default(*args)
    return (out, final_states) if return_final_states else out
