"""Qwen3-Next (transformers.models.qwen3_next): gated delta nets and gated attention, with experts.

Norms are those of Qwen3.5 (modeling_qwen3_next.py, Qwen3NextRMSNorm.forward and Qwen3NextRMSNormGated.forward, 5.23.0).
The rows of in_proj_qkvz go key head by key head, so a use is not one range of rows
(Qwen3NextGatedDeltaNet.fix_query_key_value_ordering).
"""

from __future__ import annotations

import functools
from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "Qwen3NextForCausalLM")
    mixer = functools.partial(_mixer, lowering.rotary(build, model.model.rotary_emb))
    sublayers = [Sublayer(mixer, "input_layernorm"), Sublayer(_mlp, "post_attention_layernorm")]
    return lowering.decoder(build, model, {"Qwen3NextDecoderLayer": sublayers})


def _mixer(angles: Columns, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if block.block_type != "linear_attention":
        build.expect(block.self_attn, "Qwen3NextAttention")
        names = lowering.AttentionNames(q_norm="q_norm", k_norm="k_norm")
        lowering.attention(build, block.self_attn, x, out, angles, names=names, gated=True)
        return
    mixer = block.linear_attn
    build.expect(mixer, "Qwen3NextGatedDeltaNet")
    lowering.require_silu(mixer.activation)
    key, value, heads, groups = mixer.key_dim, mixer.value_dim, mixer.num_v_heads, mixer.num_k_heads
    qkvz, gates = build.buffer("delta.qkvz", 2 * key + 2 * value), build.buffer("delta.gates", 2 * heads)
    qkv, mixed = (build.buffer(f"delta.{name}", 2 * key + value) for name in ("qkv", "mixed"))
    z, a, b = (build.buffer(f"delta.{name}", width) for name, width in (("z", value), ("a", heads), ("b", heads)))
    build.project(mixer.in_proj_qkvz, x, qkvz)
    build.project(mixer.in_proj_ba, x, gates)
    for fused, parts in ((qkvz, (*qkv.split(key, key, value), z)), (gates, (b, a))):
        first = 0
        for part in parts:
            build.pick_heads(groups, first, fused, part)
            first += part.width // groups
    build.convolve(mixer.conv1d, True, qkv, mixed)
    lowering.delta_heads(build, mixer, mixed, z, a, b, out)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if hasattr(block.mlp, "experts"):
        build.expect(block.mlp, "Qwen3NextSparseMoeBlock")
        experts.with_shared_expert(build, block.mlp, block.mlp.gate.norm_topk_prob, x, out)
    else:
        lowering.mlp(build, block.mlp, x, out, "Qwen3NextMLP")


FAMILY = Family(
    model_type="qwen3_next",
    mixers={"Qwen3NextGatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3NextRMSNorm": common.zero_centred_rms_norm, "Qwen3NextRMSNormGated": common.norm_before_gate},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
