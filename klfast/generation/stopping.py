"""Stopping conditions of generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from klfast.core.arguments import integer
from klfast.core.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_tokens(given: object) -> list[int]:
    """Return the token ids in an int, or in an iterable or tensor of ints."""
    if isinstance(given, torch.Tensor):
        given = given.flatten().tolist()
    return [integer("eos_token_id", value, 0) for value in _listed(given)]


def ends_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens of the model's generation_config and tokenizer: often only one of them names one."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = tokenizer.eos_token_id
    return sorted({*([] if named is None else end_tokens(named)), *([] if own is None else [own])})


def stop_strings(given: object) -> list[str]:
    """Return the stop strings as a list; raise InvalidInputError unless each is text and not empty."""
    strings = []
    for value in _listed(given):
        if not isinstance(value, str) or not value:
            raise InvalidInputError(f"stop_strings must be texts that are not empty, got {value!r}")
        strings.append(value)
    return strings


class Stopping:
    """Keeps track of the rows that are not done.

    Args:
        rows: number of rows.
        ends: tokens that end a row.
        strings: texts that end a row where they are complete, at the end of its last token.
        tokenizer: the model's, for ``strings``.
        pad: token that fills rows that are done; may be None for a single row.
        device: the tokens' device.

    Attributes:
        running: the rows that are not done, bool [B].
    """

    def __init__(
        self,
        rows: int,
        ends: list[int],
        strings: list[str],
        tokenizer: PreTrainedTokenizerBase | None,
        pad: int | None,
        device: torch.device,
    ) -> None:
        self._ends = torch.tensor(ends, device=device) if ends else None
        self._strings = _criterion(strings, tokenizer) if strings else None
        self.running = torch.ones(rows, dtype=torch.bool, device=device)
        self._stops = bool(ends or strings)
        self._filler: int | None = None  # None if no row can be done before the others
        if self._stops and rows > 1:
            if pad is None:
                raise InvalidInputError(
                    "rows may end at different lengths, and the model has no padding token; give pad_token_id"
                )
            self._filler = pad

    def fill(self, token: torch.Tensor) -> torch.Tensor:
        """Return the tokens, int64 [B], with the padding token in rows that are done."""
        return token if self._filler is None else torch.where(self.running, token, self._filler)

    def completes(self, token: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return, bool [B], where the newest token, int64 [B], the last of ``seen``, int64 [B, T], ends a text."""
        found = torch.zeros_like(token, dtype=torch.bool)
        if self._ends is not None:
            found |= token == self._ends if len(self._ends) == 1 else torch.isin(token, self._ends)
        if self._strings is not None:
            found |= self._strings(seen, None)
        return found

    def update(self, token: torch.Tensor, seen: torch.Tensor) -> bool:
        """Note the newest tokens, int64 [B], the last of ``seen``, int64 [B, T]; return True if all rows are done."""
        if not self._stops:
            return False
        self.running &= ~self.completes(token, seen)
        return not bool(self.running.any())


def _criterion(
    strings: list[str], tokenizer: PreTrainedTokenizerBase | None
) -> Callable[[torch.Tensor, None], torch.Tensor]:
    """Return a function of tokens [B, T] that tells, bool [B], in which rows the last one completes a stop string."""
    from transformers import StopStringCriteria

    if tokenizer is None:
        raise InvalidInputError("stop_strings need the model's tokenizer; give tokenizer=")
    try:
        return StopStringCriteria(tokenizer, strings)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{type(tokenizer).__name__} does not support the stop strings {strings}: {' '.join(str(error).split())}"
        ) from None


def _listed(given: object) -> list[object]:
    return [*given] if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else [given]
