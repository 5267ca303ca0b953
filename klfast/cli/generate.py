"""klfast generate: text from a model."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klfast.cli import options, prompts
from klfast.cli.console import emit
from klfast.core.loading_options import LoadingOptions

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_USUAL_LENGTH = 100  # for models whose generation_config names none


@dataclass(frozen=True)
class _Request:
    """The model, the settings and the form of output.

    Attributes:
        model: the model's name.
        settings: keyword arguments of klfast.generate.
    """

    model: str
    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: str
    settings: dict[str, Any]
    chat: bool
    as_json: bool


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
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0, the default, always takes the most likely token; above 0, tokens are sampled.",
            callback=options.in_range("temperature", lambda t: 0 <= t < math.inf, "0 or more, and finite"),
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many most likely tokens.", min=1)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among the most likely tokens that together reach this probability.",
            callback=options.in_range("top-p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among tokens at least this fraction as likely as the most likely one.",
            callback=options.in_range("min-p", lambda p: 0 <= p <= 1, "between 0 and 1"),
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1, tokens that have occurred become less likely.",
            callback=options.in_range("repetition-penalty", lambda p: 1e-6 <= p <= 1e6, "between 1e-6 and 1e6"),
        ),
    ] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Texts to sample for each prompt.", min=1)] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop at the token that completes this text; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; the same one gives the same text.", min=0, max=2**63 - 1)] = 0,
    dtype: options.Dtype = "float32",
    gguf: options.Gguf = "exact",
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
    import torch

    from klfast.checkpoint.by_name import load_model, load_tokenizer
    from klfast.cli import runtime
    from klfast.generation.stopping import ends_of

    runtime.prepare(threads, device)
    texts = [] if prompts_file is None else prompts.read_lines(prompts_file)
    if prompt is not None:
        texts = [prompts.require_unicode(prompt)]
    tokenizer = load_tokenizer(model, **loading)
    encoded = [prompts.encode(tokenizer, text, model, chat=chat, system=system) for text in texts]
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
        num_return_sequences=num_return_sequences,
        stop_strings=stop or None,
        tokenizer=tokenizer,
        eos_token_id=ends_of(network, tokenizer),
        generator=torch.Generator(device).manual_seed(seed),
    )
    request = _Request(model, network, tokenizer, device, settings, chat, as_json)
    if prompts_file is None and num_return_sequences == 1:
        _one(request, texts[0], encoded[0])
    else:
        _several(request, texts, encoded, batch_size)


def _one(request: _Request, prompt: str, encoded: list[int]) -> None:
    """Generate one text and show it as it grows; an interrupt keeps what there is."""
    import torch

    import klfast
    from klfast.generation.text_stream import TextStream

    stream = TextStream(request.tokenizer, encoded)
    made: list[int] = []
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not request.as_json:
            print(piece, end="", flush=True)

    def take(token: torch.Tensor) -> None:
        if not made and not request.chat and not request.as_json:  # not earlier, so that an error has its own line
            print(prompt, end="", flush=True)
        made.append(int(token))
        show(stream.push(made[-1]))

    def finish(**more: object) -> None:
        if made:
            show(stream.end())
        emit(
            {"model": request.model, "prompt": prompt, "text": "".join(pieces), "token_ids": made, **more},
            "" if made else prompt,
            request.as_json,
        )

    try:
        klfast.generate(
            request.network, torch.tensor([encoded], device=request.device), callback=take, **request.settings
        )
    except KeyboardInterrupt:
        if made:
            finish(interrupted=True)
        raise
    finish()


def _several(request: _Request, texts: list[str], encoded: list[list[int]], batch_size: int) -> None:
    """Generate texts for each prompt and show them batch by batch."""
    import klfast

    ends, copies = request.settings["eos_token_id"], request.settings["num_return_sequences"]
    pad = next(i for i in range(len(ends) + 1) if i not in ends)
    found: list[dict[str, object]] = []
    for begin in range(0, len(texts), batch_size):
        ids, mask = _padded(encoded[begin : begin + batch_size], request.device)
        made = klfast.generate(request.network, ids, attention_mask=mask, pad_token_id=pad, **request.settings)
        for i, row in enumerate(made[:, ids.shape[1] :].tolist()):
            which = begin + i // copies
            own, text = _trimmed(request, row, encoded[which], pad)
            found.append({"prompt": texts[which], "text": text, "token_ids": own})
            if not request.as_json:
                print(f"--- {len(found)}\n{'' if request.chat else texts[which]}{text}", flush=True)
    if request.as_json:
        emit({"model": request.model, "results": found}, "", request.as_json)


def _padded(encoded: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as int64 [B, T], padded on the left, and their mask."""
    import torch

    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in encoded], device=device)
    return ids, torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in encoded], device=device)


def _trimmed(request: _Request, row: list[int], before: list[int], pad: int) -> tuple[list[int], str]:
    """Return a row's tokens without the padding after its end, and their text."""
    from klfast.generation.text_stream import TextStream

    ends, stops = request.settings["eos_token_id"], request.settings["stop_strings"] or ()
    end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    row = row[:end]
    stream = TextStream(request.tokenizer, before)
    text = ""
    for i, token in enumerate(row):
        if token == pad and set(row[i:]) == {pad} and any(stop in text + stream.end() for stop in stops):
            row = row[:i]
            break
        text += stream.push(token)
    return row, text + stream.end()


def _usual_length(network: nn.Module) -> int | None:
    """Return the default length, None if the model's generation_config has one."""
    config = getattr(network, "generation_config", None)
    return None if getattr(config, "max_new_tokens", None) or getattr(config, "max_length", None) else _USUAL_LENGTH
