"""Lowerings of chains of blocks, from the embedding to the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.program import MOST_SEQUENCES

Lower = Callable[[Builder, Any, Columns, Columns], None]  # (build, module, x, out)


class Sublayer(NamedTuple):
    """A term that a block adds to the residual stream x: lower(x), with norms.

    Attributes:
        lower: lowers it, given the block.
        before: name of the norm of its input in the block; None without.
        after: name of the norm of its result; None without.
    """

    lower: Lower
    before: str | None
    after: str | None = None


def decoder(
    build: Builder,
    model: Any,
    blocks: Mapping[str, Sequence[Sublayer]],
    *,
    embedding: str = "embed_tokens",
    last_norm: str = "norm",
    embedding_scale: float = 1.0,
    residual_scale: str | None = None,
    residual: torch.dtype | None = None,
) -> Columns:
    """Lower a model of blocks that add to a residual stream; returns the columns of its logits.

    Args:
        build: the program's builder.
        model: has lm_head and a base model with an embedding, layers and a last norm.
        blocks: what a block of each class adds, one after another.
        embedding, last_norm: names in the base model.
        embedding_scale: multiplies embeddings.
        residual_scale: name of a block's number that multiplies what it adds; None for 1.
        residual: dtype of the stream; None for that of activations.
    """
    base, hidden = base_of(build, model), model.config.hidden_size
    stream = build.buffer("residual", hidden, residual)
    # What layers read: the stream, or a copy of it in the dtype of activations.
    x = stream if residual in (None, build.dtype) else build.buffer("narrow", hidden)
    normed, update = build.buffer("normed", hidden), build.buffer("update", hidden)
    build.embed(getattr(base, embedding), stream, embedding_scale)
    source = stream  # as good as its copy, which is not there yet
    for block in base.layers:
        build.expect(block, *blocks)
        scale = 1.0 if residual_scale is None else float(getattr(block, residual_scale))
        for lower, before, after in blocks[type(block).__name__]:
            if before is not None:
                build.normalise(getattr(block, before), source, normed)
            lower(build, block, source if before is None else normed, update)
            if after is not None:
                build.normalise(getattr(block, after), update, update)
            narrow = None if x is stream else x
            build.combine("add", stream, update, stream, factor=scale, narrow=narrow)
            source = x
    build.normalise(getattr(base, last_norm), x, normed)
    return head(build, model.lm_head, normed)


def base_of(build: Builder, model: Any) -> Any:
    """Return a model's base model, which must be of the class that transformers gives it, and run all its layers."""
    build.expect(model.base_model, f"{build.kind}Model", f"{build.kind}TextModel")
    if len(model.base_model.layers) > model.config.num_hidden_layers:
        raise CannotLowerError("its configuration has fewer layers than the model")
    return model.base_model


def head(build: Builder, layer: nn.Linear, x: Columns) -> Columns:
    """Lower a head; returns the columns of its logits."""
    logits = build.buffer("logits", layer.out_features, torch.float32, rows=MOST_SEQUENCES)
    build.project_last(layer, x, logits)
    return logits


def recurrent(build: Builder, model: Any, name: str, mixer: Lower) -> Columns:
    """Lower a model of blocks x + mixer(norm(x)), such as Mamba; its classes' names begin with ``name``."""
    build.expect(model, f"{name}ForCausalLM")
    blocks = {f"{name}Block": [Sublayer(lambda build, block, x, out: mixer(build, block.mixer, x, out), "norm")]}
    residual = torch.float32 if model.config.residual_in_fp32 else None
    return decoder(build, model, blocks, embedding="embeddings", last_norm="norm_f", residual=residual)
