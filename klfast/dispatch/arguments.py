"""The arguments of the ops without quantized weights, by name: schemas are made of them, and kernels take them whole.

Tensors are float32, bfloat16 or float16, of any strides.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, NamedTuple

import torch

Written = Annotated[torch.Tensor, "(a!)"]  # the op writes to it in place
_NAMES = {torch.Tensor: "Tensor", torch.dtype: "ScalarType", bool: "bool", float: "float", int: "int", str: "str"}


def schema(name: str, arguments: type, returns: str) -> str:
    """Return an op's torch.library schema, made of the fields of its arguments (a NamedTuple) and what it returns."""
    hints = typing.get_type_hints(arguments, include_extras=True)
    return f"{name}({', '.join(f'{_in_schema(hint)} {field}' for field, hint in hints.items())}) -> {returns}"


def union_members(hint: object) -> tuple[Any, ...]:
    """Return the members of a union: ``A | B``, or ``Optional[A]``, as Python 3.10 reads hints of what may be None."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else ()


def _in_schema(hint: object) -> str:
    if kinds := union_members(hint):
        [kind] = [each for each in kinds if each is not type(None)]
        return f"{_in_schema(kind)}?"
    if typing.get_origin(hint) is Annotated:
        base, note = typing.get_args(hint)
        return f"{_NAMES[base]}{note}"
    return _NAMES[typing.cast(type, hint)]


class Linear(NamedTuple):
    """x [..., K], weight [N, K], bias [N]; the result is rounded to x's dtype, then to ``dtype`` (x's by default)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype | None


class DecodeAttention(NamedTuple):
    """One query a head on every key: q [B, H, Dk], k [B, G, S, Dk], v [B, G, S, Dv]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


class GatheredLogits(NamedTuple):
    """Hidden states [S, T, H] of S students, a head [V, H], and int64 [T, J]: rows of it for each token."""

    hidden: torch.Tensor
    head: torch.Tensor
    rows: torch.Tensor


class RmsNorm(NamedTuple):
    """x and gate [A, B, D], weight [D]; the mean goes over each run of ``group_size`` channels.

    The weight is ``weight + weight_offset``; the gate is multiplied in before the mean is taken, or after all else.
    """

    x: torch.Tensor
    weight: torch.Tensor
    gate: torch.Tensor | None
    eps: float
    group_size: int
    norm_before_gate: bool
    sigmoid_gate: bool
    weight_offset: float


class CausalConv1d(NamedTuple):
    """x [B, D, L], weight [D, W], bias [D], states [B, D, W-1]; the last inputs go to ``final_states_out``."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    initial_states: torch.Tensor | None
    final_states_out: Written | None
    silu: bool


class CausalConv1dUpdate(NamedTuple):
    """x [B, D, L] follows conv_state [B, D, S], S at least W-1, which moves on in place; weight [D, W], bias [D].

    With ``cache_seqlens`` (int [B]) the state is a ring: step t of a sequence lies at t % S, and x follows that many
    steps. With ``conv_state_indices`` (int [B]) it is a cache [C, D, S]: they say which of its states belongs to each
    entry of the batch; ``pad_slot_id``: none.
    """

    x: torch.Tensor
    conv_state: Written
    weight: torch.Tensor
    bias: torch.Tensor | None
    silu: bool
    cache_seqlens: torch.Tensor | None = None
    conv_state_indices: torch.Tensor | None = None
    pad_slot_id: int = -1


class SelectiveScan(NamedTuple):
    """u, delta, z [B, D, L]; A [D, N]; B, C [B, G, N, L] or [D, N]; D, delta_bias [D]; initial_states [B, D, N]."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    initial_states: torch.Tensor | None
    delta_softplus: bool


class SelectiveStateUpdate(NamedTuple):
    """state [B, H, P, N], moved on in place; x, dt, z [B, H, P]; A [H, P, N]; B, C [B, G, N]; D, dt_bias [H, P].

    ``state_batch_indices`` and ``pad_slot_id`` are as conv_state_indices in CausalConv1dUpdate.
    """

    state: Written
    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None
    dt_softplus: bool
    state_batch_indices: torch.Tensor | None = None
    pad_slot_id: int = -1


class MambaChunkScan(NamedTuple):
    """Arguments of Mamba-2's scan, with one A and one dt a head.

    x, z [B, L, H, P]; dt [B, L, H]; A, dt_bias [H]; B, C [B, L, G, N]; D [H, P]; initial_states [B, H, P, N].
    """

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None
    initial_states: torch.Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    return_final_states: bool


class GatedDeltaRule(NamedTuple):
    """q, k [B, L, G, K]; v [B, L, H, V]; g [B, L, H] or [B, L, H, K]; beta [B, L, H]; state [B, H, K, V], in place."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    state: Written
    scale: float
    normalize: bool
