"""Penalties of tokens that have occurred."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klfast.core.arguments import number


@dataclass(frozen=True)
class Penalties:
    """What makes tokens that have occurred less likely; the defaults change nothing.

    Attributes:
        repetition: divides the positive logits of the tokens of prompt and text, and multiplies their negative ones
            (Keskar et al. 2019, arXiv:1909.05858, section 4.1, as transformers has it).
        presence: subtracted from the logits of the text's tokens, without the prompt's (OpenAI's API reference).
        frequency: the same, once for each time that a token has occurred.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @classmethod
    def checked(cls, repetition: object, presence: object, frequency: object) -> Penalties:
        """Return the penalties of numbers that users give; None is the default.

        Raises:
            InvalidInputError: a penalty is out of range.
        """
        return cls(
            1.0 if repetition is None else number("repetition_penalty", repetition, _is_factor, "between 1e-6 and 1e6"),
            0.0 if presence is None else number("presence_penalty", presence, _is_shift, "between -2 and 2"),
            0.0 if frequency is None else number("frequency_penalty", frequency, _is_shift, "between -2 and 2"),
        )

    def __call__(self, scores: torch.Tensor, seen: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
        """Return changed scores.

        Args:
            scores: float32 [B, V], logits or log probabilities.
            seen: int64 [B, T], the tokens before.
            prompt_tokens: how many of these, from the first, are the prompt.
        """
        if self.repetition != 1:
            found = scores.gather(1, seen)
            changed = torch.where(found < 0, found * self.repetition, found / self.repetition)
            scores = scores.scatter(1, seen, changed)
        if self.presence or self.frequency:
            made = seen[:, prompt_tokens:]
            counts = torch.zeros_like(scores).scatter_add_(1, made, torch.ones_like(made, dtype=scores.dtype))
            scores = scores - self.frequency * counts - self.presence * (counts > 0)
        return scores


def _is_factor(value: float) -> bool:
    return 1e-6 <= value <= 1e6


def _is_shift(value: float) -> bool:
    return -2 <= value <= 2
