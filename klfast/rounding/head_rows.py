"""What the rows of a head cost, and those of a tied one, which the model reads in two ways.

As output weights: an error e of row v moves its logit by e h, and the KL divergence by p_v (1 - p_v) (e h)^2 / 2, where
p_v is the probability of the token (the diagonal of the Fisher information). As embeddings: it moves what enters the
first block wherever the token stands in the text. The mean divergence is about the sum over v of
s_v e H e^T / 2 + k f_v |e|^2, with H = E[h h^T], s_v = E[p_v (1 - p_v)] and f_v the frequency of the token; k is
measured by rounding the embedding alone. So the objective of a row is e H e^T + r_v |e|^2 with r_v = 2 k f_v / s_v,
and its cost s_v times that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klfast.models.head import Readout

_MOST_TOKENS = 8192  # whose probabilities are computed
_MOST_LOGITS = 2**24  # at once
_LEAST_SPREAD = 1e-9


def spreads(readout: Readout, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return s of each row of a head, float32 [V], for logits that are scaled.

    Args:
        readout: the head in full precision.
        hidden: what enters it on the calibration text, [B, T, H] each.
    """
    states = torch.cat([batch.flatten(0, 1) for batch in hidden])
    states = states[:: -(-len(states) // _MOST_TOKENS)]
    spread = torch.zeros(readout.weight.shape[0], device=states.device)
    for some in states.split(max(1, _MOST_LOGITS // len(spread))):
        p = readout.logits(some).softmax(-1)
        spread += (p - p.square()).sum(0)
    return (spread / len(states)).clamp_(min=_LEAST_SPREAD) * readout.rule.scale**2


def ridges(spread: torch.Tensor, ids: Sequence[torch.Tensor], cost: float) -> torch.Tensor:
    """Return the ridge r of each row of a tied head, float32 [V].

    Args:
        spread: s.
        ids: the calibration text, int64 [B, T] each.
        cost: k, in nats a token for a squared error of 1 in each token's embedding.
    """
    tokens = torch.cat([batch.flatten() for batch in ids])
    frequency = (torch.bincount(tokens, minlength=len(spread)) + 0.5) / (len(tokens) + 0.5 * len(spread))
    return 2 * cost * frequency / spread
