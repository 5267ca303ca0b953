"""LFM2, dense and with experts (transformers.models.lfm2, lfm2_moe): short convolutions and attention.

A convolution runs over B x without an activation, and its result is multiplied by C (modeling_lfm2.py,
Lfm2ShortConv.forward, 5.23.0). Logits are the head's product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, Mixer, Rows, plain, split
from klfast.models.families.lowering import Sublayer


class _ShortConv(Protocol):
    conv: nn.Conv1d


def _rows(mixer: _ShortConv) -> Mapping[str, Rows]:
    channels = mixer.conv.in_channels
    return {"in_proj": split(B=channels, C=channels, x=channels)}


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "Lfm2ForCausalLM")
    mixer = functools.partial(_mixer, lowering.rotary(build, model.model.rotary_emb))
    sublayers = [Sublayer(mixer, "operator_norm"), Sublayer(_mlp, "ffn_norm")]
    return lowering.decoder(build, model, {"Lfm2DecoderLayer": sublayers}, last_norm="embedding_norm")


def _mixer(angles: Columns, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if block.is_attention_layer:
        build.expect(block.self_attn, "Lfm2Attention")
        names = lowering.AttentionNames(out="out_proj", q_norm="q_layernorm", k_norm="k_layernorm")
        lowering.attention(build, block.self_attn, x, out, angles, names=names)
        return
    mixer = block.conv
    build.expect(mixer, "Lfm2ShortConv")
    channels = mixer.conv.in_channels
    projected, y = build.buffer("conv.projected", 3 * channels), build.buffer("conv.y", channels)
    build.project(mixer.in_proj, x, projected)
    B, C, inner = projected.split(channels, channels, channels)
    build.combine("multiply", B, inner, y)
    build.convolve(mixer.conv, False, y, inner)
    build.combine("multiply", C, inner, y)
    build.project(mixer.out_proj, y, out)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mlp = block.feed_forward
    build.expect(mlp, "Lfm2MLP")
    lowering.gated_mlp(build, mlp.w1, mlp.w3, mlp.w2, x, out)


FAMILY = Family(
    model_type="lfm2",
    mixers={"Lfm2ShortConv": Mixer(common.CONVOLUTIONS)},
    norms={"Lfm2RMSNorm": common.rms_norm},
    rows={"Lfm2ShortConv": _rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
MOE = Family(
    model_type="lfm2_moe",
    mixers={"Lfm2MoeShortConv": Mixer(common.CONVOLUTIONS)},
    norms={"Lfm2MoeRMSNorm": common.rms_norm},
    rows={"Lfm2MoeShortConv": _rows},
    blocks=Blocks("layers"),
    logits=plain,
)
