"""``PromptRows``: the rows of a call of ``generate``, before their first new token."""

from __future__ import annotations

from typing import NamedTuple

import torch

from klfast.core.errors import InvalidInputError
from klfast.generation.token_buffer import TokenBuffer


class PromptRows(NamedTuple):
    """Prompts, each in as many rows after one another as texts go on from it.

    Attributes:
        ids: int64 [B, T].
        mask: int64 [B, T] of zeros and ones, zeros on the left; None if there is no padding.
        copies: rows of each prompt.
        tokens: of the prompts in all, each counted once, without padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    copies: int
    tokens: int

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None, copies: int) -> PromptRows:
        """Return the rows of prompts, int64 [B, T], with a mask of int or bool [B, T].

        Raises:
            InvalidInputError: the mask has another shape, padding elsewhere than on the left, or a row without tokens.
        """
        rows = ids.repeat_interleave(copies, 0)
        if mask is None:
            return cls(rows, None, copies, ids.numel())
        mask = _checked(mask, ids)
        return cls(rows, mask.repeat_interleave(copies, 0), copies, int(mask.sum()))

    def text(self) -> TokenBuffer:
        """Return the rows as penalties and stop strings see them: the last token in the place of padding."""
        return TokenBuffer(self.ids if self.mask is None else torch.where(self.mask != 0, self.ids, self.ids[:, -1:]))


def _checked(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mask as int64 zeros and ones."""
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != tuple(ids.shape):
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InvalidInputError(f"attention_mask must have the shape of ids, {list(ids.shape)}, got {found}")
    mask = (mask != 0).long()
    if empty := (mask.sum(1) == 0).nonzero().flatten().tolist():
        raise InvalidInputError(
            f"row {empty[0]} of ids has no tokens: its attention_mask is all zeros; give a begin token, or leave it out"
        )
    if not mask[:, -1].all() or (mask.diff(dim=1) < 0).any():
        raise InvalidInputError("padding must be on the left of each row; set the tokenizer's padding_side to left")
    return mask
