"""klfast's versions of the functions that transformers' mixers call, with the same argument names.

Other keyword arguments are ignored. The signatures are those of transformers 5.17 to 5.24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from klfast.ops import ssm

SILU = ("silu", "swish")


class Replacement(NamedTuple):
    """A substitute for a function of transformers, the op that it runs, and the CUDA package that has the original."""

    function: Callable[..., torch.Tensor | tuple[torch.Tensor | None, ...]]
    op: str
    package: str


def _conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: Any = None,
    **_: object,
) -> torch.Tensor:
    y: Any
    if activation is None or activation in SILU:
        y = ssm.causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation)
    else:
        y = _activated(cast(Any, ssm.causal_conv1d_fn(x, weight, bias, seq_idx)), activation)
    found: torch.Tensor = y
    return found


def _conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    if activation is None or activation in SILU:
        return ssm.causal_conv1d_update(x, conv_state, weight, bias, activation, **kwargs)
    return _activated(ssm.causal_conv1d_update(x, conv_state, weight, bias, **kwargs), activation)


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply an activation that klfast's convolutions do not compute."""
    from transformers.activations import ACT2FN

    y: torch.Tensor = ACT2FN[activation](x).to(x.dtype)
    return y


def _scan(
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
    **_: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return ssm.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _step(
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
    **_: object,
) -> torch.Tensor:
    return ssm.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _chunk_scan(
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
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    **_: object,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return ssm.mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        cu_seqlens,
        dt_softplus,
        dt_limit,
        return_final_states,
        return_varlen_states,
    )


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run either form of the rule; a float32 state that is also wanted back is updated in place.

    Mixers read it from their cache and copy the final state there, so nothing is left to copy.
    """
    if initial_state is not None and initial_state.dtype == torch.float32 and output_final_state and cu_seqlens is None:
        y = ssm.gated_delta_rule_update(
            initial_state, query, key, value, g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel
        )
        return y, initial_state
    run = ssm.chunk_kda if g.dim() == 4 else ssm.chunk_gated_delta_rule
    return run(query, key, value, g, beta, None, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)


REPLACEMENTS = {
    "causal_conv1d_fn": Replacement(_conv1d, "causal_conv1d", "causal_conv1d"),
    "causal_conv1d_update": Replacement(_conv1d_update, "causal_conv1d_update", "causal_conv1d"),
    "mamba_selective_scan": Replacement(_scan, "selective_scan", "mamba_ssm"),
    "mamba_selective_state_update": Replacement(_step, "selective_state_update", "mamba_ssm"),
    "mamba2_chunk_scan": Replacement(_chunk_scan, "mamba_chunk_scan", "mamba_ssm"),
    "mamba2_selective_state_update": Replacement(_step, "selective_state_update", "mamba_ssm"),
    "torch_chunk_gated_delta_rule": Replacement(_delta_rule, "gated_delta_rule", "fla"),
    "torch_recurrent_gated_delta_rule": Replacement(_delta_rule, "gated_delta_rule", "fla"),
    "chunk_kimi_delta_attention": Replacement(_delta_rule, "gated_delta_rule", "fla"),
    "recurrent_kimi_delta_attention": Replacement(_delta_rule, "gated_delta_rule", "fla"),
}
