"""klfast generate: text from a model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klfast.cli import options, prompts, texts
from klfast.core.loading_options import LoadingOptions

if TYPE_CHECKING:
    from torch import nn

_USUAL_LENGTH = 100  # for models whose generation_config names none
_TOKENS, _BEAMS, _DRAFTS = "Choice of tokens", "Beam search", "Speculative decoding"  # panels of the help


@options.loads_models
def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue.", show_default=False)
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="Continue each line of this UTF-8 file instead; empty lines are skipped.", dir_okay=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts of --prompts to compute at once.", min=1)] = 8,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt as a chat message, in the model's chat template, and show only the answer."
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="With --chat: variables of the template, such as '{\"enable_thinking\": false}'."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens to generate; by default as in the model's generation_config, else 100.",
            min=1,
            show_default=False,
        ),
    ] = None,
    do_sample: Annotated[
        bool,
        typer.Option(
            "--do-sample",
            help="Sample tokens, with the temperature and limits of the model's generation_config unless given here.",
            rich_help_panel=_TOKENS,
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0, the default, always takes the most likely token; above 0, tokens are sampled.",
            callback=options.in_range("temperature", lambda t: 0 <= t < math.inf, "0 or more, and finite"),
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample among this many most likely tokens; 0: all.", min=0, rich_help_panel=_TOKENS),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among the most likely tokens that together reach this probability.",
            callback=options.in_range("top-p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among tokens at least this fraction as likely as the most likely one.",
            callback=options.in_range("min-p", lambda p: 0 <= p <= 1, "between 0 and 1"),
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1, tokens that have occurred become less likely.",
            callback=options.in_range("repetition-penalty", lambda p: 1e-6 <= p <= 1e6, "between 1e-6 and 1e6"),
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            help="Subtracted from the logits of tokens that the text has already.",
            callback=options.in_range("presence-penalty", lambda p: -2 <= p <= 2, "between -2 and 2"),
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            help="The same, for each time that the text has the token.",
            callback=options.in_range("frequency-penalty", lambda p: -2 <= p <= 2, "between -2 and 2"),
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Random seed; the same one gives the same text.", min=0, max=2**63 - 1, rich_help_panel=_TOKENS
        ),
    ] = 0,
    num_beams: Annotated[
        int,
        typer.Option(
            help="Write this many texts side by side and show the most likely as a whole.",
            min=1,
            rich_help_panel=_BEAMS,
        ),
    ] = 1,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 0, the default is 1, longer texts win.",
            callback=options.in_range("length-penalty", lambda p: -10 <= p <= 10, "between -10 and 10"),
            rich_help_panel=_BEAMS,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft-model",
            metavar="MODEL",
            help="A smaller model with the same tokens that drafts some, for MODEL to check at once.",
            rich_help_panel=_DRAFTS,
        ),
    ] = None,
    num_draft_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to draft at a time, 4 with --draft-model; without it, from repetitions in the text.",
            min=1,
            max=15,
            rich_help_panel=_DRAFTS,
        ),
    ] = None,
    num_return_sequences: Annotated[
        int, typer.Option(help="Texts for each prompt, sampled or the best of the beams.", min=1)
    ] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(help="Show each token's log probability, and this many of the most likely tokens.", min=0),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop at the token that completes this text; repeatable.")
    ] = None,
    dtype: options.Dtype = "float32",
    gguf: options.Gguf = options.USUAL_GGUF,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Continue a text, or answer it with --chat; tokens are shown as they are generated."""
    options.exactly_one(PROMPT=prompt, prompts=prompts_file)
    if system is not None and not chat:
        raise typer.BadParameter("--system goes with --chat")
    if chat_template_kwargs is not None and not chat:
        raise typer.BadParameter("--chat-template-kwargs goes with --chat")
    of_template = None if chat_template_kwargs is None else prompts.parse_object(chat_template_kwargs)
    import torch

    from klfast.checkpoint.by_name import load_model, load_tokenizer
    from klfast.cli import runtime
    from klfast.generation.stopping import ends_of
    from klfast.generation.transcript import Transcript

    runtime.prepare(threads, device)
    given = [] if prompts_file is None else prompts.read_lines(prompts_file)
    if prompt is not None:
        given = [prompts.require_unicode(prompt)]
    tokenizer = load_tokenizer(model, **loading)
    encoded = [
        prompts.encode_chat(tokenizer, text, model, system, of_template) if chat else prompts.encode(tokenizer, text)
        for text in given
    ]
    if not chat and getattr(tokenizer, "chat_template", None):
        print(
            "klfast: the model has a chat template; with --chat it answers the prompt instead of continuing it",
            file=sys.stderr,
        )
    network = load_model(model, dtype, device=device, gguf=gguf, **loading)
    settings = dict(
        max_new_tokens=max_new_tokens or _usual_length(network),
        do_sample=True if do_sample else None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        num_beams=num_beams,
        length_penalty=length_penalty,
        draft_model=None if draft is None else load_model(draft, dtype, device=device, gguf=gguf, **loading),
        num_draft_tokens=num_draft_tokens,
        num_return_sequences=num_return_sequences,
        stop_strings=stop or None,
        tokenizer=tokenizer,
        eos_token_id=ends_of(network, tokenizer),
        generator=torch.Generator(device).manual_seed(seed),
    )
    runtime.resume_collections()
    request = texts.Request(model, network, tokenizer, device, settings, Transcript(logprobs), chat, as_json)
    if prompts_file is None and num_return_sequences == 1:
        texts.write_one(request, given[0], encoded[0])
    else:
        texts.write_several(request, given, encoded, batch_size)


def _usual_length(network: nn.Module) -> int | None:
    """Return the default length, None if the model's generation_config has one."""
    config = getattr(network, "generation_config", None)
    return None if getattr(config, "max_new_tokens", None) or getattr(config, "max_length", None) else _USUAL_LENGTH
