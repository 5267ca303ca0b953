"""A model's input embedding and the size of its vocabulary."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn


class _Embeds(Protocol):
    def get_input_embeddings(self) -> nn.Embedding: ...


def input_embedding(model: nn.Module) -> nn.Module:
    """Return the model's input embedding: an nn.Embedding, or a QuantEmbedding."""
    return cast(_Embeds, model).get_input_embeddings()


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that the model's embedding has rows for."""
    return cast(_Embeds, model).get_input_embeddings().weight.shape[0]
