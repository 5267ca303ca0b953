"""``Norm``: what a root-mean-square normalisation computes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """The root-mean-square normalisation that a module computes: weight v / sqrt(mean(v^2) + eps).

    Attributes:
        weight: [D].
        eps: added to the mean.
        group_size: number of channels that share a mean; None for all.
        norm_before_gate: a gate z multiplies the result by silu(z); else v is x silu(z).
        gate_activation: "silu" or "sigmoid".
        weight_offset: added to the weight; 1 where weights are stored around zero.
        keeps_dtype: the result has x's dtype; else the wider of x's and the weight's.
    """

    weight: torch.Tensor
    eps: float
    group_size: int | None = None
    norm_before_gate: bool = False
    gate_activation: str = "silu"
    weight_offset: float = 0.0
    keeps_dtype: bool = False
