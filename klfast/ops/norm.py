"""Root-mean-square normalisation, gated if asked: the norms of Mamba-2 and Hymba."""

from __future__ import annotations

import torch

from klfast import reference
from klfast.core.errors import InvalidInputError
from klfast.dispatch.checks import check_sizes, public
from klfast.dispatch.registry import define


def _check_rms_norm(x, weight, gate, eps, group_size):
    op = "rms_norm"
    check_sizes(op, {}, x=(x, "ABD"), weight=(weight, "D"), gate=(gate, "ABD"))
    if group_size < 1 or x.shape[-1] % group_size:
        raise InvalidInputError(f"{op}: group_size must divide the {x.shape[-1]} channels, got {group_size}")


def _fake_rms_norm(x, weight, gate, eps, group_size):
    return torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)


define(
    "rms_norm(Tensor x, Tensor weight, Tensor? gate, float eps, int group_size) -> Tensor",
    check=_check_rms_norm,
    fake=_fake_rms_norm,
    reference=reference.rms_norm,
)


@public
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
) -> torch.Tensor:
    """Root-mean-square normalisation: weight v / sqrt(mean(v^2) + eps) with v = x silu(gate), or x without a gate.

    Args:
        x: [..., D].
        weight: [D].
        gate: as x, optional.
        group_size: take the mean over each run of so many channels, not over all; divides D.

    Returns:
        x's shape, in the wider of x's and weight's dtypes.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or group size.
    """
    shape = x.shape
    if x.dim() != 3:
        x = x.reshape(-1, 1, shape[-1]) if x.dim() else x
        gate = None if gate is None else gate.reshape(-1, 1, gate.shape[-1])
    args = (x, weight, gate, eps, group_size or (weight.shape[-1] if weight.dim() else 1))
    return torch.ops.klfast.rms_norm.default(*args).view(shape)
