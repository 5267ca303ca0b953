"""States at the ends of texts, from which longer texts with the same beginning go on."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from klfast.engine.state import State


class Prefix(NamedTuple):
    """What the engine knew after some tokens; not to be changed.

    Attributes:
        tokens: their number.
        state: of one sequence.
        logits: those of the next token, float32 [1, V].
    """

    tokens: int
    state: State
    logits: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Size of both in bytes."""
        return self.state.nbytes + self.logits.nbytes


class PrefixCache:
    """Keeps states by the tokens that led to them, and forgets those that were used least recently.

    A recurrent state holds all tokens before it: only whole texts are found, not the common part of two texts.

    Args:
        most_bytes: that all states together may take; 0 keeps none.

    Attributes:
        nbytes: what they take now.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self.nbytes = most_bytes, 0
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()  # the latest used last

    def __len__(self) -> int:
        return len(self._prefixes)

    def longest(self, tokens: Sequence[int]) -> Prefix | None:
        """Return what is known of the longest beginning of some tokens."""
        text = _key(tokens)
        found = max((key for key in self._prefixes if text.startswith(key)), key=len, default=None)
        if found is None:
            return None
        self._prefixes.move_to_end(found)
        return self._prefixes[found]

    def put(self, tokens: Sequence[int], state: State, row: int, logits: torch.Tensor) -> None:
        """Keep a copy of a sequence's state after ``tokens``, and of the next token's logits, float32 [1, V]."""
        key = _key(tokens)
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
            return
        if logits.nbytes > self._most:
            return
        prefix = Prefix(len(tokens), state.sequence(row), logits.clone())
        if prefix.nbytes > self._most:
            return
        self._prefixes[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self._most:
            self.nbytes -= self._prefixes.popitem(last=False)[1].nbytes


def _key(tokens: Sequence[int]) -> bytes:
    """Return tokens as bytes, as many for each."""
    return array("q", tokens).tobytes()
