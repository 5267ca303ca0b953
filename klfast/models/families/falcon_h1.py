"""Falcon-H1 (transformers.models.falcon_h1): Mamba-2 and attention in each block, with muP multipliers.

Logits are multiplied by ``lm_head_multiplier`` (modeling_falcon_h1.py, FalconH1ForCausalLM.forward, 5.23.0). The gated
norm may come before the gate, and its result has its input's dtype (FalconH1RMSNormGated.forward).
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, LogitRule, Mixer
from klfast.models.families.lowering import Sublayer
from klfast.nn.norm import Norm


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


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "FalconH1ForCausalLM")
    base = model.model
    if base.lm_head_multiplier != model.config.lm_head_multiplier:
        raise CannotLowerError("lm_head_multiplier is not its configuration's")
    mixers = functools.partial(_mixers, lowering.rotary(build, base.rotary_emb))
    blocks = {"FalconH1DecoderLayer": [Sublayer(mixers, "input_layernorm"), Sublayer(_mlp, "pre_ff_layernorm")]}
    scale = base.embedding_multiplier
    return lowering.decoder(build, model, blocks, last_norm="final_layernorm", embedding_scale=scale)


def _mixers(angles: Columns, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mamba, attention = block.mamba, block.self_attn
    scaled, other = build.buffer("falcon_h1.scaled", x.width), build.buffer("falcon_h1.attention", x.width)
    build.scale(mamba.ssm_in_multiplier, x, scaled)
    [factors] = build.tensors((mamba._buffers, "mup_vector"))
    lowering.mamba2(build, mamba, scaled, out, "FalconH1Mixer", factors=factors.flatten())
    build.scale(block.ssm_out_multiplier, out, out)
    build.scale(block.attention_in_multiplier, x, scaled)
    build.expect(attention, "FalconH1Attention")
    lowering.attention(build, attention, scaled, other, angles, key_scale=attention.key_multiplier)
    build.combine("add", out, other, out, factor=block.attn_out_multiplier)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mlp = block.feed_forward
    lowering.mlp(build, mlp, x, out, "FalconH1MLP", gate_scale=mlp.gate_multiplier)
    build.scale(mlp.down_multiplier, out, out)


FAMILY = Family(
    model_type="falcon_h1",
    mixers={"FalconH1Mixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"FalconH1RMSNorm": common.rms_norm, "FalconH1RMSNormGated": _gated_norm},
    rows={"FalconH1Mixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=_logits,
    lower=_lower,
)
