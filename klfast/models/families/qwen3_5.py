"""Qwen3.5, dense and with experts (transformers.models.qwen3_5, qwen3_5_moe): gated delta nets and gated attention.

Norms of blocks store their weights around zero; the one of a head comes before its gate (modeling_qwen3_5.py,
Qwen3_5RMSNorm.forward and Qwen3_5RMSNormGated.forward, 5.23.0). Logits are the head's product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import FUSED, Blocks, Family, Mixer, Rows, plain, split
from klfast.models.families.lowering import Sublayer


class _DeltaNet(Protocol):
    key_dim: int
    value_dim: int


def _rows(mixer: _DeltaNet) -> Mapping[str, Rows]:
    return {"in_proj_qkv": split(q=mixer.key_dim, k=mixer.key_dim, v=mixer.value_dim)}


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
    mixer = functools.partial(_mixer, lowering.rotary(build, model.model.rotary_emb))
    sublayers = [Sublayer(mixer, "input_layernorm"), Sublayer(_mlp, "post_attention_layernorm")]
    block = type(model).__name__.replace("ForCausalLM", "DecoderLayer")
    return lowering.decoder(build, model, {block: sublayers})


def _mixer(angles: Columns, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if block.block_type != "linear_attention":
        build.expect(block.self_attn, "Qwen3_5Attention", "Qwen3_5MoeAttention")
        names = lowering.AttentionNames(q_norm="q_norm", k_norm="k_norm")
        lowering.attention(build, block.self_attn, x, out, angles, names=names, gated=True)
        return
    build.expect(block.linear_attn, "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
    lowering.delta_net(build, block.linear_attn, x, out, fused="in_proj_qkv")


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if hasattr(block.mlp, "experts"):
        build.expect(block.mlp, "Qwen3_5MoeSparseMoeBlock")
        experts.with_shared_expert(build, block.mlp, True, x, out)
    else:
        lowering.mlp(build, block.mlp, x, out, "Qwen3_5MLP")


_FUSED = (*FUSED, ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))  # as vLLM has them

FAMILY = Family(
    model_type="qwen3_5_text",
    mixers={"Qwen3_5GatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3_5RMSNorm": common.zero_centred_rms_norm, "Qwen3_5RMSNormGated": common.norm_before_gate},
    rows={"Qwen3_5GatedDeltaNet": _rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
    fused=_FUSED,
)
MOE = Family(
    model_type="qwen3_5_moe_text",
    mixers={"Qwen3_5MoeGatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3_5MoeRMSNorm": common.zero_centred_rms_norm, "Qwen3_5MoeRMSNormGated": common.norm_before_gate},
    rows={"Qwen3_5MoeGatedDeltaNet": _rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
    fused=_FUSED,
)
