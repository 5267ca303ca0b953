"""Tokens of a growing text."""

from __future__ import annotations

import torch


class TokenBuffer:
    """Tokens of several texts of one length, in one tensor that doubles when it is full.

    A separate tensor for each step would lie between the caches that grow from step to step: their memory could not be
    released, and a long text would cost its length squared.

    Args:
        tokens: int64 [B, T], the texts so far; copied.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        rows, self._length = tokens.shape
        self._memory = tokens.new_empty(rows, 2 * self._length)
        self._memory[:, : self._length] = tokens

    @property
    def tokens(self) -> torch.Tensor:
        """Texts so far, int64 [B, T]: a view, which a later ``append`` does not change."""
        return self._memory[:, : self._length]

    def append(self, token: torch.Tensor) -> None:
        """Add a token, int64 [B], to each text."""
        if self._length == self._memory.shape[1]:
            longer = self._memory.new_empty(len(self._memory), 2 * self._length)
            longer[:, : self._length] = self._memory
            self._memory = longer
        self._memory[:, self._length] = token
        self._length += 1

    def reorder(self, rows: list[int]) -> None:
        """Let each text go on from that of ``rows[i]``."""
        self._memory[:, : self._length] = self.tokens[rows]
