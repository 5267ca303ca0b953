"""Facts shared by several families: the functions of their mixers, norms, the rows of fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from klfast.models.families.base import Rows, split
from klfast.nn.norm import Norm

CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
MAMBA1_FUNCTIONS = (*CONVOLUTIONS, "mamba_selective_scan", "mamba_selective_state_update")
MAMBA2_FUNCTIONS = (*CONVOLUTIONS, "mamba2_chunk_scan", "mamba2_selective_state_update")
DELTA_FUNCTIONS = (*CONVOLUTIONS, "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


class RMSNorm(Protocol):
    """Attributes of transformers' usual RMS norm."""

    weight: torch.Tensor
    variance_epsilon: float


class ZeroCentredRMSNorm(Protocol):
    """Attributes of Qwen3.5's norm of blocks."""

    weight: torch.Tensor
    eps: float


class GatedRMSNorm(RMSNorm, Protocol):
    """Attributes of Mamba-2's gated norm."""

    group_size: int


class HeadNorm(RMSNorm, Protocol):
    """Attributes of the gated norm of a delta net's heads."""

    activation: str


class Mamba1Mixer(Protocol):
    """Attributes of a Mamba mixer."""

    intermediate_size: int
    ssm_state_size: int
    time_step_rank: int


class Mamba2Mixer(Protocol):
    """Attributes of a Mamba-2 mixer."""

    intermediate_size: int
    ssm_state_size: int
    n_groups: int
    num_heads: int


class ShortConvolution(Protocol):
    """Attributes of LFM2's short convolution."""

    conv: nn.Conv1d


def rms_norm(norm: RMSNorm) -> Norm:
    """Return the parameters of transformers' usual RMS norm: ``weight * normed.to(x.dtype)``."""
    return Norm(norm.weight, norm.variance_epsilon)


def gated_rms_norm(norm: GatedRMSNorm) -> Norm:
    """Return the parameters of Mamba-2's norm: the gate comes first, each group of channels has its own mean."""
    return Norm(norm.weight, norm.variance_epsilon, getattr(norm, "group_size", None))


def zero_centred_rms_norm(norm: ZeroCentredRMSNorm) -> Norm:
    """Return the parameters of Qwen3.5's norm: ``((1 + weight) * normed).to(x.dtype)``."""
    return Norm(norm.weight, norm.eps, weight_offset=1.0, keeps_dtype=True)


def norm_before_gate(norm: HeadNorm) -> Norm:
    """Return the parameters of the norm of a delta net's head: ``(weight * normed * activation(gate)).to(x.dtype)``."""
    return Norm(
        norm.weight, norm.variance_epsilon, norm_before_gate=True, gate_activation=norm.activation, keeps_dtype=True
    )


def mamba1_rows(mixer: Mamba1Mixer) -> Mapping[str, Rows]:
    """Return the row ranges in a Mamba mixer: the scan's input and the gate; the step size, B and C."""
    inner, states = mixer.intermediate_size, mixer.ssm_state_size
    return {"in_proj": split(x=inner, z=inner), "x_proj": split(dt=mixer.time_step_rank, B=states, C=states)}


def mamba2_rows(mixer: Mamba2Mixer) -> Mapping[str, Rows]:
    """Return the row ranges in a Mamba-2 mixer: the gate, the scan's input, B, C and the step size."""
    inner, states = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    return {"in_proj": split(z=inner, x=inner, B=states, C=states, dt=mixer.num_heads)}


def short_convolution_rows(mixer: ShortConvolution) -> Mapping[str, Rows]:
    """Return the row ranges in LFM2's short convolution: it runs over B x, its result is multiplied by C."""
    channels = mixer.conv.in_channels
    return {"in_proj": split(B=channels, C=channels, x=channels)}
