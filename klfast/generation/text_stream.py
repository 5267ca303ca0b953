"""Text of tokens that arrive one at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from klfast.generation.byte_tokens import ByteTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHRINK_AT, _KEEP = 24, 8  # tokens
_REPLACEMENT = "\ufffd"
# Endings that transformers' clean-up of spaces might still change: inside " ' ", " n't", " 've", " 're" and the like.
_UNSETTLED = re.compile(r"(?:[ ']|(?<= )n|(?<=')[vr])$")
_NOT_ASCII, _LONGEST_PART = 0x80, 3  # bytes of a character


class TextStream:
    """Turns token ids into pieces of text, at a constant cost per token.

    The pieces of ``push`` and ``end``, appended to the prompt's text, make up what ``tokenizer.decode`` returns for all
    tokens except special ones. A piece is held back while a later token could still change it, such as an incomplete
    character. The text of a token depends on the previous ones, since tokenizers like Llama's drop the space before the
    first word.

    There is one difference. Where a tokenizer has tokens for single bytes, ``decode`` replaces all bytes of a run,
    valid characters too, if one of them is wrong. Here a run ends with each ASCII byte: line feeds need not wait.

    Args:
        tokenizer: one of transformers.
        prompt_ids: the tokens before the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self._bytes, self._given = ByteTokens(tokenizer), 0  # characters
        self._window = [token for token in prompt_ids if token not in self._special]  # the latest tokens
        self._window = self._window[self._cut() :]
        self._shown = len(self._decoded())  # characters of the window's text
        if self._window and self._is_ascii(self._window[-1]):
            self._end_run()

    @property
    def written(self) -> int:
        """The characters of the text so far, held back or not, except for an incomplete one."""
        text, end = self._decoded(), len(self._window)
        least = max(0, end - _LONGEST_PART)
        while end > least and text.endswith(_REPLACEMENT) and self._is_byte(self._window[end - 1]):
            end -= 1  # else a part of a character spoils the run of bytes
            text = self._decoded(end)
        return self._given + len(text[self._shown :].rstrip(_REPLACEMENT))

    def special(self, token: int) -> str:
        """Return the name of a special token, which is not part of the text; empty for others."""
        return str(self._tokenizer.convert_ids_to_tokens(token)) if token in self._special else ""

    def push(self, token: int) -> str:
        """Return the text that this token completes, which may be empty."""
        if token in self._special:
            return ""
        self._window.append(token)
        ends_run = self._is_ascii(token)
        if self._is_byte(token) and not ends_run:  # only the end of a run of bytes shows whether it is valid
            return ""
        text = self._decoded()
        settled = len(text) - (text.endswith(_REPLACEMENT) and not ends_run)
        while self._cleans and settled > self._shown and _UNSETTLED.search(text, 0, settled):
            settled -= 1
        piece = self._give(text, settled)
        if ends_run and settled == len(text):
            self._end_run()
        elif len(self._window) > _SHRINK_AT and (cut := self._cut()):
            held = len(text) - self._shown
            self._window = self._window[cut:]
            self._shown = len(self._decoded()) - held
        return piece

    def end(self) -> str:
        """Return the text that was held back, which no later token changes any more."""
        text = self._decoded()
        piece = self._give(text, len(text))
        if self._window and self._is_byte(self._window[-1]):
            self._end_run()
        return piece

    def _give(self, text: str, settled: int) -> str:
        """Return what is new of the window's text up to a character."""
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        self._given += len(piece)
        return piece

    def _decoded(self, end: int | None = None) -> str:
        text = self._tokenizer.decode(self._window[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _is_byte(self, token: int) -> bool:
        return self._bytes.value(token) is not None

    def _is_ascii(self, token: int) -> bool:
        byte = self._bytes.value(token)
        return byte is not None and byte < _NOT_ASCII

    def _end_run(self) -> None:
        """Replace the bytes at the window's end by one, which is one character whatever bytes follow."""
        while self._window and self._is_byte(self._window[-1]):
            self._window.pop()
        assert self._bytes.zero is not None
        self._window.append(self._bytes.zero)
        self._shown = len(self._decoded())

    def _cut(self) -> int:
        """Return where the window may begin without cutting a run of bytes."""
        cut = max(0, len(self._window) - _KEEP)
        while cut and self._is_byte(self._window[cut]):
            cut -= 1
        return cut
