"""Text generation: one prefill, then one token at a time on the model's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from klfast.core.arguments import integer
from klfast.core.errors import InvalidInputError
from klfast.generation.beams import Beams, search
from klfast.generation.graph_stepper import with_graph
from klfast.generation.prompt_rows import PromptRows
from klfast.generation.sampling import Chooser
from klfast.generation.settings import Settings, settle
from klfast.generation.speculation import speculative_stepper
from klfast.generation.stepper import stepper
from klfast.generation.stopping import Stopping
from klfast.generation.transcript import Transcript
from klfast.models.adapters import unwrapped
from klfast.models.calling import check_ids, evaluation_mode
from klfast.models.vocabulary import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


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
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    num_beams: int = 1,
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] | None = None,
    num_return_sequences: int = 1,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    stop_strings: str | Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[torch.Tensor], bool | None] | None = None,
    streamer: BaseStreamer | None = None,
    transcript: Transcript | None = None,
) -> torch.Tensor:
    """Continue token sequences.

    Without sampling the result equals ``model.generate(ids, do_sample=False)``, without its overhead per token. Names
    and meanings follow transformers' GenerationConfig; where an argument is None, ``model.generation_config`` applies.

    Args:
        model: a causal language model (transformers) with a cache: the SSM families, Llama-like ones, hybrids. Of
            what torch.compile or peft wrapped, the model inside runs, with its adapters.
        ids: int64 [B, T] prompts, on the model's device.
        max_new_tokens: most tokens to add.
        attention_mask: int or bool [B, T], 0 for padding, which must be on the left; None if there is none.
        do_sample: True samples tokens, False takes the most likely; None samples if ``temperature`` is above 0.
        temperature: 0 takes the most likely token; above, logits are divided by it and a token is sampled.
        top_k: sample from this many of the most likely tokens.
        top_p: sample from the smallest set of most likely tokens whose probability reaches this.
        min_p: sample from tokens at least this fraction as likely as the most likely one.
        repetition_penalty: above 1, tokens of the prompt and the text so far become less likely; 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens that the text has so far, without the prompt; -2 to 2.
        frequency_penalty: the same, for each time that the text has the token so far.
        num_beams: above 1, so many texts of a prompt go on side by side, and the most likely as a whole win.
        length_penalty: of beams: a text's log probability is divided by the number of its new tokens to this power, by
            default 1.
        early_stopping: of beams: when a prompt's search ends once ``num_beams`` texts are finished: True: at once;
            False, the default: when the running ones score no higher at their present length; "never": when they could
            at no length.
        num_return_sequences: texts for each prompt: samples, or the best of the beams, best first.
        draft_model: a smaller model with the same tokens. It drafts some of them, which ``model`` checks in one run;
            the text stays the same, sampled or not. For one prompt, where klfast's engine runs both models.
        num_draft_tokens: most tokens of a draft, up to 15, by default 4. Without ``draft_model`` the draft is that the
            text goes on as it did where its latest tokens occurred before.
        eos_token_id: a row is done when it produces this token (or one of these); an empty list never stops early.
        stop_strings: a row is done when its text contains one of these; it ends with the token that completes it.
        tokenizer: the model's tokenizer, which ``stop_strings`` require.
        pad_token_id: fills rows that are done; the first end token if neither it nor the model defines one.
        generator: source of randomness, on the model's device; torch's own by default.
        callback: called with each step's new tokens, int64 [B]; generation ends after them if it returns True, and
            continues if it returns False or None.
        streamer: transformers' BaseStreamer: ``put`` gets the prompts, then each step's tokens, on the CPU; ``end`` is
            called at the end, even after an error.
        transcript: notes times, accepted drafts and, if told to, log probabilities.

    Returns:
        int64 [B * num_return_sequences, T + new tokens]: the prompts with their continuations, the texts of one prompt
        in consecutive rows. There are fewer than ``max_new_tokens`` new tokens only if every row is done or
        ``callback`` ended generation.

    Raises:
        InvalidInputError: an argument out of range, arguments that contradict each other, ids beyond the vocabulary,
            padding on the right, a NaN logit.
    """
    model = unwrapped(model)
    _require_head(model)
    check_ids(ids, vocabulary_size(model), minimum=1)
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
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        eos_token_id=eos_token_id,
        stop_strings=stop_strings,
        pad_token_id=pad_token_id,
    )
    _check_generator(generator, ids.device)
    beams = Beams.checked(model, num_beams, length_penalty, early_stopping)
    returned = integer("num_return_sequences", num_return_sequences, 1)
    speculates = draft_model is not None or num_draft_tokens is not None
    _check_texts(settings, beams, returned, is_single=len(ids) * returned == 1, speculates=speculates)
    notes = Transcript() if transcript is None else transcript
    if beams is not None and (notes.has_scores or callback is not None or streamer is not None):
        raise InvalidInputError("beam search settles no token before its end; leave out callback, streamer, logprobs")

    rows = PromptRows.of(ids, attention_mask, returned if beams is None else beams.count)
    stopping = Stopping(len(rows.ids), settings.ends, settings.strings, tokenizer, settings.pad, ids.device)
    write: Callable[[], torch.Tensor]
    if beams is not None:
        write = partial(search, stepper(model, rows), rows, settings, beams, stopping, notes, returned)
    else:
        step = (
            speculative_stepper(model, rows.mask, draft_model, num_draft_tokens, notes)
            if speculates
            else with_graph(stepper(model, rows), model, rows.ids, settings.max_new_tokens)
        )
        choose = Chooser(settings.sampling, settings.penalties, ids.shape[1], generator)
        write = partial(_continue, step, rows, settings.max_new_tokens, choose, stopping, callback, streamer, notes)
    with _streaming(streamer, rows.ids), evaluation_mode(model):
        notes.begin(rows.tokens, len(ids) * returned)
        made = write()
    with torch.inference_mode(False):  # so that the caller can write to the result
        return torch.cat([ids.repeat_interleave(returned, 0), made], dim=1)


def _require_head(model: nn.Module) -> None:
    get_head: Callable[[], object] | None = getattr(model, "get_output_embeddings", None)
    if get_head is None or get_head() is None:
        raise InvalidInputError(
            f"{type(model).__name__} has no output embeddings; klfast needs a causal language model"
        )


def _check_generator(generator: object, device: torch.device) -> None:
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != device.type):
        raise InvalidInputError(f"generator must be a torch.Generator on the ids' device, {device}, got {generator!r}")


def _check_texts(settings: Settings, beams: Beams | None, returned: int, *, is_single: bool, speculates: bool) -> None:
    """Raise InvalidInputError if so many texts of a prompt cannot be written this way."""
    if beams is None:
        if returned > 1 and settings.sampling is None:
            raise InvalidInputError(
                "num_return_sequences above 1 needs sampling or beams, or all would be the same; give a temperature "
                "above 0"
            )
    elif settings.sampling is not None:
        raise InvalidInputError("num_beams above 1 takes the most likely texts; leave do_sample and temperature out")
    elif returned > beams.count:
        raise InvalidInputError(f"num_return_sequences must be at most num_beams, {beams.count}, got {returned}")
    if speculates and (beams is not None or not is_single):
        raise InvalidInputError("speculative decoding is for a single text; give one prompt, without beams")


def _continue(
    step: Callable[[torch.Tensor], torch.Tensor],
    rows: PromptRows,
    most: int,
    choose: Chooser,
    stopping: Stopping,
    callback: Callable[[torch.Tensor], bool | None] | None,
    streamer: BaseStreamer | None,
    transcript: Transcript,
) -> torch.Tensor:
    """Return the new tokens of each row, int64 [B, N]."""
    fed, text, length = rows.ids, rows.text(), rows.ids.shape[1]
    for _ in range(most):
        logits = step(fed)
        token = stopping.fill(choose(logits, text.tokens))
        transcript.add(token, logits, stopping.running)
        fed = token.unsqueeze(1)
        text.append(token)
        done = stopping.update(token, text.tokens)
        if streamer is not None:
            streamer.put(token.cpu())
        if (callback is not None and _is_true(callback(token))) or done:
            break
    return text.tokens[:, length:]


def _is_true(answer: object) -> bool:
    """Return whether it is True (torch's and numpy's, too), not the number of letters that a callback wrote, say."""
    return answer is True or ("bool" in str(getattr(answer, "dtype", "")) and bool(answer))


@contextmanager
def _streaming(streamer: BaseStreamer | None, ids: torch.Tensor) -> Iterator[None]:
    """Give the streamer the prompts first, and always end it."""
    if streamer is None:
        yield
        return
    try:
        streamer.put(ids.cpu())
        yield
    finally:
        streamer.end()
