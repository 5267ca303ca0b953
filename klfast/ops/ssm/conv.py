"""The causal convolution of state-space layers: schemas, checks, fakes and public wrappers."""

from __future__ import annotations

import torch

from klfast.backends.operands import empty_channel_last
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import CausalConv1d, CausalConv1dUpdate, schema
from klfast.dispatch.checks import check_sizes, public, refuse_options
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
