"""The bodies of requests, as OpenAI's API names them, and their limits.

Options that klfast does not follow are refused unless they say what it does anyway; unknown ones always. Source:
OpenAI's API reference (completions, chat completions); ``top_k``, ``min_p``, ``repetition_penalty``,
``stop_token_ids``, ``ignore_eos`` and ``chat_template_kwargs`` are vLLM's additions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

_MOST_CHOICES, _MOST_STOPS, _LONGEST_STOP = 16, 16, 256


HALF = "has half of a surrogate pair; send whole characters"
# Forms of a value that may have several: pydantic puts them into the places of errors, where they help nobody.
FORMS = _TEXT, _TEXTS, _TOKENS, _TOKEN_LISTS = ("a text", "texts", "token ids", "lists of token ids")


def _form(value: object) -> str | None:
    """Return the form of a value by its own type and that of its first part; None if it is neither text nor list."""
    if isinstance(value, str):
        return _TEXT
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return _TEXTS if isinstance(first, str) else _TOKEN_LISTS if isinstance(first, list) else _TOKENS


def _text_or_list(value: object) -> str | None:
    """Return the form of a value that is a text or a list of whatever the list's own check allows."""
    return _form(value) and (_TEXT if isinstance(value, str) else _TEXTS)


def _only(*neutral: object) -> BeforeValidator:
    """Refuse all values but these and null."""

    def check(value: object) -> object:
        if value is not None and value not in neutral:
            raise ValueError("is not supported; leave it out")
        return value

    return BeforeValidator(check)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold it
        raise ValueError(HALF) from None
    return text


_Text = Annotated[str, AfterValidator(_unicode)]
_Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP), AfterValidator(_unicode)]
_Stops = Annotated[
    Annotated[_Stop, Tag(_TEXT)] | Annotated[list[_Stop], Field(max_length=_MOST_STOPS, fail_fast=True), Tag(_TEXTS)],
    Discriminator(_text_or_list, "form", "Input should be a text or a list of texts"),
]
_Ignored = Any  # says nothing about the answer
_Id = Annotated[int, Field(ge=0, lt=2**63)]
_Ids = Annotated[list[_Id], Field(min_length=1, fail_fast=True)]


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
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1: all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - _MOST_CHOICES)] | None = None
    stop: _Stops | None = None
    stop_token_ids: Annotated[list[_Id], Field(max_length=_MOST_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: _Ignored = None
    metadata: _Ignored = None
    logit_bias: Annotated[Any, _only({})] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_likely(self) -> int | None:
        """The number of most likely tokens to draw from; 0 for all, None for the model's own."""
        return None if self.top_k is None else max(0, self.top_k)


class CompletionRequest(Asked):
    """The body of /v1/completions."""

    prompt: Annotated[
        Annotated[_Text, Tag(_TEXT)]
        | Annotated[list[_Text], Field(min_length=1, max_length=_MOST_CHOICES, fail_fast=True), Tag(_TEXTS)]
        | Annotated[_Ids, Tag(_TOKENS)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=_MOST_CHOICES, fail_fast=True), Tag(_TOKEN_LISTS)],
        Discriminator(_form, "form", "Input should be a text, token ids, or a list of either"),
    ]
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
    tool_calls: Annotated[Any, _only([])] = None  # before the content, which may be null beside them
    function_call: Annotated[Any, _only()] = None
    audio: Annotated[Any, _only()] = None
    content: Annotated[
        Annotated[_Text, Tag(_TEXT)] | Annotated[list[_TextPart], Field(fail_fast=True), Tag(_TEXTS)],
        Discriminator(_text_or_list, "form", "Input should be a text or a list of text parts"),
    ]
    name: _Ignored = None
    refusal: Annotated[Any, _only()] = None


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: Annotated[Any, _only(False)] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    tools: Any = None
    parallel_tool_calls: _Ignored = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("tools")
    @classmethod
    def _call_none(cls, tools: object, info: ValidationInfo) -> object:
        if tools and info.data.get("tool_choice") != "none":
            raise ValueError('is not supported; leave it out, or send tool_choice "none"')
        return tools

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
