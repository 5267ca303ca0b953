"""Size of a model's vocabulary."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn


class _Embeds(Protocol):
    def get_input_embeddings(self) -> nn.Embedding: ...


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that the model's embedding has rows for."""
    return cast(_Embeds, model).get_input_embeddings().weight.shape[0]
