"""Facts shared by several families: the functions of Mamba-1 and Mamba-2, norms, the rows of fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from klfast.models.families.base import Norm, Rows, split

MAMBA1_FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update")
MAMBA2_FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update")


class RMSNorm(Protocol):
    """Attributes of transformers' usual RMS norm."""

    weight: torch.Tensor
    variance_epsilon: float


class GatedRMSNorm(RMSNorm, Protocol):
    """Attributes of Mamba-2's gated norm."""

    group_size: int


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


def rms_norm(norm: RMSNorm) -> Norm:
    """Return the parameters of transformers' usual RMS norm: ``weight * normed.to(x.dtype)``."""
    return Norm(norm.weight, norm.variance_epsilon)


def gated_rms_norm(norm: GatedRMSNorm) -> Norm:
    """Return the parameters of Mamba-2's norm: the gate comes first, each group of channels has its own mean."""
    return Norm(norm.weight, norm.variance_epsilon, getattr(norm, "group_size", None))


def mamba1_rows(mixer: Mamba1Mixer) -> Mapping[str, Rows]:
    """Return the row ranges in a Mamba mixer: the scan's input and the gate; the step size, B and C."""
    inner, states = mixer.intermediate_size, mixer.ssm_state_size
    return {"in_proj": split(x=inner, z=inner), "x_proj": split(dt=mixer.time_step_rank, B=states, C=states)}


def mamba2_rows(mixer: Mamba2Mixer) -> Mapping[str, Rows]:
    """Return the row ranges in a Mamba-2 mixer: the gate, the scan's input, B, C and the step size."""
    inner, states = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    return {"in_proj": split(z=inner, x=inner, B=states, C=states, dt=mixer.num_heads)}
