"""The recurrences of Mamba and Mamba-2: schemas, checks, fakes and public wrappers."""

from __future__ import annotations

import math

import torch

from klfast.backends.ssm_operands import empty_channel_last
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import MambaChunkScan, SelectiveScan, SelectiveStateUpdate, schema
from klfast.dispatch.checks import check_groups, check_sizes, check_slots, public, same_device
from klfast.dispatch.registry import define
from klfast.ops.ssm import packed
from klfast.reference import ssm as reference_ssm

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
        B=(a.B, "DN" if a.B.dim() == 2 else "BGNL"),
        C=(a.C, "DN" if a.C.dim() == 2 else "BGNL"),
        D=(a.D, "D"),
        z=(a.z, "BDL"),
        delta_bias=(a.delta_bias, "D"),
        initial_states=(a.initial_states, "BDN"),
    )
    check_groups(op, "channels", sizes["D"], sizes.get("G", 1))


def _fake_selective_scan(a: SelectiveScan) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_channel_last(a.u), a.u.new_empty(a.u.shape[0], *a.A.shape, dtype=torch.float32)


selective_scan_op = define(
    schema("selective_scan", SelectiveScan, "(Tensor, Tensor)"),
    arguments=SelectiveScan,
    check=_check_selective_scan,
    fake=_fake_selective_scan,
    reference=reference_ssm.selective_scan,
)


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
        B, C: [B, N, L], [B, G, N, L] with G a divisor of D, or [D, N], constant in time.
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
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    args = (u, delta, A, B, C, D, z, delta_bias, initial_states, delta_softplus)
    out, last_state = selective_scan_op(*args)
    return (out, last_state) if return_last_state else out


# selective_state_update -------------------------------------------------------------------------------------------


def _check_selective_state_update(a: SelectiveStateUpdate) -> None:
    sizes: dict[str, int] = {}
    op, slots = "selective_state_update", a.state_batch_indices
    check_sizes(
        op,
        sizes,
        state=(a.state, "BHPN" if slots is None else "CHPN"),
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
    if slots is not None:
        check_slots(op, "state_batch_indices", slots, sizes["B"], sizes["C"], a.pad_slot_id)
        same_device(op, a.x, slots)


def _fake_selective_state_update(a: SelectiveStateUpdate) -> torch.Tensor:
    return a.x.new_empty(a.x.shape)


selective_state_update_op = define(
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
    state_batch_indices: torch.Tensor | None = None,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """Take one step of selective_scan_fn's recurrence; ``state`` is updated in place, rounded to its dtype.

    Args:
        state: [B, D, N], or [B, H, P, N] with heads.
        x, dt: [B, D] or [B, H, P]; dt = softplus(dt + dt_bias) with dt_softplus.
        A: real [D, N] or [H, P, N].
        B, C: [B, N] or [B, G, N] with G a divisor of H.
        D, dt_bias: [D] or [H, P], optional.
        z: like x, optional gate.
        state_batch_indices: int [B], optional: state is then a cache [C, ...], and this says which of its entries
            belongs to each of the batch.
        pad_slot_id: the index of entries without a state, whose outputs are zeros; as vLLM has it.

    Returns:
        y in x's shape and dtype.

    Raises:
        InvalidInputError: a wrong dtype (complex ones included), shape or device; an index out of range or given
            twice. On a GPU these are not read back: an index out of range gives NaN there.

    Signature: mamba_ssm.ops.triton.selective_state_update.selective_state_update, plus pad_slot_id.
    """
    headless = state.dim() == 3
    if headless:  # one head that holds all channels
        state, x, dt, A = state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0)
        z = None if z is None else z.unsqueeze(1)
        D, dt_bias = (None if t is None else t.unsqueeze(0) for t in (D, dt_bias))
    if B.dim() == 2:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    args = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id)
    out = selective_state_update_op(*args)
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


mamba_chunk_scan_op = define(
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
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
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
        initial_states: [B, H, P, N], zeros if absent; the first sequence of each row begins with it.
        seq_idx: int [B, L], optional: equal numbers mark a sequence; the next one, of a greater number, begins with
            zeros, and so does a run of negative numbers (padding).
        cu_seqlens: int [N + 1], optional: the limits of N sequences in a batch of 1, instead of seq_idx, or the same.
        return_final_states: also return the last state of each row, float32 [B, H, P, N].
        return_varlen_states: also return the last state of each sequence in cu_seqlens, float32 [N, H, P, N].
        state_dtype: ignored: states are float32.

    Returns:
        y [B, L, H, P] in x's dtype; also the last states that were asked for, in this order.

    Raises:
        InvalidInputError: a wrong dtype (complex ones included), shape or device; a ``seq_idx`` that falls along a row,
            limits that do not rise from 0 to L, or other sequences in one than in the other.

    Signature: mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined.
    """
    if D is not None and D.dim() == 1 and x.dim() == 4:
        D = D[:, None].expand(-1, x.shape[-1])
    try:
        low, high = map(float, dt_limit)
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"mamba_chunk_scan_combined: dt_limit must be (low, high) with low <= high, got {dt_limit!r}"
        ) from None
    args = MambaChunkScan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, low, high, return_final_states)
    if seq_idx is None and cu_seqlens is None and not return_varlen_states:
        out, final_states = mamba_chunk_scan_op(*args)
        return (out, final_states) if return_final_states else out
    out, final_states, varlen_states = _packed(args, seq_idx, cu_seqlens, return_varlen_states)
    states = ((final_states,) if return_final_states else ()) + ((varlen_states,) if return_varlen_states else ())
    return (out, *states) if states else out


def _packed(
    a: MambaChunkScan, seq_idx: torch.Tensor | None, cu_seqlens: torch.Tensor | None, of_each: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scan sequence by sequence: the outputs, the last state of each row and, with ``of_each``, of each sequence."""
    op = "mamba_chunk_scan_combined"
    _check_mamba_chunk_scan(a)
    same_device(op, a.x, seq_idx, cu_seqlens)
    sequences = _sequences(op, a, seq_idx, cu_seqlens, of_each)
    batch, _, heads, dim = a.x.shape
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    states = a.x.new_zeros(batch, heads, dim, a.B.shape[-1], dtype=torch.float32)
    if a.initial_states is not None:
        states.copy_(a.initial_states)
    found, begun = [], -1
    for sequence in sequences:
        here = slice(sequence.row, sequence.row + 1)
        initial = None
        if sequence.row != begun and sequence.number >= 0:
            begun, initial = sequence.row, None if a.initial_states is None else a.initial_states[here]
        x, dt, B, C = map(sequence.of, (a.x, a.dt, a.B, a.C))
        piece = a._replace(
            x=x,
            dt=dt,
            B=B,
            C=C,
            z=None if a.z is None else sequence.of(a.z),
            initial_states=initial,
            return_final_states=True,
        )
        y, last = mamba_chunk_scan_op(*piece)
        sequence.of(out).copy_(y)
        states[here].copy_(last)
        found.append(last)
    return out, states, torch.cat(found) if of_each else states


def _sequences(
    op: str, a: MambaChunkScan, seq_idx: torch.Tensor | None, cu_seqlens: torch.Tensor | None, of_each: bool
) -> list[packed.Sequence]:
    batch, length = a.x.shape[:2]
    by_index = None if seq_idx is None else packed.by_index(op, seq_idx, batch, length)
    if cu_seqlens is None:
        if by_index is None or of_each:
            raise InvalidInputError(f"{op}: return_varlen_states needs cu_seqlens")
        return by_index
    by_limits = packed.by_limits(op, cu_seqlens, batch, length)
    if by_index is not None and not packed.same(by_index, by_limits):
        raise InvalidInputError(f"{op}: seq_idx and cu_seqlens must mark the same sequences; leave one of them out")
    return by_limits
