"""Chats as the text that a model's template makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from klfast.core.errors import InvalidInputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], model: str) -> str:
    """Return the prompt for the answer to messages ("role", "content"); it holds the special tokens already.

    Args:
        tokenizer: one with a chat template.
        messages: the chat so far.
        model: a name for errors.

    Raises:
        InvalidInputError: the template refuses the messages.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # noqa: BLE001 (a template is code that comes with the model)
        raise InvalidInputError(f"the chat template of {model} refuses these messages: {one_line(error)}") from None


def system_part(text: str, messages: Sequence[dict[str, str]]) -> str:
    """Return a chat's text up to the end of its system messages, which other chats may share; empty without any."""
    end = 0
    for message in takewhile(lambda one: one["role"] == "system", messages):
        content = message["content"].strip()
        begin = text.find(content, end)
        if begin < 0:  # the template writes it in another way
            break
        end = begin + len(content)
    return text[:end]
