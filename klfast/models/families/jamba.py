"""Jamba (transformers.models.jamba): Mamba or attention in each block, each followed by a gated MLP or experts.

Unlike in Mamba, dt, B and C have norms with weights (modeling_jamba.py, JambaMambaMixer.forward, 5.23.0). Logits are
the head's product (JambaForCausalLM.forward).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.routing import Routing
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "JambaForCausalLM")
    mlp = Sublayer(_mlp, "pre_ff_layernorm")
    blocks = {
        "JambaMambaDecoderLayer": [Sublayer(_mamba, "input_layernorm"), mlp],
        "JambaAttentionDecoderLayer": [Sublayer(_attention, "input_layernorm"), mlp],
    }
    return lowering.decoder(build, model, blocks, last_norm="final_layernorm")


def _mamba(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    lowering.mamba1(build, block.mamba, x, out, "JambaMambaMixer", norm=_norm)


def _norm(build: Builder, module: nn.Module, x: Columns) -> None:
    build.normalise(module, x, x)


def _attention(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    build.expect(block.self_attn, "JambaAttention")
    lowering.attention(build, block.self_attn, x, out)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mlp = block.feed_forward
    if not hasattr(mlp, "experts"):
        lowering.mlp(build, mlp, x, out, "JambaMLP")
        return
    build.expect(mlp, "JambaSparseMoeBlock")
    build.expect(mlp.router, "JambaTopKRouter", "Linear", "QuantLinear")  # a linear layer in 5.17
    routes = experts.routes(build, mlp.router, x, Routing(mlp.top_k, normalise=False))
    experts.mixture(build, mlp.experts, routes, x, out)


FAMILY = Family(
    model_type="jamba",
    mixers={"JambaMambaMixer": Mixer(common.MAMBA1_FUNCTIONS, left_weight="dt_proj")},
    norms={"JambaRMSNorm": common.rms_norm},
    rows={"JambaMambaMixer": common.mamba1_rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
