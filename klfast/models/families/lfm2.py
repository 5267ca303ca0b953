"""LFM2, dense and with experts (transformers.models.lfm2, lfm2_moe): short convolutions and attention.

Logits are the head's product.
"""

from __future__ import annotations

import functools
from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.routing import Routing
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "Lfm2ForCausalLM", "Lfm2MoeForCausalLM")
    positions = getattr(model.model, "pos_emb", None) or model.model.rotary_emb  # the mixture's, the dense model's
    mixer = functools.partial(_mixer, lowering.rotary(build, positions))
    sublayers = [Sublayer(mixer, "operator_norm"), Sublayer(_mlp, "ffn_norm")]
    block = type(model).__name__.replace("ForCausalLM", "DecoderLayer")
    return lowering.decoder(build, model, {block: sublayers}, last_norm="embedding_norm")


def _mixer(angles: Columns, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if block.is_attention_layer:
        build.expect(block.self_attn, "Lfm2Attention", "Lfm2MoeAttention")
        names = lowering.AttentionNames(out="out_proj", q_norm="q_layernorm", k_norm="k_layernorm")
        lowering.attention(build, block.self_attn, x, out, angles, names=names)
        return
    lowering.short_convolution(build, block.conv, x, out, "Lfm2ShortConv", "Lfm2MoeShortConv")


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mlp = block.feed_forward
    build.expect(mlp, "Lfm2MLP", "Lfm2MoeMLP", "Lfm2MoeSparseMoeBlock")
    if hasattr(mlp, "experts"):
        _mixture(build, mlp, x, out)
    else:
        lowering.gated_mlp(build, mlp.w1, mlp.w3, mlp.w2, x, out)


def _mixture(build: Builder, moe: Any, x: Columns, out: Columns) -> None:
    """Lower Lfm2MoeSparseMoeBlock (modeling_lfm2_moe.py, Lfm2MoeTopKRouter.forward, 5.17.0 and 5.24.0)."""
    router = moe.gate
    build.expect(router, "Lfm2MoeTopKRouter")
    routing = Routing(
        router.top_k,
        sigmoid=True,
        normalise=router.norm_topk_prob,
        epsilon=1e-6,
        factor=router.routed_scaling_factor,
        rounds=True,
    )
    [bias] = build.tensors((moe._buffers, "expert_bias")) if moe.use_expert_bias else [None]
    experts.mixture(build, moe.experts, experts.routes(build, router, x, routing, bias), x, out)


FAMILY = Family(
    model_type="lfm2",
    mixers={"Lfm2ShortConv": Mixer(common.CONVOLUTIONS)},
    norms={"Lfm2RMSNorm": common.rms_norm},
    rows={"Lfm2ShortConv": common.short_convolution_rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
MOE = Family(
    model_type="lfm2_moe",
    mixers={"Lfm2MoeShortConv": Mixer(common.CONVOLUTIONS)},
    norms={"Lfm2MoeRMSNorm": common.rms_norm},
    rows={"Lfm2MoeShortConv": common.short_convolution_rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
