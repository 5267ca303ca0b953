"""When a row of generated tokens is done."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from klfast.core.arguments import integer
from klfast.core.errors import InvalidInputError


def end_tokens(given: object) -> list[int]:
    """Token ids of an int, or of an iterable or tensor of ints."""
    values = (
        given.flatten().tolist() if isinstance(given, torch.Tensor) else [*given] if _is_iterable(given) else [given]
    )
    return [integer("eos_token_id", value, 0) for value in values]


def stop_strings(given: str | Iterable[str]) -> list[str]:
    """The stop strings as a list; an empty string or anything but text raises InvalidInputError."""
    values = [given] if isinstance(given, str) or not _is_iterable(given) else [*given]
    for value in values:
        if not isinstance(value, str) or not value:
            raise InvalidInputError(f"stop_strings must be texts that are not empty, got {value!r}")
    return values


class Stopping:
    """Keeps track of the rows that go on.

    Args:
        rows: number of rows.
        ends: tokens that end a row.
        strings: texts that end a row where they are complete, at the end of its last token.
        tokenizer: that of the model, for ``strings``.
        pad: what fills rows that are done; may be None for a single row.
        device: where the tokens are.
    """

    def __init__(
        self, rows: int, ends: list[int], strings: list[str], tokenizer: object, pad: int | None, device: torch.device
    ) -> None:
        self._ends = torch.tensor(ends, device=device) if ends else None
        self._strings = _criterion(strings, tokenizer) if strings else None
        self._running = torch.ones(rows, dtype=torch.bool, device=device)
        self._pad, self._stops = pad, bool(ends or strings)
        self._fills = self._stops and rows > 1
        if self._fills and pad is None:
            raise InvalidInputError(
                "rows may end at different lengths, and the model names no padding token; give pad_token_id"
            )

    def fill(self, token: torch.Tensor) -> torch.Tensor:
        """The tokens, int64 [B], with the padding token in rows that are done."""
        return torch.where(self._running, token, self._pad) if self._fills else token

    def update(self, token: torch.Tensor, seen: torch.Tensor) -> bool:
        """Note the newest tokens, int64 [B], the last of ``seen``, int64 [B, T]; whether all rows are done."""
        if self._ends is not None:
            self._running &= token != self._ends if len(self._ends) == 1 else ~torch.isin(token, self._ends)
        if self._strings is not None:
            self._running &= ~self._strings(seen, None)
        return self._stops and not bool(self._running.any())


def _criterion(strings: list[str], tokenizer: object):
    from transformers import StopStringCriteria

    if tokenizer is None:
        raise InvalidInputError("stop_strings need the model's tokenizer; give tokenizer=")
    try:
        return StopStringCriteria(tokenizer, strings)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{type(tokenizer).__name__} cannot write the stop strings {strings}: {' '.join(str(error).split())}"
        ) from None


def _is_iterable(value: object) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes))
