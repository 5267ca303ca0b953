"""LFM3 (transformers.models.lfm3): LFM2's short convolutions, and attention, partly with a window.

Each type of attention has rotary frequencies of its own, whose angles stay float32, and a gate a head; results of
layers are normalised, too (modeling_lfm3.py, Lfm3Attention.forward and Lfm3DecoderLayer.forward, 5.24.0). Logits are
the head's product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.models.families.lowering import Sublayer


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "Lfm3ForCausalLM")
    positions = model.model.rotary_emb
    angles = {kind: lowering.rotary(build, positions, torch.float32, kind) for kind in positions.layer_types}
    sublayers = [Sublayer(functools.partial(_mixer, angles), "operator_norm"), Sublayer(_mlp, "ffn_norm")]
    return lowering.decoder(build, model, {"Lfm3DecoderLayer": sublayers}, last_norm="embedding_norm")


def _mixer(angles: Mapping[str, Columns], build: Builder, block: Any, x: Columns, out: Columns) -> None:
    if block.is_attention_layer:
        module = block.self_attn
        build.expect(module, "Lfm3Attention")
        names = lowering.AttentionNames(q_norm="q_norm", k_norm="k_norm")
        turned, window = angles[module.layer_type], module.sliding_window
        lowering.attention(build, module, x, out, turned, names=names, head_gates=module.g_proj, window=window)
    else:
        lowering.short_convolution(build, block.conv, x, out, "Lfm3ShortConv")
    _normalise(build, block.post_operator_norm, out)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mlp = block.feed_forward
    build.expect(mlp, "Lfm3MLP")
    lowering.gated_mlp(build, mlp.w1, mlp.w3, mlp.w2, x, out)
    _normalise(build, block.post_ffn_norm, out)


def _normalise(build: Builder, norm: nn.Module, x: Columns) -> None:
    """Lower the norm of a layer's result, in place; an nn.Identity without."""
    if not isinstance(norm, nn.Identity):
        build.normalise(norm, x, x)


FAMILY = Family(
    model_type="lfm3",
    mixers={"Lfm3ShortConv": Mixer(common.CONVOLUTIONS)},
    norms={"Lfm3RMSNorm": common.rms_norm},
    rows={"Lfm3ShortConv": common.short_convolution_rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
