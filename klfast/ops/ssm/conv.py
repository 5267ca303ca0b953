"""The causal convolution of state-space layers: schemas, checks, fakes and public wrappers."""

from __future__ import annotations

import torch

from klfast.backends.ssm_operands import empty_channel_last
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import CausalConv1d, CausalConv1dUpdate, schema
from klfast.dispatch.checks import check_integers, check_sizes, check_slots, public, same_device, values_at_hand
from klfast.dispatch.registry import define
from klfast.ops.ssm import packed
from klfast.reference import ssm as reference_ssm


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise InvalidInputError(f'{op}: activation must be None, "silu" or "swish", got {activation!r}')
    return activation is not None


# causal_conv1d ----------------------------------------------------------------------------------------------------


def _check_conv(
    op: str, a: CausalConv1d | CausalConv1dUpdate, state: torch.Tensor | None, state_name: str, dims: str = "BDS"
) -> None:
    sizes: dict[str, int] = {}
    check_sizes(op, sizes, x=(a.x, "BDL"), weight=(a.weight, "DW"), bias=(a.bias, "D"), **{state_name: (state, dims)})
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


causal_conv1d_op = define(
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
    seq_idx: torch.Tensor | None = None,
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
        seq_idx: int [B, L], optional: equal numbers mark a sequence; the next one, of a greater number, begins without
            a past. Where it is negative (padding) the output is 0. Without final states.
        initial_states: [B, D, W-1], zeros if absent; with seq_idx the past of each row's first sequence.
        return_final_states: also return the last W-1 values of seq, [B, D, W-1] in x's dtype.
        final_states_out: written with these; optional.
        activation: None, "silu" or "swish" (the same).

    Returns:
        [B, D, L] in x's dtype, channels side by side in memory; with return_final_states also the final states.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or activation; a ``seq_idx`` that falls along a row, or beside
            final states.

    Signature: causal_conv1d.causal_conv1d_fn.
    """
    silu = _is_silu("causal_conv1d_fn", activation)
    if seq_idx is not None:
        if return_final_states or final_states_out is not None:
            raise InvalidInputError("causal_conv1d_fn: seq_idx goes without final states; leave one or the other out")
        return _packed(CausalConv1d(x, weight, bias, initial_states, None, silu), seq_idx)
    # torch.compile's inductor fails on an op whose output argument is None.
    wanted = return_final_states or torch.compiler.is_compiling()
    if wanted and final_states_out is None and x.dim() == 3 and weight.dim():
        final_states_out = x.new_empty(*x.shape[:2], max(weight.shape[-1] - 1, 0))
    args = (x, weight, bias, initial_states, final_states_out, silu)
    out = causal_conv1d_op(*args)
    if not return_final_states:
        return out
    assert final_states_out is not None  # the op has refused other shapes
    return out, final_states_out


def _packed(a: CausalConv1d, seq_idx: torch.Tensor) -> torch.Tensor:
    """Convolve sequence by sequence, zeros where there is none; the first of a row begins after its initial states."""
    op = "causal_conv1d_fn"
    _check_causal_conv1d(a)
    same_device(op, a.x, seq_idx)
    out = _fake_conv(a)
    in_time, out_in_time = a.x.transpose(1, 2), out.transpose(1, 2)
    begun = -1
    for sequence in packed.by_index(op, seq_idx, a.x.shape[0], a.x.shape[2]):
        if sequence.number < 0:
            sequence.of(out_in_time).zero_()
            continue
        past = None
        if sequence.row != begun:
            begun, past = sequence.row, a.initial_states
            past = None if past is None else past[begun : begun + 1]
        piece = a._replace(x=sequence.of(in_time).transpose(1, 2), initial_states=past)
        sequence.of(out_in_time).copy_(causal_conv1d_op(*piece).transpose(1, 2))
    return out


@public
def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """Return the states after packed sequences, for causal_conv1d_update: the last values of each, zeros before them.

    Args:
        x: [T, D], one sequence behind the other.
        cu_seqlens: int [N + 1], the sequences' limits.
        state_len: how many values to keep.

    Returns:
        [N, D, state_len] in x's dtype, channels side by side in memory.

    Raises:
        InvalidInputError: a wrong shape or dtype; limits that do not rise from 0 to T.

    Signature: causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states.
    """
    op = "causal_conv1d_varlen_states"
    check_sizes(op, {}, x=(x, "TD"))
    if state_len < 0:
        raise InvalidInputError(f"{op}: state_len must be at least 0, got {state_len}")
    sequences = packed.by_limits(op, cu_seqlens, 1, x.shape[0])
    states = x.new_zeros(len(sequences), state_len, x.shape[1])
    for state, (_, first, end, _) in zip(states, sequences, strict=True):
        kept = min(state_len, end - first)
        state[state_len - kept :] = x[end - kept : end]
    return states.transpose(1, 2)


def _check_causal_conv1d_update(a: CausalConv1dUpdate) -> None:
    op, slots, seen = "causal_conv1d_update", a.conv_state_indices, a.cache_seqlens
    _check_conv(op, a, a.conv_state, "conv_state", "BDS" if slots is None else "CDS")
    if slots is not None:
        check_slots(op, "conv_state_indices", slots, a.x.shape[0], a.conv_state.shape[0], a.pad_slot_id)
        same_device(op, a.x, slots)
    if seen is not None:
        check_integers(op, "cache_seqlens", seen, a.x.shape[0])
        same_device(op, a.x, seen)
        if a.conv_state.shape[2] < 1:
            raise InvalidInputError(
                f"{op}: conv_state must hold a value per channel if cache_seqlens is given, got none"
            )
        if any(count < 0 for count in values_at_hand(op, "cache_seqlens", seen)):
            raise InvalidInputError(f"{op}: cache_seqlens must be at least 0, got {int(seen.min())}")


causal_conv1d_update_op = define(
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
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """Continue causal_conv1d_fn with the next steps: x follows conv_state, which is updated in place.

    Args:
        x: [B, D] (one step) or [B, D, L].
        conv_state: [B, D, S], S at least W-1, any float dtype: the last S values seen.
        weight, bias, activation: as in causal_conv1d_fn.
        cache_seqlens: int [B], optional: how many steps each sequence has had. conv_state is then a ring, where step t
            lies at t % S, and its other values stay.
        conv_state_indices: int [B], optional: conv_state is then a cache [C, D, S], and this says which of its entries
            belongs to each of the batch.
        pad_slot_id: the index of entries without a state, whose outputs are zeros; as vLLM has it.

    Returns:
        x's shape and dtype.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or activation; an index out of range or given twice, a negative
            length. On a GPU these are not read back: an index out of range gives NaN there.

    Signature: causal_conv1d.causal_conv1d_update, plus pad_slot_id.
    """
    one_step = x.dim() == 2
    silu = _is_silu("causal_conv1d_update", activation)
    places = (cache_seqlens, conv_state_indices, pad_slot_id)
    args = (x.unsqueeze(-1) if one_step else x, conv_state, weight, bias, silu, *places)
    out = causal_conv1d_update_op(*args)
    return out.squeeze(-1) if one_step else out
