"""Text of tokens that come one at a time."""

from __future__ import annotations

import re

_SHRINK_AT, _KEEP = 24, 8  # tokens
_REPLACEMENT = "\ufffd"
# Where transformers' clean-up of spaces might still change what was written: inside " ' ", " n't", " 've", " 're" and the like.
_UNSETTLED = re.compile(r"(?:[ ']|(?<= )n|(?<=')[vr])$")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """Turns token ids into text, a piece at a time, at a cost per token that does not grow.

    After the prompt's text, the pieces of ``push`` and of ``end`` make up what ``tokenizer.decode`` gives for the whole,
    special tokens left out. A piece holds no text that a later token could still change: letters that lack bytes are held back.
    A tokenizer like Llama's drops the space before the first word, so the text of a token depends on the ones before it.

    Args:
        tokenizer: one of transformers.
        prompt_ids: the tokens before the first.
    """

    def __init__(self, tokenizer, prompt_ids: list[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        byte = tokenizer.convert_tokens_to_ids("<0x00>")
        self._has_bytes = byte is not None and byte != tokenizer.unk_token_id
        self._window = [token for token in prompt_ids if token not in self._special]  # the latest tokens
        self._window = self._window[self._cut() :]
        self._shown = len(self._decoded())  # letters of the window's text

    def push(self, token: int) -> str:
        """The text that is settled with this token, perhaps none."""
        if token in self._special:
            return ""
        self._window.append(token)
        if self._is_byte(token):  # whether a run of bytes is valid shows at its end
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
        """The text that was held back."""
        return self._decoded()[self._shown :]

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _is_byte(self, token: int) -> bool:
        return self._has_bytes and _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _cut(self) -> int:
        """Where the window can begin: no run of bytes is cut."""
        cut = max(0, len(self._window) - _KEEP)
        while cut and self._is_byte(self._window[cut]):
            cut -= 1
        return cut
