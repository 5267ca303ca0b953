"""Log probabilities of tokens, as users ask for them beside a text."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

_LOWEST = -9999.0  # for a probability of 0, whose logarithm JSON cannot hold; OpenAI's own value


class TokenScores(NamedTuple):
    """Natural logarithms of probabilities by the model's own logits, before penalties, temperature and limits.

    Attributes:
        token: the token that was chosen.
        logprob: its own.
        top: the most likely tokens with theirs, best first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_scores(logits: torch.Tensor, token: int, top: int) -> TokenScores:
    """Return the scores of a token and of the ``top`` most likely ones by float32 logits [V]."""
    logs = logits.log_softmax(-1)
    best = logs.topk(min(top, len(logs)))
    ranked = zip(best.indices.tolist(), map(_finite, best.values.tolist()), strict=True)
    return TokenScores(token, _finite(float(logs[token])), list(ranked))


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
