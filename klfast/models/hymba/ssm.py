"""The state-space branch's convolution and scan: klfast's ops, and their substitutes where gradients are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from klfast import ops
from klfast.dispatch import pins
from klfast.dispatch.arguments import CausalConv1d, CausalConv1dUpdate, SelectiveScan
from klfast.reference import ssm as reference_ssm


def causal_conv1d_fn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """Compute ops.causal_conv1d_fn in plain torch, for gradients. A training script may replace it by a faster one."""
    pins.slow_path("causal_conv1d_fn", list(x.shape), pins.NO_GRADIENTS)
    return reference_ssm.causal_conv1d(CausalConv1d(x, weight, bias, None, None, activation == "silu"))


def mamba_selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute ops.selective_scan_fn in plain torch, for gradients. A training script may replace it by a faster one."""
    pins.slow_path("selective_scan_fn", list(u.shape), pins.NO_GRADIENTS)
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    y, last = reference_ssm.selective_scan(SelectiveScan(u, delta, A, B, C, D, z, delta_bias, None, delta_softplus))
    return (y, last) if return_last_state else y


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None
) -> torch.Tensor:
    """Apply silu(causal depthwise convolution) to x [B, D, L]; ``state`` [B, D, W] of earlier inputs is updated."""
    if state is not None:
        if _gradients(x, weight):
            args = CausalConv1dUpdate(x, state.detach(), weight, bias, True)
            return reference_ssm.causal_conv1d_update(args)
        return ops.causal_conv1d_update(x, state, weight, bias, activation="silu")
    function: Callable[..., Any] = causal_conv1d_fn if _gradients(x, weight) else ops.causal_conv1d_fn
    y: torch.Tensor = function(x, weight, bias, activation="silu")
    return y


def last_inputs(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return a copy of the last ``width`` inputs [B, D, width] of x [B, D, L], with zeros in front if L < width."""
    kept = x.new_zeros(*x.shape[:2], width)
    taken = min(width, x.shape[-1])
    kept[..., width - taken :] = x.detach()[..., x.shape[-1] - taken :]
    return kept


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    state: torch.Tensor | None,
    want_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y [B, D, L] and, if wanted, the last state, float32 [B, D, N].

    u, delta, z [B, D, L]; A [D, N]; B, C [B, N, L]; D, delta_bias [D]; the step size is softplus(delta + delta_bias);
    ``state``, float32 [B, D, N], is the state before (it may be updated in place), None for zeros. Gradients end at it.
    """
    out: Any
    if state is None:
        function: Callable[..., Any] = mamba_selective_scan if _gradients(u, delta, A) else ops.selective_scan_fn
        out = function(u, delta, A, B, C, D, z, delta_bias, True, return_last_state=want_state)
        return (out[0], out[1].detach()) if want_state else (out, None)
    if _gradients(u, delta, A):
        B, C = B.unsqueeze(1), C.unsqueeze(1)
        y, last = reference_ssm.selective_scan(SelectiveScan(u, delta, A, B, C, D, z, delta_bias, state, True))
        return y, last.detach()
    if u.shape[-1] > 1:
        out = ops.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, True, True, state)
        return out[0], out[1]
    step = (u[..., 0], delta[..., 0], A, B[..., 0], C[..., 0], D, z[..., 0], delta_bias)
    return ops.selective_state_update(state, *step, dt_softplus=True).unsqueeze(-1), state


def _gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
