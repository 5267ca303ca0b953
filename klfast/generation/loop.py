"""Generating text: one prefill, then one token at a time on the model's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import nn

from klfast.core.arguments import integer
from klfast.core.errors import InvalidInputError
from klfast.generation.sampling import Chooser
from klfast.generation.settings import settle
from klfast.generation.stepper import Stepper
from klfast.generation.stopping import Stopping
from klfast.generation.token_buffer import TokenBuffer
from klfast.models.calling import check_ids, evaluation_mode


@torch.inference_mode()
def generate(
    model: nn.Module,
    ids: torch.Tensor,
    max_new_tokens: int | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_return_sequences: int = 1,
    eos_token_id: int | Iterable[int] | None = None,
    stop_strings: str | Iterable[str] | None = None,
    tokenizer: object | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[torch.Tensor], bool | None] | None = None,
    streamer: object | None = None,
) -> torch.Tensor:
    """Continue token sequences.

    Without sampling the result is that of ``model.generate(ids, do_sample=False)``, without its overhead per token. Names
    and meanings are those of transformers' GenerationConfig; where an argument is None, ``model.generation_config`` counts.

    Args:
        model: a causal language model (transformers) with a cache: the SSM families, Llama-like ones, hybrids.
        ids: int64 [B, T] prompts, on the model's device.
        max_new_tokens: tokens to add at most.
        attention_mask: int or bool [B, T], 0 for padding, which must be on the left; None if there is none.
        do_sample: True draws tokens, False takes the likeliest; None draws if ``temperature`` is above 0.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw among so many of the likeliest tokens.
        top_p: draw among the fewest likeliest tokens whose probability reaches this.
        min_p: draw among tokens at least this fraction as likely as the likeliest.
        repetition_penalty: above 1, tokens of the prompt and the text so far become less likely; 1 changes nothing.
        num_return_sequences: texts to draw for each prompt.
        eos_token_id: a row is done when it makes this token (one of these); an empty list never stops early.
        stop_strings: a row is done when its text holds one of these; it ends with the token that completes it.
        tokenizer: the model's tokenizer, which ``stop_strings`` need.
        pad_token_id: fills rows that are done; the first end token if neither it nor the model names one.
        generator: source of the draws, on the model's device; torch's own by default.
        callback: called with each step's new tokens, int64 [B]; if it returns True, generation ends after them, and
            with False or None it goes on.
        streamer: transformers' BaseStreamer: ``put`` gets the prompts, then each step's tokens, on the CPU; ``end`` is
            called at the end, after an error too.

    Returns:
        int64 [B * num_return_sequences, T + new tokens]: the prompts and what follows, the texts of a prompt one after the
        other. Fewer than ``max_new_tokens`` are new only if every row is done or ``callback`` ended it.

    Raises:
        InvalidInputError: an argument out of range, ids beyond the vocabulary, padding on the right, a NaN logit.
    """
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise InvalidInputError(
            f"{type(model).__name__} has no output embeddings; klfast needs a causal language model"
        )
    check_ids(ids, model.get_input_embeddings().num_embeddings, minimum=1)
    settings = settle(
        model,
        ids.shape[1],
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_token_id=eos_token_id,
        stop_strings=stop_strings,
        pad_token_id=pad_token_id,
    )
    mask = None if attention_mask is None else _checked_mask(attention_mask, ids)
    if (copies := integer("num_return_sequences", num_return_sequences, 1)) > 1:
        if settings.sampling is None:
            raise InvalidInputError(
                "num_return_sequences above 1 needs draws, or all would be the same; give a temperature above 0"
            )
        ids = ids.repeat_interleave(copies, 0)
        mask = None if mask is None else mask.repeat_interleave(copies, 0)
    stopping = Stopping(len(ids), settings.ends, settings.strings, tokenizer, settings.pad, ids.device)
    if generator is not None and (
        not isinstance(generator, torch.Generator) or generator.device.type != ids.device.type
    ):
        raise InvalidInputError(
            f"generator must be a torch.Generator on the ids' device, {ids.device}, got {generator!r}"
        )
    choose = Chooser(settings.sampling, settings.repetition_penalty, generator)
    with _streaming(streamer, ids), evaluation_mode(model):
        made = _continue(Stepper(model, mask), ids, mask, settings.max_new_tokens, choose, stopping, callback, streamer)
    with torch.inference_mode(False):  # else the caller could not write to the result
        return torch.cat([ids, made], dim=1)


def _continue(
    step: Stepper,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    most: int,
    choose: Chooser,
    stopping: Stopping,
    callback: Callable[[torch.Tensor], bool | None] | None,
    streamer: object | None,
) -> torch.Tensor:
    """The new tokens, int64 [B, N]."""
    # Padding does not count as text: the last token stands in its place.
    text = TokenBuffer(ids if mask is None else torch.where(mask != 0, ids, ids[:, -1:]))
    fed, length = ids, ids.shape[1]
    for _ in range(most):
        token = stopping.fill(choose(step(fed), text.tokens))
        fed = token.unsqueeze(1)
        text.append(token)
        done = stopping.update(token, text.tokens)
        if streamer is not None:
            streamer.put(token.cpu())
        if (callback is not None and _is_true(callback(token))) or done:
            break
    return text.tokens[:, length:]


def _is_true(answer: object) -> bool:
    """True, or that of torch or numpy; not the number of letters that a callback has written, say."""
    return answer is True or ("bool" in str(getattr(answer, "dtype", "")) and bool(answer))


@contextmanager
def _streaming(streamer: object | None, ids: torch.Tensor):
    """The streamer gets the prompts first, and in any case an end."""
    if streamer is None:
        yield
        return
    try:
        streamer.put(ids.cpu())
        yield
    finally:
        streamer.end()


def _checked_mask(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mask as int64 zeros and ones."""
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != tuple(ids.shape):
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InvalidInputError(f"attention_mask must have the shape of ids, {list(ids.shape)}, got {found}")
    mask = (mask != 0).long()
    if not mask[:, -1].all() or (mask.diff(dim=1) < 0).any():
        raise InvalidInputError("padding must be on the left of each row; set the tokenizer's padding_side to left")
    return mask
