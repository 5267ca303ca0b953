"""Prompts of ``klfast generate``: reading, checking and encoding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from klfast.core.errors import InvalidInputError
from klfast.core.io import parse_json
from klfast.generation.chat import chat_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not valid UTF-8 (byte {error.start}); save it as UTF-8") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise InvalidInputError(f"{path} holds no prompts; write one per line")
    return found


def require_unicode(text: str) -> str:
    """Return the text; raise InvalidInputError for invalid UTF-8, which Python reads as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"the prompt is not valid UTF-8 (letter {error.start + 1}); set the terminal's encoding to UTF-8"
        ) from None
    return text


def parse_object(text: str) -> dict[str, Any]:
    """Return the object that a text of JSON holds; anything else is wrong usage."""
    try:
        found = parse_json(text.encode())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(
            f"--chat-template-kwargs takes an object of JSON, such as '{{\"enable_thinking\": false}}', got {text!r}"
        )
    return found


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a prompt, with those that the tokenizer puts around it if ``special``."""
    found: list[int] = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if not found:
        raise InvalidInputError("the prompt has no tokens; give some text")
    return found


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, text: str, model: str, system: str | None, options: Mapping[str, Any] | None
) -> list[int]:
    """Return the token ids of a chat message in the template, with its ``options``, of the model named ``model``."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(f"{model} has no chat template; leave --chat out to continue the prompt as text")
    messages = [] if system is None else [{"role": "system", "content": require_unicode(system)}]
    chat = chat_text(tokenizer, [*messages, {"role": "user", "content": text}], model, options)
    return encode(tokenizer, chat, special=False)  # a template writes its special tokens itself
