"""The bodies of requests, as OpenAI's API names them, and their limits.

Options that klfast does not follow are refused unless they say what it does anyway; unknown ones always. Source:
OpenAI's API reference (completions, chat completions); ``top_k``, ``min_p`` and ``repetition_penalty`` are vLLM's
additions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_MOST_CHOICES, _MOST_STOPS, _LONGEST_STOP = 16, 16, 256


def _only(*neutral: object) -> BeforeValidator:
    """Refuse all values but these and null."""

    def check(value: object) -> object:
        if value is not None and value not in neutral:
            raise ValueError("is not supported; leave it out")
        return value

    return BeforeValidator(check)


def _unicode(text: str) -> str:
    text.encode()  # raises a ValueError for half of a surrogate pair, which JSON can hold
    return text


_Text = Annotated[str, AfterValidator(_unicode)]
_Stop = Annotated[_Text, Field(min_length=1, max_length=_LONGEST_STOP)]
_Ignored = Any  # says nothing about the answer
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1, fail_fast=True)]


class _Body(BaseModel):
    """What has known keys alone, of the types that the API names, and one error, since 100,000 take seconds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        unknown = {key for key in given if key not in cls.model_fields}
        one = next((key for key in given if key in unknown), None)
        return {key: value for key, value in given.items() if key == one or key not in unknown}


class _StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: _Ignored = None


class Asked(_Body):
    """What both kinds of requests have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - _MOST_CHOICES)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: _Ignored = None
    metadata: _Ignored = None
    logit_bias: Annotated[Any, _only({})] = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Asked):
    """The body of /v1/completions."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=_MOST_CHOICES, fail_fast=True)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=_MOST_CHOICES, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[Any, _only(False)] = None
    suffix: Annotated[Any, _only("")] = None
    best_of: Annotated[Any, _only(1)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if is_one else self.prompt)


class _TextPart(_Body):
    type: Literal["text"]
    text: _Text


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[_TextPart], Field(fail_fast=True)]
    name: _Ignored = None
    refusal: Annotated[Any, _only()] = None


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: Annotated[Any, _only(False)] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    parallel_tool_calls: _Ignored = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    reasoning_effort: Annotated[Any, _only("none")] = None

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in self.messages
        ]
