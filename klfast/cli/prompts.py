"""Prompts of ``klfast generate``: reading, checking and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from klfast.core.errors import InvalidInputError
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


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, model: str, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """Return the token ids of a prompt, or of a chat message in the template of the model named ``model``."""
    if chat:
        text = _chat(tokenizer, text, model, system)
    # A template writes its special tokens itself.
    found: list[int] = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    if not found:
        raise InvalidInputError("the prompt has no tokens; give some text")
    return found


def _chat(tokenizer: PreTrainedTokenizerBase, text: str, model: str, system: str | None) -> str:
    """Return the prompt as the model's chat template writes it."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(f"{model} has no chat template; leave --chat out to continue the prompt as text")
    messages = [] if system is None else [{"role": "system", "content": require_unicode(system)}]
    return chat_text(tokenizer, [*messages, {"role": "user", "content": text}], model)
