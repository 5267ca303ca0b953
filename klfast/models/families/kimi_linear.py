"""Kimi-Linear (transformers.models.kimi_linear): Kimi Delta Attention and latent attention, with experts.

The norm of a head comes before its gate, a sigmoid (modeling_kimi_linear.py, KimiLinearRMSNormGated.forward, 5.23.0).
Logits are the head's product.
"""

from __future__ import annotations

from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "KimiLinearForCausalLM")
    sublayers = [Sublayer(_mixer, "input_layernorm"), Sublayer(_mlp, "post_attention_layernorm")]
    return lowering.decoder(build, model, {"KimiLinearDecoderLayer": sublayers})


def _mixer(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mixer = block.self_attn
    build.expect(mixer, "KimiLinearDeltaAttention", "KimiLinearAttention")
    if block.block_type == "linear_attention":
        _delta_attention(build, mixer, x, out)
    else:
        _latent_attention(build, mixer, x, out)


def _delta_attention(build: Builder, mixer: Any, x: Columns, out: Columns) -> None:
    """Lower KimiLinearDeltaAttention.forward (5.17.0 and 5.24.0), whose decays are one a channel."""
    gate, width = mixer.forget_gate, mixer.qkv_dim
    build.expect(gate, "KimiLinearForgetGate")
    lowering.require_silu(mixer.activation)
    mixed = build.buffer("delta.mixed", 3 * width)
    lowering.delta_qkv(build, mixer, x, mixed, (width, width, width))
    a, z, y = (build.buffer(f"delta.{name}", width) for name in "azy")
    b = build.buffer("delta.b", mixer.num_heads)
    lowering.project_twice(build, gate.f_a_proj, gate.f_b_proj, x, a)
    lowering.project_twice(build, mixer.g_a_proj, mixer.g_b_proj, x, z)
    build.project(mixer.b_proj, x, b)
    A_log, dt_bias = build.parameters(gate, "A_log", "dt_bias")
    q, k, v = mixed.split(width, width, width)
    build.delta_rule(build.name(mixer), A_log, dt_bias, 1.0, mixer.num_heads, q, k, v, a, b, y)
    build.normalise(mixer.o_norm, y, y, z)
    build.project(mixer.o_proj, y, out)


def _latent_attention(build: Builder, module: Any, x: Columns, out: Columns) -> None:
    """Lower KimiLinearAttention.forward (5.17.0 and 5.24.0): keys and values are projections of a latent vector.

    Of a key, a part is common to all heads. The cache has keys and values whole: they are made once, where transformers
    makes them from the cached latents again for each token.
    """
    lowering.require_usual_attention(build, module)
    heads, rank, value = module.num_heads, module.kv_lora_rank, module.v_head_dim
    own, common_part = module.qk_nope_head_dim, module.qk_rope_head_dim
    q, k = (build.buffer(f"latent.{name}", heads * (own + common_part)) for name in "qk")
    v, y = (build.buffer(f"latent.{name}", heads * value) for name in "vy")
    if module.q_lora_rank is None:
        build.project(module.q_proj, x, q)
    else:
        inner = build.buffer("latent.inner", module.q_lora_rank)
        build.project(module.q_a_proj, x, inner)
        build.normalise(module.q_a_layernorm, inner, inner)
        build.project(module.q_b_proj, inner, q)
    compressed, both = build.buffer("latent.kv", rank + common_part), build.buffer("latent.both", heads * (own + value))
    build.project(module.kv_a_proj_with_mqa, x, compressed)
    latent, shared = compressed.split(rank, common_part)
    build.normalise(module.kv_a_layernorm, latent, latent)
    build.project(module.kv_b_proj, latent, both)
    build.pick_heads(heads, 0, both, k, width=own)
    build.pick_heads(heads, 0, shared, k, to=own, width=common_part, shared=True)
    build.pick_heads(heads, own, both, v)
    name = build.name(module)
    build.attend(name, heads, module.scaling, q, build.remember(name, heads, k, v), y)
    build.project(module.o_proj, y, out)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if not hasattr(block.mlp, "experts"):
        lowering.mlp(build, block.mlp, x, out, "KimiLinearMLP")
        return
    moe = block.mlp
    build.expect(moe, "KimiLinearMoE")
    shared = build.buffer("experts.shared", out.width)
    lowering.mlp(build, moe.shared_experts, x, shared, "KimiLinearMLP")
    experts.mixture(build, moe.experts, experts.deepseek_routes(build, moe.gate, x), x, out)
    build.combine("add", out, shared, out)


FAMILY = Family(
    model_type="kimi_linear",
    mixers={
        "KimiLinearDeltaAttention": Mixer(
            (*common.CONVOLUTIONS, "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
        )
    },
    norms={"KimiLinearRMSNorm": common.rms_norm, "KimiLinearRMSNormGated": common.norm_before_gate},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
