"""Granite-4.0-H (transformers.models.granitemoehybrid): Mamba-2 and attention in turn, with or without experts.

Logits are divided by ``logits_scaling`` (modeling_granitemoehybrid.py, GraniteMoeHybridForCausalLM.forward, 5.23.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, LogitRule, Mixer, Rows, split


class _Config(Protocol):
    logits_scaling: float


class _MLP(Protocol):
    hidden_size: int


def _logits(config: _Config) -> LogitRule:
    return LogitRule(scale=1 / config.logits_scaling)


def _mlp_rows(mlp: _MLP) -> Mapping[str, Rows]:
    return {"input_linear": split(gate=mlp.hidden_size, up=mlp.hidden_size)}


FAMILY = Family(
    model_type="granitemoehybrid",
    mixers={"GraniteMoeHybridMambaLayer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"GraniteMoeHybridRMSNorm": common.rms_norm, "GraniteMoeHybridRMSNormGated": common.gated_rms_norm},
    rows={"GraniteMoeHybridMambaLayer": common.mamba2_rows, "GraniteMoeHybridMLP": _mlp_rows},
    blocks=Blocks("layers"),
    logits=_logits,
)
