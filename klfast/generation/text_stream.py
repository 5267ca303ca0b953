"""Text of tokens that arrive one at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHRINK_AT, _KEEP = 24, 8  # tokens
_REPLACEMENT = "\ufffd"
# Endings that transformers' clean-up of spaces might still change: inside " ' ", " n't", " 've", " 're" and the like.
_UNSETTLED = re.compile(r"(?:[ ']|(?<= )n|(?<=')[vr])$")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """Turns token ids into pieces of text, at a constant cost per token.

    The pieces of ``push`` and ``end``, appended to the prompt's text, make up what ``tokenizer.decode`` returns for all
    tokens except special ones. A piece is held back while a later token could still change it, such as an incomplete
    character. The text of a token depends on the previous ones, since tokenizers like Llama's drop the space before the
    first word.

    Args:
        tokenizer: one of transformers.
        prompt_ids: the tokens before the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        byte = tokenizer.convert_tokens_to_ids("<0x00>")
        self._has_bytes = byte is not None and byte != tokenizer.unk_token_id
        self._window = [token for token in prompt_ids if token not in self._special]  # the latest tokens
        self._window = self._window[self._cut() :]
        self._shown = len(self._decoded())  # characters of the window's text

    def push(self, token: int) -> str:
        """Return the text that this token completes, which may be empty."""
        if token in self._special:
            return ""
        self._window.append(token)
        if self._is_byte(token):  # only the end of a run of bytes shows whether it is valid
            return ""
        text = self._decoded()
        settled = len(text) - text.endswith(_REPLACEMENT)
        while self._cleans and settled > self._shown and _UNSETTLED.search(text, 0, settled):
            settled -= 1
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        if len(self._window) > _SHRINK_AT and (cut := self._cut()):
            held = len(text) - self._shown
            self._window = self._window[cut:]
            self._shown = len(self._decoded()) - held
        return piece

    def end(self) -> str:
        """Return the text that was held back."""
        return self._decoded()[self._shown :]

    def _decoded(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _is_byte(self, token: int) -> bool:
        if not self._has_bytes:
            return False
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE.fullmatch(name) is not None

    def _cut(self) -> int:
        """Return where the window may begin without cutting a run of bytes."""
        cut = max(0, len(self._window) - _KEEP)
        while cut and self._is_byte(self._window[cut]):
            cut -= 1
        return cut
