"""``Spelling``: the text and the bytes of single tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klfast.generation.byte_tokens import ByteTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_PROBE = "漢🦜 é"  # only byte-level tokenizers write all of it in their alphabet


class Spelling:
    """What each token of a tokenizer stands for inside a text.

    Args:
        tokenizer: one of transformers; not in use by another thread just now.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._bytes = tokenizer, ByteTokens(tokenizer)
        self._before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._begin = len(self._decoded(self._before))
        probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        raw = _raw("".join(tokenizer.convert_ids_to_tokens(probe)))
        self._is_byte_level = raw is not None and raw.strip() == _PROBE.encode()

    def text(self, token: int) -> str:
        """Return a token's text after another one's: the space before the first word of a text may be left out.

        A token that is only a part of a character is U+FFFD, the replacement character.
        """
        return self._decoded([*self._before, token])[self._begin :]

    def utf8(self, token: int) -> bytes | None:
        """Return a token's bytes, which may be a part of a character's; None if the tokenizer does not tell them."""
        byte = self._bytes.value(token)
        if byte is not None:
            return bytes([byte])
        name = self._tokenizer.convert_ids_to_tokens(token)
        if self._is_byte_level and isinstance(name, str):
            raw = _raw(name)
            if raw is not None:
                return raw
        text = self.text(token)
        return None if _REPLACEMENT in text else text.encode()

    def _decoded(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens)
        assert isinstance(text, str)
        return text


def _raw(name: str) -> bytes | None:
    """Return the bytes that a name of letters of the byte-level alphabet stands for; None if it has others."""
    return bytes(_ALPHABET[letter] for letter in name) if all(letter in _ALPHABET for letter in name) else None


def _alphabet() -> dict[str, int]:
    """Return the letters that byte-level tokenizers write for bytes: GPT-2's, visible ones for themselves."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()
