"""The bodies of requests, as OpenAI's API names them, and their limits.

Options that klfast does not follow are refused unless they say what it does anyway; unknown ones always. Source:
OpenAI's API reference (completions, chat completions); ``top_k``, ``min_p``, ``repetition_penalty``,
``stop_token_ids``, ``ignore_eos`` and ``chat_template_kwargs`` are vLLM's additions.
"""

from __future__ import annotations

import json
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

from klfast.serving.tool_calls import NAME, schema_of_calls

_MOST_CHOICES, _MOST_STOPS, _LONGEST_STOP = 16, 16, 256


HALF = "has half of a surrogate pair; send whole characters"
# Forms of a value that may have several: pydantic puts them into the places of errors, where they help nobody.
FORMS = _TEXT, _TEXTS, _TOKENS, _TOKEN_LISTS, _OBJECT = (
    "a text",
    "texts",
    "token ids",
    "lists of token ids",
    "an object",
)


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


def _text_or_object(value: object) -> str | None:
    return _TEXT if isinstance(value, str) else _OBJECT if isinstance(value, dict) else None


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
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = {key for key in given if key not in known}
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


class _CalledFunction(_Body):
    name: _Text
    arguments: _Text
    parsed_arguments: _Ignored = None  # which OpenAI's client adds to an answer

    @property
    def chat(self) -> dict[str, Any]:
        """The function as chat templates take it: with an object; with a text where a model wrote none."""
        try:
            given = json.loads(self.arguments) if self.arguments.strip() else {}
        except (ValueError, RecursionError):
            given = self.arguments
        return {"name": self.name, "arguments": given if isinstance(given, dict) else self.arguments}


class _ToolCall(_Body):
    id: _Text
    type: Literal["function"]
    function: _CalledFunction
    index: _Ignored = None  # in streams

    @property
    def chat(self) -> dict[str, Any]:
        """The call as chat templates take it."""
        return {"id": self.id, "type": self.type, "function": self.function.chat}


_Content = Annotated[
    Annotated[_Text, Tag(_TEXT)] | Annotated[list[_TextPart], Field(fail_fast=True), Tag(_TEXTS)],
    Discriminator(_text_or_list, "form", "Input should be a text or a list of text parts"),
]


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[_ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: _Text | None = None
    function_call: Annotated[Any, _only()] = None
    audio: Annotated[Any, _only()] = None
    content: _Content | None = Field(None, validate_default=True)
    name: _Text | None = None
    annotations: Annotated[Any, _only([])] = None
    parsed: _Ignored = None  # which OpenAI's client adds to an answer
    reasoning_content: _Text | None = None
    refusal: Annotated[Any, _only()] = None

    @field_validator("tool_calls")
    @classmethod
    def _calls_of_the_assistant(cls, calls: list[_ToolCall] | None, info: ValidationInfo) -> list[_ToolCall] | None:
        if calls and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only the assistant calls tools")
        return calls

    @field_validator("content")
    @classmethod
    def _something(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and "tool_calls" in info.data and not info.data["tool_calls"]:
            beside = ", unless there are tool_calls" if info.data.get("role") == "assistant" else ""
            raise ValueError(f"Field required{beside}")
        return content

    @property
    def chat(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.reasoning_content:
            found["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            found["tool_calls"] = [call.chat for call in self.tool_calls]
        if self.role == "tool":
            found |= {key: one for key, one in (("tool_call_id", self.tool_call_id), ("name", self.name)) if one}
        return found


class _Function(_Body):
    name: Annotated[_Text, Field(pattern=NAME)]
    description: _Text | None = None
    parameters: dict[str, Any] | None = None
    strict: _Ignored = None


class _Tool(_Body):
    type: Literal["function"]
    function: _Function

    @property
    def chat(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class _Name(_Body):
    name: _Text


class _NamedTool(_Body):
    type: Literal["function"]
    function: _Name


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(_TEXT)] | Annotated[_NamedTool, Tag(_OBJECT)],
    Discriminator(_text_or_object, "form", 'Input should be "none", "auto", "required" or a function'),
]


class _JsonSchema(_Body):
    name: _Ignored = None
    description: _Ignored = None
    strict: _Ignored = None  # it is followed anyway
    content: Annotated[dict[str, Any], Field(alias="schema")]


class _ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[_JsonSchema | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _where_it_counts(cls, schema: _JsonSchema | None, info: ValidationInfo) -> _JsonSchema | None:
        if info.data.get("type") == "json_schema" and schema is None:
            raise ValueError("Field required")
        if info.data.get("type") in ("text", "json_object") and schema is not None:
            raise ValueError('needs type "json_schema"')
        return schema


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: Annotated[Any, _only(False)] = None
    tools: Annotated[list[_Tool], Field(fail_fast=True)] | None = None
    tool_choice: _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: _ResponseFormat | None = None
    modalities: Annotated[Any, _only(["text"])] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("tools")
    @classmethod
    def _told_apart(cls, tools: list[_Tool] | None) -> list[_Tool] | None:
        if tools and len({tool.function.name for tool in tools}) < len(tools):
            raise ValueError("several have one name")
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _of_the_tools(cls, choice: _ToolChoice | None, info: ValidationInfo) -> _ToolChoice | None:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if "tools" in info.data and choice == "required" and not names:
            raise ValueError("needs tools")
        if "tools" in info.data and isinstance(choice, _NamedTool) and choice.function.name not in names:
            raise ValueError(f"there is no tool {choice.function.name!r}")
        return choice

    @field_validator("response_format")
    @classmethod
    def _not_beside_tools(cls, form: _ResponseFormat | None, info: ValidationInfo) -> _ResponseFormat | None:
        if (
            form is not None
            and form.type != "text"
            and info.data.get("tools")
            and info.data.get("tool_choice") != "none"
        ):
            raise ValueError('is not supported beside tools; leave it out, or send tool_choice "none"')
        return form

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        return [message.chat for message in self.messages]

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates take them."""
        return [] if self.tool_choice == "none" else [tool.chat for tool in self.tools or []]

    @property
    def most_calls(self) -> int | None:
        """The most calls of tools in an answer, if it is limited."""
        return 1 if self.parallel_tool_calls is False or isinstance(self.tool_choice, _NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Whether an answer must consist of calls."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, _NamedTool)

    @property
    def schema_of_answers(self) -> dict[str, Any] | None:
        """The JSON schema that answers must fit; None if they may be any text."""
        if self.must_call:
            choice = self.tool_choice
            named = choice.function.name if isinstance(choice, _NamedTool) else None
            tools = [tool for tool in self.callable_tools if named in (None, tool["function"]["name"])]
            return schema_of_calls(tools, self.most_calls)
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.content

    @property
    def tool_schemas(self) -> dict[str, dict[str, Any]]:
        """The JSON schemas of the tools' parameters by the tools' names."""
        return {tool.function.name: tool.function.parameters or {} for tool in self.tools or []}
