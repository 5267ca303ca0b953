"""Replies in the form of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from klfast.core.errors import printable
from klfast.generation.scores import TokenScores
from klfast.generation.spelling import Spelling
from klfast.serving.answer import Answer
from klfast.serving.tool_calls import Call, Reader

Json = dict[str, Any]


class Scored(NamedTuple):
    """A token's scores, and the number of characters in front of it in the answer."""

    scores: TokenScores
    offset: int


class Completions:
    """The form of /v1/completions.

    Args:
        spelling: of the tokens.
    """

    kind = part_kind = "text_completion"

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling

    def whole(self, index: int, text: str, scores: Sequence[Scored] | None, finish: str | None) -> Json:
        """Return a choice, with its log probabilities in lists."""
        found = None if scores is None else self._scores(scores)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish}

    part = whole

    def first(self, index: int) -> None:
        """Return None: a text begins with its first letters."""

    def _scores(self, scored: Sequence[Scored]) -> Json:
        return {
            "tokens": [self._spelling.text(one.scores.token) for one in scored],
            "token_logprobs": [one.scores.logprob for one in scored],
            "top_logprobs": [self._top(one.scores) for one in scored],
            "text_offset": [one.offset for one in scored],
        }

    def _top(self, scores: TokenScores) -> dict[str, float]:
        """Return the best log probability of each text among the most likely tokens; several may have the same."""
        found: dict[str, float] = {}
        for token, logprob in scores.top:
            found.setdefault(self._spelling.text(token), logprob)
        return found


class Chats:
    """The form of /v1/chat/completions.

    Args:
        spelling: of the tokens.
        reader: makes what takes calls of tools out of an answer; None where the model may call none.
        most_calls: in an answer; those beyond are left out.
    """

    kind, part_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self, spelling: Spelling, reader: Callable[[], Reader] | None = None, most_calls: int | None = None
    ) -> None:
        self._spelling, self._most_calls = spelling, most_calls
        self._readers = None if reader is None else defaultdict[int, Reader](reader)

    def whole(self, index: int, text: str, scores: Sequence[Scored] | None, finish: str | None) -> Json:
        """Return a choice with a message."""
        content, calls, finish = self._read(index, text, finish)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [call for _, call in calls]}
        return self._choice(index, "message", message, scores, finish)

    def part(self, index: int, text: str, scores: Sequence[Scored] | None, finish: str | None) -> Json | None:
        """Return a choice with what is new in the message; None if nothing is."""
        content, calls, finish = self._read(index, text, finish)
        new: Json = {"content": content} if content else {}
        if calls:
            new["tool_calls"] = [{"index": number, **call} for number, call in calls]
        return self._choice(index, "delta", new, scores, finish) if new or scores or finish else None

    def first(self, index: int) -> Json:
        """Return the choice that says who speaks."""
        return self._choice(index, "delta", {"role": "assistant", "content": ""}, None, None)

    def _read(self, index: int, text: str, finish: str | None) -> tuple[str, list[tuple[int, Json]], str | None]:
        """Return what a piece of an answer adds to its content and to its numbered calls, and why it ends."""
        if self._readers is None:
            return text, [], finish
        reader = self._readers[index]
        before = reader.count
        content, found = reader.read(text, finish)
        calls = list(enumerate(map(_call, found), before))[: self._left(before)]
        return content, calls, "tool_calls" if finish == "stop" and reader.count else finish

    def _left(self, made: int) -> int | None:
        return None if self._most_calls is None else max(0, self._most_calls - made)

    def _choice(
        self, index: int, name: str, message: Json, scores: Sequence[Scored] | None, finish: str | None
    ) -> Json:
        found = None if scores is None else {"content": [self._scores(one.scores) for one in scores], "refusal": None}
        return {"index": index, name: message, "logprobs": found, "finish_reason": finish}

    def _scores(self, scores: TokenScores) -> Json:
        top = [self._score(token, logprob) for token, logprob in scores.top]
        return {**self._score(scores.token, scores.logprob), "top_logprobs": top}

    def _score(self, token: int, logprob: float) -> Json:
        raw = self._spelling.utf8(token)
        return {"token": self._spelling.text(token), "logprob": logprob, "bytes": None if raw is None else list(raw)}


def _call(call: Call) -> Json:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


Form = Completions | Chats


class Envelope:
    """What all events of a reply have in common.

    Args:
        model: the name that the client asked for.
        form: the kind of reply.
    """

    def __init__(self, model: str, form: Form) -> None:
        prefix = "chatcmpl" if isinstance(form, Chats) else "cmpl"
        self._common = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._form = form

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        """Return a reply that comes at once."""
        return {**self._common, "object": self._form.kind, "choices": choices, "usage": usage}

    def part(self, choices: Sequence[Json], usage: Json | None = None) -> Json:
        """Return an event of a stream."""
        found = {**self._common, "object": self._form.part_kind, "choices": choices}
        return found if usage is None else {**found, "usage": usage}


def usage(answers: Sequence[Answer], prompts: int) -> Json:
    """Return the tokens of a request whose answers are to this number of prompts, those to one prompt together."""
    own = answers[:: len(answers) // prompts]
    prompt, made = sum(len(answer.prompt) for answer in own), sum(answer.made for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in own)},
    }


def failure(message: str, kind: str, code: str | None = None, param: str | None = None) -> Json:
    """Return an error, about the parameter ``param`` of the request."""
    about = None if param is None else printable(param)  # a key that a client made up
    return {"error": {"message": printable(message), "type": kind, "param": about, "code": code}}
