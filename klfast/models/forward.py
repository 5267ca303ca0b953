"""Running a causal language model of transformers, whatever its family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from klfast import reference
from klfast.core.errors import InvalidInputError
from klfast.nn import QuantLinear


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
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
        raise InvalidInputError(
            f"token ids must lie in 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}; was another tokenizer used?"
        )


def plain_head(model: nn.Module) -> nn.Module:
    """The output projection, a linear layer without bias.

    Raises:
        InvalidInputError: the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, (nn.Linear, QuantLinear)) or head.bias is not None:
        raise InvalidInputError(
            f"{type(model).__name__} has no linear head without bias; klfast takes causal language models that have one"
        )
    return head


def _hidden(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What leaves the final norm, [B, T, H]."""
    return getattr(model, "base_model", model)(input_ids=ids, use_cache=False)[0]


def head_inputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the head multiplies its exact weight with, [B, T, H], for int64 [B, T]: the rounding of int8 activations included."""
    head = plain_head(model)
    hidden = _hidden(model, ids.to(head.weight.device)).to(head.weight.dtype)
    if isinstance(head, QuantLinear) and head.activation == "int8":
        hidden = reference.fake_quantize_rows(hidden.float(), head.spec)
    return hidden


@torch.no_grad()
def check_plain_head(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits of ``ids``, int64 [B, T], which may hold a NaN.

    Raises:
        InvalidInputError: the model has no linear head, or does more to its logits than multiply (a softcap, a scale).
    """
    head = plain_head(model)
    ids = ids.to(head.weight.device)
    found = model(input_ids=ids, use_cache=False).logits
    expected = head(_hidden(model, ids).to(head.weight.dtype))
    if not close(expected.to(found.dtype), found):
        raise InvalidInputError(
            f"{type(model).__name__} does more to its logits than multiply by its head's weight (a scale, a cap), which klfast does not know of"
        )
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for a little rounding (the operations are the same); NaN equals NaN, so that a broken weight is named elsewhere."""
    if found.shape != expected.shape:
        return False
    found, expected = found.cpu(), expected.cpu()  # some GPUs have no float64
    tolerance = 8 * torch.finfo(found.dtype).eps * expected.double().nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=tolerance, equal_nan=True)


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache: "past_key_values", "cache_params" in the pure SSM families, "state" in RWKV."""
    accepted = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params", "state"):
        if name in accepted:
            return name
    raise InvalidInputError(f"{type(model).__name__} takes no cache (past_key_values, cache_params or state)")
