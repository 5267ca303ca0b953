"""MiniMax (transformers.models.minimax): lightning attention and attention in turn, with experts.

Lightning attention is Mamba-2's recurrence with a step size of 1: S = e^-slope S + v k^T, out = S q. Results are added
to the normalised inputs of their sublayers, both weighted (modeling_minimax.py, MiniMaxLightningAttention.forward and
MiniMaxDecoderLayer.forward, 5.17.0 and 5.24.0).

A mask is right for the prompt only: for the tokens after it transformers asks the cache of the first layer how long the
text is, and that is empty if the layer is lightning attention (modeling_minimax.py, MiniMaxCache, 5.23.0).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.routing import Routing
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, plain


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "MiniMaxForCausalLM")
    base, hidden = lowering.base_of(build, model), model.config.hidden_size
    x, update = build.buffer("residual", hidden), build.buffer("update", hidden)
    angles = lowering.rotary(build, base.rotary_emb)
    build.embed(base.embed_tokens, x)
    for block in base.layers:
        build.expect(block, "MiniMaxDecoderLayer")
        build.normalise(block.input_layernorm, x, x)
        _mixer(build, block, angles, x, update)
        _add(build, x, block.attn_alpha_factor, update, block.attn_beta_factor)
        build.normalise(block.post_attention_layernorm, x, x)
        _mixture(build, block.mlp, x, update)
        _add(build, x, block.mlp_alpha_factor, update, block.mlp_beta_factor)
    build.normalise(base.norm, x, x)
    return lowering.head(build, model.lm_head, x)


def _add(build: Builder, x: Columns, alpha: float, update: Columns, beta: float) -> None:
    """Lower x = alpha x + beta update."""
    if alpha != 1:
        build.scale(float(alpha), x, x)
    build.combine("add", x, update, x, factor=float(beta))


def _mixer(build: Builder, block: Any, angles: Columns, x: Columns, out: Columns) -> None:
    module = block.self_attn
    build.expect(module, "MiniMaxLightningAttention", "MiniMaxAttention")
    if block.block_type == "linear_attention":
        _lightning_attention(build, module, x, out)
    else:
        lowering.attention(build, module, x, out, angles, window=module.config.sliding_window)


def _lightning_attention(build: Builder, module: Any, x: Columns, out: Columns) -> None:
    lowering.require_silu(module.act_fn)
    heads, dim = module.num_attention_heads, module.head_dim
    qkv = build.buffer("lightning.qkv", 3 * heads * dim)
    q, k, v, y, gate = (build.buffer(f"lightning.{name}", heads * dim) for name in ("q", "k", "v", "y", "gate"))
    build.project(module.qkv_proj, x, qkv)
    build.combine_row("silu_gate", qkv, 1.0, qkv)
    for index, part in enumerate((q, k, v)):
        build.pick_heads(heads, index * dim, qkv, part)
    [slope] = build.tensors((module._buffers, "slope_rate"))
    steps, A = build.keep(torch.ones(heads)), -build.copied(slope).float().flatten()
    build.head_scan(build.name(module), A, None, steps, dim, heads, (0.0, math.inf), v, None, k, q, y)
    build.normalise(module.norm, y, y)
    build.project(module.output_gate, x, gate)
    build.combine("sigmoid_gate", gate, y, y)
    build.project(module.out_proj, y, out)


def _mixture(build: Builder, moe: Any, x: Columns, out: Columns) -> None:
    build.expect(moe, "MiniMaxSparseMoeBlock")
    build.expect(moe.gate, "MiniMaxTopKRouter")
    experts.mixture(build, moe.experts, experts.routes(build, moe.gate, x, Routing(moe.gate.top_k)), x, out)


FAMILY = Family(
    model_type="minimax",
    norms={"MiniMaxRMSNorm": common.rms_norm},
    blocks=Blocks("layers"),
    logits=plain,
    reads_padding=True,
    lower=_lower,
)
