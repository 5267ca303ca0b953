"""Calls of a transformers causal language model of any family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models.families import family_of, mixer_of

# What the cache is called in forwards and their outputs: in transformers since 5.24; before, and before in families
# without attention; in RWKV.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
_BEFORE_CONVOLUTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")  # names of projections begin so


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and afterwards restore each module's own mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def check_ids(ids: object, vocabulary: int, minimum: int) -> None:
    """Raise InvalidInputError unless ``ids`` is int64 [B, T], B >= 1, T >= ``minimum``, within the vocabulary."""
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise InvalidInputError(f"token ids must be an int64 tensor [B, T], got {found}")
    if ids.shape[0] < 1 or ids.shape[1] < minimum:
        raise InvalidInputError(f"token ids need at least one row and {minimum} columns, got {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InvalidInputError(
            f"token ids must lie in 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}; "
            "was another tokenizer used?"
        )


def last_hidden(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the output of the final norm, [B, T, H], for int64 [B, T]."""
    hidden: torch.Tensor = getattr(model, "base_model", model)(input_ids=ids, use_cache=False)[0]
    return hidden


def cache_argument(model: nn.Module) -> str:
    """Return the name of the forward's cache, one of "cache", "past_key_values", "cache_params" and "state"."""
    accepted = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in accepted:
            return name
    raise InvalidInputError(f"{type(model).__name__} takes no cache ({', '.join(CACHE_NAMES)})")


class CachedForward:
    """A causal language model's forward with a cache, whatever its arguments are called.

    Attributes:
        takes_positions: whether it takes position_ids.
    """

    def __init__(self, model: nn.Module) -> None:
        accepted = inspect.signature(model.forward).parameters
        self._model, self._cache_name = model, cache_argument(model)
        self._fixed: dict[str, object] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._fixed["logits_to_keep"] = 1
        self.takes_positions = "position_ids" in accepted

    def __call__(self, ids: torch.Tensor, cache: object | None, **options: object) -> Any:
        """Return the model's output for int64 [B, T] ids after those in the cache, whose last logits it has."""
        return self._model(input_ids=ids, **{self._cache_name: cache}, **self._fixed, **options)


def returned_cache(output: object) -> object | None:
    """Return the cache in the output of a forward; None if there is none."""
    fields = vars(output)  # not its properties, which warn about older names
    return next((fields[name] for name in CACHE_NAMES if fields.get(name) is not None), None)


def reads_padding(model: nn.Module) -> bool:
    """Return True if padding changes the model's results, whatever the mask."""
    return (
        family_of(model).reads_padding
        or "attention_mask" not in inspect.signature(model.forward).parameters
        or any(map(_fills_padding, model.modules()))
    )


def _fills_padding(module: nn.Module) -> bool:
    """Return True for a recurrent layer with biases before its convolution: it masks what these fill again."""
    if mixer_of(type(module)) is None:
        return False
    before = [layer for name, layer in module.named_children() if name.startswith(_BEFORE_CONVOLUTIONS)]
    return any(getattr(layer, "bias", None) is not None for layer in before)


def mixes_rows(model: nn.Module) -> bool:
    """Return True if the model mixes the rows of a batch in the tokens after the prompt."""
    return family_of(model).mixes_rows
