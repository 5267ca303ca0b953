"""Qwen3.5, dense and with experts (transformers.models.qwen3_5, qwen3_5_moe): gated delta nets and gated attention.

Norms of blocks store their weights around zero; the one of a head comes before its gate (modeling_qwen3_5.py,
Qwen3_5RMSNorm.forward and Qwen3_5RMSNormGated.forward, 5.23.0). Logits are the head's product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from klfast.engine.builder import Builder, NormSpec
from klfast.engine.columns import Columns
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, Mixer, Rows, plain, split


class _DeltaNet(Protocol):
    key_dim: int
    value_dim: int


def _rows(mixer: _DeltaNet) -> Mapping[str, Rows]:
    return {"in_proj_qkv": split(q=mixer.key_dim, k=mixer.key_dim, v=mixer.value_dim)}


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
    block = type(model).__name__.replace("ForCausalLM", "DecoderLayer")
    return lowering.decoder(build, model, block, _norm, _mixer, _mlp, lowering.DecoderNames())


def _norm(module: Any) -> NormSpec:
    return NormSpec(module.eps, weight_offset=1.0)


def _mixer(build: Builder, block: Any, angles: Columns | None, x: Columns, out: Columns) -> None:
    if block.block_type != "linear_attention":
        build.expect(block.self_attn, "Qwen3_5Attention", "Qwen3_5MoeAttention")
        names = lowering.AttentionNames(q_norm="q_norm", k_norm="k_norm")
        lowering.attention(build, block.self_attn, x, out, angles, names=names, norm=_norm, gated=True)
        return
    mixer = block.linear_attn
    build.expect(mixer, "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
    heads, value = mixer.num_v_heads, mixer.value_dim
    qkv, z = build.buffer("delta.qkv", 2 * mixer.key_dim + value), build.buffer("delta.z", value)
    a, b = build.buffer("delta.a", heads), build.buffer("delta.b", heads)
    for layer, columns in ((mixer.in_proj_qkv, qkv), (mixer.in_proj_z, z), (mixer.in_proj_a, a), (mixer.in_proj_b, b)):
        build.project(layer, x, columns)
    lowering.delta_net(build, mixer, qkv, z, a, b, out)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    build.expect(block.mlp, "Qwen3_5MLP", "Qwen3_5MoeSparseMoeBlock")
    if hasattr(block.mlp, "experts"):
        experts.with_shared_expert(build, block.mlp, True, x, out)
    else:
        lowering.silu_mlp(build, block.mlp, x, out)


FAMILY = Family(
    model_type="qwen3_5_text",
    mixers={"Qwen3_5GatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3_5RMSNorm": common.zero_centred_rms_norm, "Qwen3_5RMSNormGated": common.norm_before_gate},
    rows={"Qwen3_5GatedDeltaNet": _rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
MOE = Family(
    model_type="qwen3_5_moe_text",
    mixers={"Qwen3_5MoeGatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3_5MoeRMSNorm": common.zero_centred_rms_norm, "Qwen3_5MoeRMSNormGated": common.norm_before_gate},
    rows={"Qwen3_5MoeGatedDeltaNet": _rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
