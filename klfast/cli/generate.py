"""klfast generate: text from a model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klfast.cli import options
from klfast.cli.console import emit

if TYPE_CHECKING:
    import torch
    from torch import nn

_USUAL_LENGTH = 100  # where the model's generation_config names none


@options.loads_models
def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to go on from.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Go on from each line of this UTF-8 file instead; empty lines are left out.", dir_okay=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts of --prompts that are computed at once.", min=1)] = 8,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Ask the prompt as a chat message, by the model's chat template, and show the answer alone."
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to generate at most; by default what the model's generation_config says, else 100.",
            min=1,
            show_default=False,
        ),
    ] = None,
    do_sample: Annotated[
        bool,
        typer.Option(
            "--do-sample",
            help="Draw tokens, with the temperature and limits of the model's generation_config unless they are given.",
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0, the default, takes the likeliest token each time; above, tokens are drawn.",
            callback=options.in_range("temperature", lambda t: 0 <= t < math.inf, "0 or more, and finite"),
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest tokens.", min=1)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw among the likeliest tokens that make up this probability.",
            callback=options.in_range("top-p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Draw among tokens at least this fraction as likely as the likeliest.",
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
    num_return_sequences: Annotated[int, typer.Option(help="Texts to draw for each prompt.", min=1)] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop with the token that completes this text; repeat for several."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the draws; the same seed gives the same text.", min=0, max=2**63 - 1)
    ] = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: dict[str, bool],
) -> None:
    """Continue a text, or answer it with --chat; the tokens appear as they are made."""
    options.exactly_one(PROMPT=prompt, prompts=prompts)
    if system is not None and not chat:
        raise typer.BadParameter("--system goes with --chat")
    import torch

    from klfast.checkpoint.by_name import load_model, load_tokenizer
    from klfast.cli import runtime

    runtime.prepare(threads, device)
    texts = [_unicode(prompt)] if prompts is None else _lines(prompts)
    tokenizer = load_tokenizer(model, **loading)
    encoded = [_encode(tokenizer, text, model, chat, system) for text in texts]
    if not chat and getattr(tokenizer, "chat_template", None):
        print(
            "klfast: the model has a chat template; with --chat it answers the prompt instead of going on from it",
            file=sys.stderr,
        )
    network = load_model(model, dtype, device=device, **loading)
    asked = dict(
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
        eos_token_id=_ends(network, tokenizer),
        generator=torch.Generator(device).manual_seed(seed),
    )
    if prompts is None and num_return_sequences == 1:
        _one(network, tokenizer, model, texts[0], encoded[0], asked, device, chat, as_json)
    else:
        _several(network, tokenizer, model, texts, encoded, asked, device, batch_size, chat, as_json)


def _one(
    network: nn.Module,
    tokenizer,
    model: str,
    prompt: str,
    encoded: list[int],
    asked: dict,
    device: str,
    chat: bool,
    as_json: bool,
) -> None:
    """One text, shown as it grows. If it is interrupted, what there is stays."""
    import torch

    import klfast
    from klfast.cli.stream import TextStream

    stream, made, pieces = TextStream(tokenizer, encoded), [], []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)

    def take(token: torch.Tensor) -> None:
        if not made and not chat and not as_json:  # not before: an error has its line for itself
            print(prompt, end="", flush=True)
        made.append(int(token))
        show(stream.push(made[-1]))

    def finish(**more: object) -> None:
        if made:
            show(stream.end())
        emit(
            {"model": model, "prompt": prompt, "text": "".join(pieces), "token_ids": made, **more},
            "" if made else prompt,
            as_json,
        )

    try:
        klfast.generate(network, torch.tensor([encoded], device=device), callback=take, **asked)
    except KeyboardInterrupt:
        if made:
            finish(interrupted=True)
        raise
    finish()


def _several(
    network: nn.Module,
    tokenizer,
    model: str,
    texts: list[str],
    encoded: list[list[int]],
    asked: dict,
    device: str,
    batch_size: int,
    chat: bool,
    as_json: bool,
) -> None:
    """Texts for each prompt, shown batch by batch."""
    import klfast
    from klfast.generation.stepper import reads_padding

    pad = next(i for i in range(len(asked["eos_token_id"]) + 1) if i not in asked["eos_token_id"])
    size = 1 if reads_padding(network) else batch_size
    found = []
    for begin in range(0, len(texts), size):
        ids, mask = _padded(encoded[begin : begin + size], device)
        rows = klfast.generate(network, ids, attention_mask=mask, pad_token_id=pad, **asked)[:, ids.shape[1] :].tolist()
        for i, row in enumerate(rows):
            which = begin + i // asked["num_return_sequences"]
            own, text = _trimmed(row, tokenizer, encoded[which], asked, pad)
            found.append({"prompt": texts[which], "text": text, "token_ids": own})
            if not as_json:
                print(f"--- {len(found)}\n{'' if chat else texts[which]}{text}", flush=True)
    if as_json:
        emit({"model": model, "results": found}, "", as_json)


def _padded(encoded: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as int64 [B, T], padded on the left, and their mask."""
    import torch

    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in encoded], device=device)
    return ids, torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in encoded], device=device)


def _trimmed(row: list[int], tokenizer, before: list[int], asked: dict, pad: int) -> tuple[list[int], str]:
    """A row's tokens without what fills it after its end, and their text."""
    from klfast.cli.stream import TextStream

    end = next((i + 1 for i, token in enumerate(row) if token in asked["eos_token_id"]), len(row))
    row = row[:end]
    stream = TextStream(tokenizer, before)
    text = ""
    for i, token in enumerate(row):
        if (
            token == pad
            and set(row[i:]) == {pad}
            and any(stop in text + stream.end() for stop in asked["stop_strings"] or ())
        ):
            row = row[:i]
            break
        text += stream.push(token)
    return row, text + stream.end()


def _encode(tokenizer, text: str, model: str, chat: bool, system: str | None) -> list[int]:
    from klfast.core.errors import InvalidInputError

    if chat:
        text = _chat(tokenizer, text, model, system)
    found = list(
        tokenizer(text, add_special_tokens=not chat)["input_ids"]
    )  # a template writes its special tokens itself
    if not found:
        raise InvalidInputError("the prompt has no tokens; give some text")
    return found


def _chat(tokenizer, text: str, model: str, system: str | None) -> str:
    """The prompt as the model's chat template writes it."""
    from klfast.core.errors import InvalidInputError, one_line

    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            f"{model} has no chat template; leave --chat out, and the model goes on from the prompt"
        )
    messages = [] if system is None else [{"role": "system", "content": _unicode(system)}]
    messages.append({"role": "user", "content": text})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template, code that comes with the model, does
        raise InvalidInputError(f"the chat template of {model} refuses these messages: {one_line(error)}") from None


def _ends(network: nn.Module, tokenizer) -> list[int]:
    """End tokens of the model's generation_config and of its tokenizer: files often name one in just one of them."""
    from klfast.generation.stopping import end_tokens

    named = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    own = tokenizer.eos_token_id
    return sorted({*([] if named is None else end_tokens(named)), *([] if own is None else [own])})


def _usual_length(network: nn.Module) -> int | None:
    config = getattr(network, "generation_config", None)
    return None if getattr(config, "max_new_tokens", None) or getattr(config, "max_length", None) else _USUAL_LENGTH


def _lines(path: Path) -> list[str]:
    from klfast.core.errors import InvalidInputError

    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not valid UTF-8 (byte {error.start}); save it as UTF-8") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise InvalidInputError(f"{path} holds no prompts; write one a line")
    return found


def _unicode(text: str) -> str:
    """The text; invalid UTF-8 on the command line, which Python keeps as lone surrogates, raises InvalidInputError."""
    from klfast.core.errors import InvalidInputError

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"the prompt is not valid UTF-8 (letter {error.start + 1}); set the terminal's encoding to UTF-8"
        ) from None
    return text
