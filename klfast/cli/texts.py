"""Texts of ``klfast generate``: one that is shown as it grows, or several batch by batch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klfast.cli.console import emit

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from klfast.generation.scores import TokenScores
    from klfast.generation.transcript import Transcript


@dataclass(frozen=True)
class Request:
    """The model, the settings and the form of output.

    Attributes:
        model: the model's name.
        settings: keyword arguments of klfast.generate, except for the transcript.
    """

    model: str
    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: str
    settings: dict[str, Any]
    transcript: Transcript
    chat: bool
    as_json: bool


def write_one(request: Request, prompt: str, encoded: list[int]) -> None:
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
        scores = [logprobs for row in request.transcript.scores for logprobs in _logprobs(request, row)]
        data = {"model": request.model, "prompt": prompt, "text": "".join(pieces), "token_ids": made}
        if request.transcript.has_scores:
            more["logprobs"] = scores
        emit({**data, **more, "speed": _speed(request.transcript)}, "" if made else prompt, request.as_json)
        if not request.as_json:
            _print_logprobs(scores)
            _say_speed(request.transcript, is_one=True)

    ids, is_shown_late = torch.tensor([encoded], device=request.device), request.settings["num_beams"] > 1
    callback = None if is_shown_late else take
    try:
        found = klfast.generate(
            request.network, ids, callback=callback, transcript=request.transcript, **request.settings
        )
    except KeyboardInterrupt:
        if made:
            finish(interrupted=True)
        raise
    if is_shown_late:
        for token in found[0, ids.shape[1] :]:
            take(token)
    finish()


def write_several(request: Request, texts: list[str], encoded: list[list[int]], batch_size: int) -> None:
    """Generate texts for each prompt and show them batch by batch."""
    import klfast

    ends, copies = request.settings["eos_token_id"], request.settings["num_return_sequences"]
    pad = next(i for i in range(len(ends) + 1) if i not in ends)
    found: list[dict[str, object]] = []
    for begin in range(0, len(texts), batch_size):
        ids, mask = _padded(encoded[begin : begin + batch_size], request.device)
        made = klfast.generate(
            request.network,
            ids,
            attention_mask=mask,
            pad_token_id=pad,
            transcript=request.transcript,
            **request.settings,
        )
        for i, row in enumerate(made[:, ids.shape[1] :].tolist()):
            which = begin + i // copies
            own = row[: request.transcript.lengths[len(found)]]
            text = _text(request, own, encoded[which])
            one: dict[str, object] = {"prompt": texts[which], "text": text, "token_ids": own}
            scores = _logprobs(request, request.transcript.scores[len(found)]) if request.transcript.has_scores else []
            found.append(one | ({"logprobs": scores} if request.transcript.has_scores else {}))
            if not request.as_json:
                print(f"--- {len(found)}\n{'' if request.chat else texts[which]}{text}", flush=True)
                _print_logprobs(scores)
    if request.as_json:
        emit({"model": request.model, "results": found, "speed": _speed(request.transcript)}, "", request.as_json)
    else:
        _say_speed(request.transcript, is_one=False)


def _padded(encoded: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as int64 [B, T], padded on the left, and their mask."""
    import torch

    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in encoded], device=device)
    return ids, torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in encoded], device=device)


def _text(request: Request, tokens: list[int], before: list[int]) -> str:
    """Return the text of tokens after a prompt's."""
    from klfast.generation.text_stream import TextStream

    stream = TextStream(request.tokenizer, before)
    return "".join(map(stream.push, tokens)) + stream.end()


def _logprobs(request: Request, scores: list[TokenScores]) -> list[dict[str, Any]]:
    """Return log probabilities with the tokens' texts, as JSON has them."""
    from klfast.generation.spelling import Spelling

    spelling = Spelling(request.tokenizer)

    def named(token: int, logprob: float) -> dict[str, Any]:
        return {"token": spelling.text(token), "logprob": logprob}

    return [{**named(one.token, one.logprob), "top": [named(*each) for each in one.top]} for one in scores]


def _print_logprobs(scores: list[dict[str, Any]]) -> None:
    """Print a line for each token: its log probability, then the most likely tokens with theirs."""
    for one in scores:
        top = ", ".join(f"{each['token']!r} {each['logprob']:.4f}" for each in one["top"])
        print(f"{one['logprob']:10.4f}  {one['token']!r:<16}  {top}".rstrip())


def _speed(transcript: Transcript) -> dict[str, object]:
    """Return the times of a transcript, as JSON has them."""
    found: dict[str, object] = {
        "prompt_tokens": transcript.prompt_tokens,
        "prompt_seconds": transcript.prompt_seconds,
        "prompt_tokens_per_second": transcript.prompt_tokens_per_second,
        "new_tokens": transcript.new_tokens,
        "tokens_per_second": transcript.tokens_per_second,
    }
    if transcript.draft_tokens:
        found |= {"draft_tokens": transcript.draft_tokens, "accepted_tokens": transcript.accepted_tokens}
    return found


def _say_speed(transcript: Transcript, *, is_one: bool) -> None:
    """Print the times in one line on standard error, where they do not get into the text."""
    parts = [f"first token after {_duration(transcript.prompt_seconds)}"] if is_one else []
    for count, kind, speed in (
        (transcript.prompt_tokens, "prompt", transcript.prompt_tokens_per_second),
        (transcript.new_tokens, "new", transcript.tokens_per_second),
    ):
        parts.append(f"{count} {kind} tokens" + ("" if speed is None else f" at {speed:.1f}/s"))
    if transcript.draft_tokens:
        parts.append(f"{transcript.accepted_tokens} of {transcript.draft_tokens} draft tokens accepted")
    print(f"klfast: {', '.join(parts)}", file=sys.stderr)


def _duration(seconds: float) -> str:
    """Return a time with two or three digits, below a second in milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"
