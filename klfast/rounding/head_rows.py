"""The rows of a head that is tied to the embedding, which the model reads in two ways.

As output weights: an error e of row v moves its logit by e h, and the KL divergence by p_v (1 - p_v) (e h)^2 / 2, where
p_v is the probability of the token (the diagonal of the Fisher information). As embeddings: it moves what enters the
first block wherever the token stands in the text. The mean divergence is about the sum over v of
s_v e H e^T / 2 + k f_v |e|^2, with H = E[h h^T], s_v = E[p_v (1 - p_v)] and f_v the frequency of the token; k is
measured by rounding the embedding alone. So the objective of a row is e H e^T + r_v |e|^2 with r_v = 2 k f_v / s_v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klfast.models.head import Readout

_MOST_TOKENS = 8192  # whose probabilities are computed
_MOST_LOGITS = 2**24  # at once
_LEAST_SPREAD = 1e-9


def ridges(readout: Readout, ids: Sequence[torch.Tensor], hidden: Sequence[torch.Tensor], cost: float) -> torch.Tensor:
    """Return the ridge r of each row of the head, float32 [V].

    Args:
        readout: the head in full precision.
        ids: the calibration text, int64 [B, T] each.
        hidden: what enters the head there, [B, T, H] each.
        cost: k, in nats a token for a squared error of 1 in each token's embedding.
    """
    vocabulary = readout.weight.shape[0]
    tokens = torch.cat([batch.flatten() for batch in ids])
    frequency = (torch.bincount(tokens, minlength=vocabulary) + 0.5) / (len(tokens) + 0.5 * vocabulary)
    states = torch.cat([batch.flatten(0, 1) for batch in hidden])
    states = states[:: -(-len(states) // _MOST_TOKENS)]
    spread = torch.zeros(vocabulary, device=states.device)
    for some in states.split(max(1, _MOST_LOGITS // vocabulary)):
        p = readout.logits(some).softmax(-1)
        spread += (p - p.square()).sum(0)
    spread = (spread / len(states)).clamp(min=_LEAST_SPREAD)
    return 2 * cost * frequency / (spread * readout.rule.scale**2)
