"""Running a causal language model of transformers, whatever its family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from klfast import reference
from klfast.errors import InvalidInputError
from klfast.nn import QuantLinear


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_ids(ids: object, vocabulary: int, minimum: int) -> None:
    """Raise InvalidInputError unless ``ids`` is int64 [B, T], B at least 1, T at least ``minimum``, within the vocabulary."""
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise InvalidInputError(f"token ids must be an int64 tensor [B, T], got {found}")
    if ids.shape[0] < 1 or ids.shape[1] < minimum:
        raise InvalidInputError(f"token ids need at least one row and {minimum} columns, got {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InvalidInputError(f"token ids must lie in 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}; was another tokenizer used?")


def plain_head(model: nn.Module) -> nn.Module:
    """The output projection, a linear layer without bias.

    Raises:
        InvalidInputError: the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, (nn.Linear, QuantLinear)) or head.bias is not None:
        raise InvalidInputError(f"{type(model).__name__} has no linear head without bias; klfast takes causal language models that have one")
    return head


def head_inputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the head multiplies its exact weight with, [B, T, H], for int64 [B, T]: the rounding of int8 activations included."""
    head = plain_head(model)
    hidden = model.base_model(input_ids=ids.to(head.weight.device), use_cache=False)[0].to(head.weight.dtype)
    if isinstance(head, QuantLinear) and head.activation == "int8":
        hidden = reference.fake_quantize_rows(hidden.float(), head.spec)
    return hidden


def check_plain_head(model: nn.Module, ids: torch.Tensor) -> None:
    """Raise InvalidInputError if the model does more to its logits than multiply (a softcap, a scale), or makes a NaN of ``ids``."""
    expected = plain_head(model)(head_inputs(model, ids).to(plain_head(model).weight.dtype)).float()
    found = model(input_ids=ids.to(expected.device), use_cache=False).logits.float()
    if not found.isfinite().all():
        raise InvalidInputError("the model's logits hold a NaN or an infinity; its weights are damaged")
    if float((found - expected).norm()) > 0.05 * float(found.norm()):
        raise InvalidInputError(f"{type(model).__name__} does more to its logits than multiply by its head's weight, which klfast does not know of")


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache: "past_key_values", or "cache_params" in the pure SSM families."""
    accepted = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in accepted:
            return name
    raise InvalidInputError(f"{type(model).__name__} takes no cache (neither past_key_values nor cache_params)")
