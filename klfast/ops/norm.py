"""Root-mean-square normalisation, optionally gated: the norms of all hybrids."""

from __future__ import annotations

import torch

from klfast import reference
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import RmsNorm, schema
from klfast.dispatch.checks import check_sizes, public
from klfast.dispatch.registry import define


def _check(a: RmsNorm) -> None:
    check_sizes("rms_norm", {}, x=(a.x, "ABD"), weight=(a.weight, "D"), gate=(a.gate, "ABD"))
    if a.group_size < 1 or a.x.shape[-1] % a.group_size:
        raise InvalidInputError(f"rms_norm: group_size must divide the {a.x.shape[-1]} channels, got {a.group_size}")


def _fake(a: RmsNorm) -> torch.Tensor:
    return torch.empty(a.x.shape, dtype=torch.promote_types(a.x.dtype, a.weight.dtype), device=a.x.device)


rms_norm_op = define(
    schema("rms_norm", RmsNorm, "Tensor"), arguments=RmsNorm, check=_check, fake=_fake, reference=reference.rms_norm
)


@public
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    gate_activation: str = "silu",
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """Normalise by the root mean square: weight v / sqrt(mean(v^2) + eps) with v = x silu(gate), or x without a gate.

    Args:
        x: [..., D].
        weight: [D].
        gate: like x, optional.
        group_size: take the mean over each group of this many channels, not over all; divides D.
        norm_before_gate: normalise x alone and multiply the result by silu(gate).
        gate_activation: "silu" or "sigmoid".
        weight_offset: added to the weight; 1 where models store weights around zero.

    Returns:
        x's shape, in the wider of x's and weight's dtypes.

    Raises:
        InvalidInputError: a wrong dtype, shape, device, group size or activation.

    Argument names are those of mamba_ssm's rmsnorm_fn, where it has them.
    """
    if gate_activation not in ("silu", "sigmoid"):
        raise InvalidInputError(f'rms_norm: gate_activation must be "silu" or "sigmoid", got {gate_activation!r}')
    shape = x.shape
    if gate is not None and gate.shape != shape:
        raise InvalidInputError(f"rms_norm: gate must be like x, {list(shape)}, got {list(gate.shape)}")
    if shape[-1:] == (0,):
        raise InvalidInputError(f"rms_norm: x must have channels, got {list(shape)}")
    if x.dim() != 3:
        x = x.reshape(-1, 1, shape[-1]) if x.dim() else x
        gate = None if gate is None else gate.reshape(-1, 1, gate.shape[-1])
    group_size = group_size or (weight.shape[-1] if weight.dim() else 1)
    args = (x, weight, gate, eps, group_size, norm_before_gate, gate_activation == "sigmoid", weight_offset)
    return rms_norm_op(*args).view(shape)
