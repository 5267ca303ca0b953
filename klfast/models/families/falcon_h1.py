"""Falcon-H1 (transformers.models.falcon_h1): Mamba-2 and attention in each block, with muP multipliers.

Logits are multiplied by ``lm_head_multiplier`` (modeling_falcon_h1.py, FalconH1ForCausalLM.forward, 5.23.0). The gated
norm may come before the gate, and its result has its input's dtype (FalconH1RMSNormGated.forward).
"""

from __future__ import annotations

from typing import Protocol

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, LogitRule, Mixer, Norm


class _GatedNorm(common.RMSNorm, Protocol):
    n_groups: int
    norm_before_gate: bool


class _Config(Protocol):
    lm_head_multiplier: float


def _gated_norm(norm: _GatedNorm) -> Norm:
    group_size = norm.weight.shape[0] // norm.n_groups
    return Norm(norm.weight, norm.variance_epsilon, group_size, norm.norm_before_gate, keeps_dtype=True)


def _logits(config: _Config) -> LogitRule:
    return LogitRule(scale=config.lm_head_multiplier)


FAMILY = Family(
    model_type="falcon_h1",
    mixers={"FalconH1Mixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"FalconH1RMSNorm": common.rms_norm, "FalconH1RMSNormGated": _gated_norm},
    rows={"FalconH1Mixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=_logits,
)
