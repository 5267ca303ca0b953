"""Choice of the next token from the model's logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from klfast.core.errors import InvalidInputError
from klfast.generation.penalties import Penalties

NAN_LOGITS = "the model's logits hold a NaN; its weights are damaged"


@dataclass(frozen=True)
class Sampling:
    """Sampling options; None has no effect."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class Chooser:
    """Chooses the next token of each row.

    Args:
        sampling: options of sampling; None takes the most likely token.
        penalties: of tokens that have occurred.
        prompt_tokens: how many of a row's tokens are the prompt, padding included.
        generator: source of randomness; torch's own if None.
    """

    def __init__(
        self, sampling: Sampling | None, penalties: Penalties, prompt_tokens: int, generator: torch.Generator | None
    ) -> None:
        self._generator, self._prompt_tokens = generator, prompt_tokens
        self._penalties = None if penalties == Penalties() else penalties
        self._filters = None if sampling is None else _filters(sampling)

    def __call__(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return tokens, int64 [B], from float32 logits [B, V] and the int64 [B, T] tokens before."""
        top, token = _likeliest(logits)  # a NaN counts as the largest
        if top.isnan().any():
            raise InvalidInputError(NAN_LOGITS)
        if self._penalties is not None:
            logits = self._penalties(logits, seen, self._prompt_tokens)
            top, token = _likeliest(logits)
        if self._filters is None:
            return token
        if not top.isfinite().all():
            raise InvalidInputError(
                "the model's logits hold an infinity, so no token can be sampled; its weights are damaged"
            )
        scores = logits - top.unsqueeze(1)  # so that the largest is 0, which no temperature takes out of range
        for change in self._filters:
            scores = change(seen, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator).squeeze(1)


def _likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest of float32 logits [B, V] in each row, [B], and their tokens, int64 [B]."""
    if logits.is_cpu:
        with suppress(ImportError):  # the extension is not built
            from klfast.backends.cpu.largest import largest

            return largest(logits)
    top, token = logits.max(-1)
    return top, token


def _filters(sampling: Sampling) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Return transformers' filters, in its order, but not its temperature, which overflows if it is tiny."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    limits = torch.finfo(torch.float32)
    temperature = min(max(sampling.temperature, limits.tiny), limits.max)
    found = [] if temperature == 1 else [lambda _, scores: scores / temperature]
    found += [] if sampling.top_k is None else [TopKLogitsWarper(sampling.top_k)]
    found += [] if sampling.top_p in (None, 1) else [TopPLogitsWarper(sampling.top_p)]
    return found + ([] if not sampling.min_p else [MinPLogitsWarper(sampling.min_p)])
