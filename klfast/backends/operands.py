"""What every backend and the ops make of an op's arguments: heads, targets, outputs, layouts."""

from __future__ import annotations

import torch

from klfast.dispatch import registry
from klfast.quant.types import Layout, QuantizedTensor, QuantSpec

FEW_ROWS = 8  # for these the kernels read a weight as it lies, at the speed of memory


def head_rows(weight, layout):
    return weight.shape[1 if layout == Layout.TILED.value else 0]


def as_head(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> torch.Tensor | QuantizedTensor:
    """A head as linear_divergence's caller gave it, from the op's arguments; ``features`` is H."""
    if scale is None:
        return weight
    spec = QuantSpec(bits, group_size, zero_point is None)
    return QuantizedTensor(weight, scale, zero_point, (head_rows(weight, layout), features), spec, Layout(layout))


def flat_targets(targets: torch.Tensor, tokens: int) -> torch.Tensor:
    """Targets of every student token, [S * T], from [S, ..., T] or the teacher's [..., T]."""
    return targets.reshape(-1).repeat(tokens // targets.numel()) if targets.numel() else targets.reshape(-1)


def empty_channel_last(x):
    """[B, D, L] uninitialised, in memory [B, L, D]: what follows (transposed) is a linear layer."""
    batch, channels, length = x.shape
    return x.new_empty(batch, length, channels).transpose(1, 2)


def preferred_layout(device: torch.device) -> Layout:
    """What the kernels for a device read fastest."""
    return (
        Layout.TILED
        if registry.has_kernel("dequant_matmul", device.type.upper()) and device.type != "cpu"
        else Layout.PLAIN
    )
