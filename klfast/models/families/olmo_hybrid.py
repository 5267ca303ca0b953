"""OLMo hybrid (transformers.models.olmo_hybrid): gated delta nets, some with negative eigenvalues, and attention.

Results of norms have their input's dtype; the one of a head comes before its gate (modeling_olmo_hybrid.py,
OlmoHybridRMSNorm.forward and OlmoHybridRMSNormGated.forward, 5.23.0). Logits are the head's product.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer
from klfast.nn.norm import Norm


def _norm(norm: common.RMSNorm) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon, keeps_dtype=True)


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "OlmoHybridForCausalLM")
    positions = model.model.rotary_emb
    angles = None if positions is None else lowering.rotary(build, positions, torch.float32)
    attention = Sublayer(functools.partial(_attention, angles), None, "post_attention_layernorm")
    blocks = {
        "OlmoHybridLinearAttentionDecoderLayer": [
            Sublayer(_delta_net, "input_layernorm"),
            Sublayer(_mlp, "post_attention_layernorm"),
        ],
        "OlmoHybridAttentionDecoderLayer": [attention, Sublayer(_mlp, None, "post_feedforward_layernorm")],
    }
    return lowering.decoder(build, model, blocks)


def _attention(angles: Columns | None, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    build.expect(block.self_attn, "OlmoHybridAttention")
    names = lowering.AttentionNames(q_norm="q_norm", k_norm="k_norm")
    lowering.attention(build, block.self_attn, x, out, angles, names=names)


def _delta_net(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mixer = block.linear_attn
    build.expect(mixer, "OlmoHybridGatedDeltaNet")
    names = lowering.DeltaNames(z="g_proj", a="a_proj", b="b_proj", norm="o_norm", out="o_proj")
    largest = 2.0 if mixer.allow_neg_eigval else 1.0
    lowering.delta_net(build, mixer, x, out, fused=None, names=names, largest_beta=largest)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    lowering.mlp(build, block.mlp, x, out, "OlmoHybridMLP")


FAMILY = Family(
    model_type="olmo_hybrid",
    mixers={"OlmoHybridGatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"OlmoHybridRMSNorm": _norm, "OlmoHybridRMSNormGated": common.norm_before_gate},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
