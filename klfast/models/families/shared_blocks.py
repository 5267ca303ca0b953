"""Lowering of models of Mamba blocks, some of which run a transformer block first that they share: Zamba, Zamba2."""

from __future__ import annotations

from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import lowering
from klfast.models.families.lowering import Lower, Sublayer


def decoder(build: Builder, model: Any, shared: str, mamba: Lower, attention: Lower, mlp: Lower) -> Columns:
    """Lower such a model; returns the columns of its logits.

    A shared block reads the residual stream beside the embedding. What it makes of them is added to the input of the
    mixer alone, not to the stream (modeling_zamba.py, ZambaAttentionDecoderLayer.forward and ZambaHybridLayer.forward,
    likewise modeling_zamba2.py, 5.17.0 and 5.24.0).

    Args:
        build: the program's builder.
        model: of such blocks.
        shared: the name that a shared block has in the blocks that run it.
        mamba: lowers the mixer of a block.
        attention, mlp: lower those of a shared block, given the block that runs it.
    """
    kind, hidden = build.kind, model.config.hidden_size
    both, mixed = build.buffer("shared.both", 2 * hidden), build.buffer("shared.mixed", hidden)
    normed = build.buffer("shared.normed", 2 * hidden)
    stream, embedding = both.split(hidden, hidden)
    build.embed(model.base_model.embed_tokens, embedding)

    def hybrid(build: Builder, block: Any, x: Columns, out: Columns) -> None:
        transformer, last = getattr(block, shared), block.mamba_decoder
        build.expect(transformer, f"{kind}AttentionDecoderLayer")
        build.pick_heads(1, 0, x, stream)
        build.normalise(transformer.input_layernorm, both, normed)
        attention(build, block, normed, out)
        build.normalise(transformer.pre_ff_layernorm, out, out)
        mlp(build, block, out, out)
        build.project(block.linear, out, mixed)
        build.combine("add", x, mixed, mixed)
        build.expect(last, f"{kind}MambaDecoderLayer")
        build.normalise(last.input_layernorm, mixed, mixed)
        mamba(build, last, mixed, out)

    blocks = {
        f"{kind}MambaDecoderLayer": [Sublayer(mamba, "input_layernorm")],
        f"{kind}HybridLayer": [Sublayer(hybrid, None)],
    }
    return lowering.decoder(build, model, blocks, last_norm="final_layernorm")
