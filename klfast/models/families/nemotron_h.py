"""Nemotron-H (transformers.models.nemotron_h): each block is one mixer: Mamba-2, attention, an MLP or experts.

The gate comes before the mixer's norm, which has a mean for each group (modeling_nemotron_h.py,
NemotronHRMSNormGated.forward, 5.23.0); the other norms multiply by their weight before they round
(NemotronHRMSNorm.forward). Logits are the head's product, cast to float32 (NemotronHForCausalLM.forward).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, experts, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer
from klfast.nn.norm import Norm


def _norm(norm: common.RMSNorm) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon, keeps_dtype=True)


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "NemotronHForCausalLM")
    blocks = {"NemotronHBlock": [Sublayer(_mixer, "norm")]}
    return lowering.decoder(build, model, blocks, embedding="embeddings", last_norm="norm_f")


def _mixer(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mixer = block.mixer
    if block.block_type == "linear_attention":
        lowering.mamba2(build, mixer, x, out, "NemotronHMamba2Mixer")
    elif block.block_type == "full_attention":
        build.expect(mixer, "NemotronHAttention")
        lowering.attention(build, mixer, x, out)
    elif block.block_type == "moe":
        _mixture(build, mixer, x, out)
    else:
        _mlp(build, mixer, x, out)


def _mixture(build: Builder, moe: Any, x: Columns, out: Columns) -> None:
    """Lower NemotronHMoE, whose experts may work on a projection of x (NemotronHMoE.forward, 5.17.0 and 5.24.0)."""
    build.expect(moe, "NemotronHMoE")
    shared = build.buffer("experts.shared", out.width)
    _mlp(build, moe.shared_experts, x, shared)
    routes = experts.deepseek_routes(build, moe.gate, x)
    for layer in (moe.fc1_latent_proj, moe.fc2_latent_proj):
        build.expect(layer, "Identity", "Linear", "QuantLinear")
    if isinstance(moe.fc1_latent_proj, nn.Identity):
        experts.mixture(build, moe.experts, routes, x, out)
    else:
        latent = build.buffer("experts.latent", moe.fc1_latent_proj.out_features)
        build.project(moe.fc1_latent_proj, x, latent)
        experts.mixture(build, moe.experts, routes, latent, latent)
        build.project(moe.fc2_latent_proj, latent, out)
    build.combine("add", out, shared, out)


def _mlp(build: Builder, mlp: Any, x: Columns, out: Columns) -> None:
    build.expect(mlp, "NemotronHMLP")
    lowering.require_squared_relu(mlp.act_fn)
    inner = build.buffer("mlp.inner", mlp.up_proj.out_features)
    build.project(mlp.up_proj, x, inner)
    build.combine("relu_gate", inner, inner, inner)
    build.project(mlp.down_proj, inner, out)


FAMILY = Family(
    model_type="nemotron_h",
    mixers={"NemotronHMamba2Mixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"NemotronHRMSNorm": _norm, "NemotronHRMSNormGated": common.gated_rms_norm},
    rows={"NemotronHMamba2Mixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=plain,
    widens_logits=True,
    lower=_lower,
)
