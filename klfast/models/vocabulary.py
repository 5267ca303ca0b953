"""A model's input embedding, what it multiplies its rows by, and the size of its vocabulary."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.nn.embedding import Scale, scaled

_COMPARED = 8  # rows


class _Embeds(Protocol):
    def get_input_embeddings(self) -> nn.Embedding: ...


def input_embedding(model: nn.Module) -> nn.Module:
    """Return the model's input embedding: an nn.Embedding, or a QuantEmbedding.

    In the package mamba_ssm (2.3.2, models/mixer_seq_simple.py) it is ``backbone.embedding``.
    """
    if hasattr(model, "get_input_embeddings"):
        return cast(_Embeds, model).get_input_embeddings()
    return model.get_submodule("backbone.embedding")


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that the model's embedding has rows for."""
    return cast(_Embeds, model).get_input_embeddings().weight.shape[0]


def embedding_name(model: nn.Module) -> str:
    """Return the module name of the input embedding."""
    embedding = input_embedding(model)
    name: str = next(name for name, module in model.named_modules() if module is embedding)
    return name


@torch.no_grad()
def embedding_scale(model: nn.Module) -> Scale | None:
    """Return what the input embedding multiplies its rows by, None for nothing: all else it does is to look them up.

    Transformers' classes (Gemma3TextScaledWordEmbedding and its like, 5.23.0) keep it in ``embed_scale``: a number, or
    a tensor, which is rounded to the weight's dtype before the product; if that is on the meta device, its value is in
    ``scalar_embed_scale``. The scale is compared with the embedding's own rows.

    Raises:
        InvalidInputError: the embedding does more.
    """
    embedding: Any = input_embedding(model)
    if type(embedding) is nn.Embedding:
        return None
    scale: Scale | None = getattr(embedding, "embed_scale", None)
    if isinstance(scale, torch.Tensor):
        scale = torch.tensor(embedding.scalar_embed_scale) if scale.is_meta else scale.detach().clone()
    if scale is None or not (embedding.weight.is_meta or _only_scales(embedding, scale)):
        raise InvalidInputError(
            f"the input embedding is a {type(embedding).__name__}, which does more than look up rows and scale them "
            "and cannot read them from a quantized head; leave the head out of the plan, or untie it: "
            "head.weight = torch.nn.Parameter(head.weight.detach().clone())"
        )
    return scale


def _only_scales(embedding: nn.Embedding, scale: Scale) -> bool:
    ids = torch.arange(min(_COMPARED, embedding.num_embeddings), device=embedding.weight.device)
    return torch.equal(embedding(ids), scaled(F.embedding(ids, embedding.weight), scale))
