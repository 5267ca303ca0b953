"""Bamba (transformers.models.bamba): Mamba-2 or attention in each block, each followed by a gated MLP.

The gate comes before the mixer's norm, which has a mean for each group (modeling_bamba.py, BambaRMSNormGated.forward,
5.23.0). Logits are the head's product (BambaForCausalLM.forward).
"""

from __future__ import annotations

import functools
from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "BambaForCausalLM")
    mixer = functools.partial(_mixer, lowering.rotary(build, model.model.rotary_emb))
    sublayers = [Sublayer(mixer, "input_layernorm"), Sublayer(_mlp, "pre_ff_layernorm")]
    return lowering.decoder(build, model, {"BambaDecoderLayer": sublayers}, last_norm="final_layernorm")


def _mixer(angles: Columns, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if block.block_type == "linear_attention":
        lowering.mamba2(build, block.mamba, x, out, "BambaMixer")
        return
    build.expect(block.self_attn, "BambaAttention")
    lowering.attention(build, block.self_attn, x, out, angles)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    lowering.mlp(build, block.feed_forward, x, out, "BambaMLP")


FAMILY = Family(
    model_type="bamba",
    mixers={"BambaMixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"BambaRMSNorm": common.rms_norm, "BambaRMSNormGated": common.gated_rms_norm},
    rows={"BambaMixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
