"""Chats as the text that a model's template makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from klfast.core.errors import InvalidInputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_OWN = frozenset({"self", "messages", "conversations"})  # that templates get beside the method's parameters


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    model: str,
    options: Mapping[str, Any] | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """Return the prompt for the answer to messages ("role", "content"); it holds the special tokens already.

    Args:
        tokenizer: one with a chat template.
        messages: the chat so far.
        model: a name for errors.
        options: variables of the template, such as ``enable_thinking``; it ignores those that it does not know.
        tools: that the model may call, in the form of OpenAI's API.

    Raises:
        InvalidInputError: the template refuses the messages, an option has the name of what klfast gives itself, or the
            template does not tell the model of tools.
    """
    options = options or {}
    if options and (taken := options.keys() & {*_OWN, *inspect.signature(tokenizer.apply_chat_template).parameters}):
        raise InvalidInputError(f"chat_template_kwargs cannot set {min(taken)}, which klfast sets itself; leave it out")

    def text_with(tools: list[Any] | None) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=True, **options
        )
        assert isinstance(text, str)
        text.encode()  # halves of surrogate pairs in the options
        return text

    try:
        text = text_with(list(tools) or None)
        ignores_tools = bool(tools) and text == text_with(None)
    except Exception as error:  # noqa: BLE001 (a template is code that comes with the model)
        raise InvalidInputError(f"the chat template of {model} refuses these messages: {one_line(error)}") from None
    if ignores_tools:
        raise InvalidInputError(f"the chat template of {model} does not tell the model of tools; leave them out")
    return text


def system_part(text: str, messages: Sequence[dict[str, Any]]) -> str:
    """Return a chat's text up to the end of its system messages, which other chats may share; empty without any."""
    end = 0
    for message in takewhile(lambda one: one["role"] == "system", messages):
        content = message["content"].strip()
        begin = text.find(content, end)
        if begin < 0:  # the template writes it in another way
            break
        end = begin + len(content)
    return text[:end]
