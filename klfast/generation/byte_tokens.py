"""Tokens that stand for a single byte, ``<0x00>`` to ``<0xFF>``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class ByteTokens:
    """Those of a tokenizer that writes letters without a token byte by byte (SentencePiece's byte fallback).

    Args:
        tokenizer: one of transformers.

    Attributes:
        zero: the token of byte 0; None if the tokenizer has no such tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        zero = tokenizer.convert_tokens_to_ids("<0x00>")
        self.zero = zero if isinstance(zero, int) and zero != tokenizer.unk_token_id else None

    def value(self, token: int) -> int | None:
        """Return the byte that a token stands for; None for other tokens."""
        if self.zero is None:
            return None
        name = self._tokenizer.convert_ids_to_tokens(token)
        found = _BYTE.fullmatch(name) if isinstance(name, str) else None
        return int(found[1], 16) if found else None
