"""Llama and models like it (transformers.models.llama, mistral, qwen2, qwen3, smollm3): attention and a gated MLP.

Mistral's attention has a window, that of Qwen2, Qwen3 and SmolLM3 in some layers; Qwen2 has biases, Qwen3 normalises
each head's queries and keys, and some layers of SmolLM3 have no positions (Attention.forward of each, 5.17.0 and
5.24.0). Logits are the head's product. Models for pictures and sound have these as their language models, at other
paths: the blocks are detected.
"""

from __future__ import annotations

import functools
from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Family, plain
from klfast.models.families.lowering import AttentionNames, Sublayer


def _lower(name: str, build: Builder, model: Any) -> Columns:
    build.expect(model, f"{name}ForCausalLM")
    attention = functools.partial(_attention, name, lowering.rotary(build, model.model.rotary_emb))
    mlp = functools.partial(_mlp, name)
    sublayers = [Sublayer(attention, "input_layernorm"), Sublayer(mlp, "post_attention_layernorm")]
    return lowering.decoder(build, model, {f"{name}DecoderLayer": sublayers})


def _attention(name: str, angles: Columns, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    module = block.self_attn
    build.expect(module, f"{name}Attention")
    window = None
    # As the masks have it, whatever else the attention says (create_sliding_window_causal_mask, 5.24.0).
    if name == "Mistral" or (name != "Llama" and module.config.layer_types[module.layer_idx] == "sliding_attention"):
        window = module.config.sliding_window
    names = AttentionNames(q_norm="q_norm", k_norm="k_norm") if name == "Qwen3" else AttentionNames()
    turned = angles if getattr(module, "use_rope", True) else None
    lowering.attention(build, module, x, out, turned, names=names, window=window)


def _mlp(name: str, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    lowering.mlp(build, block.mlp, x, out, f"{name}MLP")


def _family(model_type: str, name: str) -> Family:
    """Return the record of models whose classes begin with ``name``."""
    return Family(
        model_type=model_type,
        norms={f"{name}RMSNorm": common.rms_norm},
        logits=plain,
        lower=functools.partial(_lower, name),
    )


FAMILIES = (
    _family("llama", "Llama"),
    _family("mistral", "Mistral"),
    _family("qwen2", "Qwen2"),
    _family("qwen3", "Qwen3"),
    _family("smollm3", "SmolLM3"),
)
