"""Generating text: one prefill, then one token at a time on the model's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from klfast.errors import InvalidInputError
from klfast.models.forward import check_ids, evaluation_mode
from klfast.stepper import Stepper


@torch.inference_mode()
def generate(
    model: nn.Module,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Continue token sequences.

    With temperature 0 the result is that of ``model.generate(ids, do_sample=False)``, without its overhead per token.

    Args:
        model: a causal language model (transformers) with a cache: the SSM families, Llama-like ones, hybrids.
        ids: int64 [B, T] prompts, on the model's device.
        max_new_tokens: tokens to add at most.
        attention_mask: int or bool [B, T], 0 for padding, which must be on the left; None if there is none.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw among so many of the likeliest tokens.
        top_p: draw among the fewest likeliest tokens whose probability reaches this.
        eos_token_id: a row is done when it makes this token (one of these); None never stops early.
        pad_token_id: fills rows that are done; the (first) end token by default.
        generator: source of the draws, on the model's device; torch's own by default.
        callback: called with each step's new tokens, int64 [B].

    Returns:
        int64 [B, T + new tokens]: the prompts and what follows. Fewer than ``max_new_tokens`` are new only if every
        row is done.

    Raises:
        InvalidInputError: an argument out of range, ids beyond the vocabulary, padding on the right, a NaN logit.
    """
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise InvalidInputError(f"{type(model).__name__} has no output embeddings; klfast needs a causal language model")
    check_ids(ids, model.get_input_embeddings().num_embeddings, minimum=1)
    _check_options(max_new_tokens, temperature, top_k, top_p)
    ends = None if eos_token_id is None else torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else [*eos_token_id], device=ids.device)
    pad = pad_token_id if pad_token_id is not None else int(ends[0]) if ends is not None else 0
    mask = None if attention_mask is None else _checked_mask(attention_mask, ids)
    if max_new_tokens == 0:
        return ids.clone()

    step = Stepper(model, mask)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    made = [ids]
    with evaluation_mode(model):
        logits = step(ids)
        while True:
            token = _choose(logits, temperature, top_k, top_p, generator)
            if ends is not None:
                token = torch.where(running, token, pad)
                running &= ~torch.isin(token, ends)
            made.append(token.unsqueeze(1))
            if callback is not None:
                callback(token)
            if len(made) > max_new_tokens or (ends is not None and not running.any()):
                break
            logits = step(token.unsqueeze(1))
    with torch.inference_mode(False):  # else the caller could not write to the result
        return torch.cat([part.clone() for part in made], dim=1)


def _choose(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> torch.Tensor:
    """The next token of each row, int64 [B], from float32 [B, V]."""
    token = logits.argmax(-1)  # a NaN counts as the largest
    if logits.gather(1, token.unsqueeze(1)).isnan().any():
        raise InvalidInputError("the model's logits hold a NaN; its weights are damaged")
    if temperature == 0:
        return token
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # what lies before it suffices
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def _check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise InvalidInputError(f"max_new_tokens must be an integer, 0 or more, got {max_new_tokens!r}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InvalidInputError(f"temperature must be 0 or more, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise InvalidInputError(f"top_k must be an integer of 1 or more, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InvalidInputError(f"top_p must be above 0 and at most 1, got {top_p!r}")


def _checked_mask(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mask as int64 zeros and ones."""
    if tuple(mask.shape) != tuple(ids.shape):
        raise InvalidInputError(f"attention_mask must have the shape of ids, {list(ids.shape)}, got {list(mask.shape)}")
    mask = (mask != 0).long()
    if not mask[:, -1].all() or (mask.diff(dim=1) < 0).any():
        raise InvalidInputError("padding must be on the left of each row; set the tokenizer's padding_side to left")
    return mask
