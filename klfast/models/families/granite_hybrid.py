"""Granite-4.0-H (transformers.models.granitemoehybrid): Mamba-2 and attention in turn, with or without experts.

Logits are divided by ``logits_scaling`` (modeling_granitemoehybrid.py, GraniteMoeHybridForCausalLM.forward, 5.23.0).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.routing import Routing
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, LogitRule, Mixer, Rows, split
from klfast.models.families.lowering import Sublayer


class _Config(Protocol):
    logits_scaling: float


class _MLP(Protocol):
    hidden_size: int


def _logits(config: _Config) -> LogitRule:
    return LogitRule(scale=1 / config.logits_scaling)


def _mlp_rows(mlp: _MLP) -> Mapping[str, Rows]:
    return {"input_linear": split(gate=mlp.hidden_size, up=mlp.hidden_size)}


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "GraniteMoeHybridForCausalLM")
    positions = model.model.rotary_emb
    mixer = functools.partial(_mixer, None if positions is None else lowering.rotary(build, positions))
    sublayers = [Sublayer(mixer, "input_layernorm"), Sublayer(_mlp, "post_attention_layernorm")]
    return lowering.decoder(
        build,
        model,
        {"GraniteMoeHybridDecoderLayer": sublayers},
        embedding_scale=model.model.embedding_multiplier,
        residual_scale="residual_multiplier",
    )


def _mixer(angles: Columns | None, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if block.mamba is not None:
        lowering.mamba2(build, block.mamba, x, out, "GraniteMoeHybridMambaLayer")
        return
    build.expect(block.self_attn, "GraniteMoeHybridAttention")
    lowering.attention(build, block.self_attn, x, out, angles)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if not block.has_experts:
        _shared_mlp(build, block.shared_mlp, x, out)
        return
    moe = block.block_sparse_moe
    build.expect(moe, "GraniteMoeHybridMoE")
    build.expect(moe.router, "GraniteMoeHybridTopKRouter")
    shared = build.buffer("shared", out.width)
    _shared_mlp(build, block.shared_mlp, x, shared)
    # A softmax over the chosen alone is the normalised softmax over all (GraniteMoeHybridTopKRouter.forward, 5.24.0).
    experts.mixture(build, moe.experts, experts.routes(build, moe.router, x, Routing(moe.router.top_k)), x, out)
    build.combine("add", out, shared, out)


def _shared_mlp(build: Builder, mlp: Any, x: Columns, out: Columns) -> None:
    build.expect(mlp, "GraniteMoeHybridMLP")
    lowering.fused_mlp(build, mlp.input_linear, mlp.output_linear, mlp.activation, x, out)


FAMILY = Family(
    model_type="granitemoehybrid",
    mixers={"GraniteMoeHybridMambaLayer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"GraniteMoeHybridRMSNorm": common.rms_norm, "GraniteMoeHybridRMSNormGated": common.gated_rms_norm},
    rows={"GraniteMoeHybridMambaLayer": common.mamba2_rows, "GraniteMoeHybridMLP": _mlp_rows},
    blocks=Blocks("layers"),
    logits=_logits,
    lower=_lower,
)
