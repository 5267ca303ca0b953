"""What the rows of a head cost, and those of a tied one, which the model reads in two ways.

As output weights: an error e of row v moves its logit by e h, and the KL divergence by p_v (1 - p_v) (e h)^2 / 2, where
p_v is the probability of the token (the diagonal of the Fisher information). As embeddings: it moves what enters the
first block wherever the token stands in the text. The mean divergence is about the sum over v of
s_v e H e^T / 2 + k f_v |e|^2, with H = E[h h^T], s_v = E[p_v (1 - p_v)] and f_v the frequency of the token; k is
measured by rounding the embedding alone. So the objective of a row is e H e^T + r_v |e|^2 with r_v = 2 k f_v / s_v,
and its cost s_v times that.

More exactly, H is E[p_v (1 - p_v) h h^T] / s_v: from where the token is likely. Similar rows, of tokens that are likely
in similar places, share one H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from klfast.models.head import Readout
from klfast.rounding.moments import Moments

_MOST_TOKENS = 8192  # whose probabilities are computed
_MOST_LOGITS = 2**24  # at once
_LEAST_SPREAD = 1e-9
_CLUSTERS, _ITERATIONS = 16, 15
_SHARED = 0.05  # of a cluster's H, taken from that of all rows


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


@dataclass(frozen=True, eq=False)
class Clusters:
    """Similar rows of a head.

    Attributes:
        of_row: int64 [V], the number of each row's cluster.
        hessian: float32 [C, K, K], H of each cluster; of the inputs y in the partly rounded model.
        cross: float32 [C, K, K], the same of y^T x with the inputs x in the full-precision model.
        spread: s of each row, float32 [V], for logits that are scaled; None where all rows count alike.
    """

    of_row: torch.Tensor
    hessian: torch.Tensor
    cross: torch.Tensor
    spread: torch.Tensor | None = None


class Rows(NamedTuple):
    """What the rows of a matrix cost.

    Attributes:
        clusters: their Hessians.
        ridge: r of each row, float32 [V]; None if all are 0.
    """

    clusters: Clusters
    ridge: torch.Tensor | None = None

    def errors(self, error: torch.Tensor) -> torch.Tensor:
        """Return what an error of the weight, float32 [V, K], costs by row, float32 [V]."""
        found = torch.empty(len(error), device=error.device)
        for each, hessian in enumerate(self.clusters.hessian):
            some = error[members := self.clusters.of_row == each]
            found[members] = (some * (some @ hessian)).sum(-1)
        if self.ridge is not None:
            found += self.ridge * error.square().sum(-1)
        return found if self.clusters.spread is None else found * self.clusters.spread


def clusters(
    readout: Readout, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], moments: Moments
) -> Clusters:
    """Return the clusters of a head's rows.

    Args:
        readout: the head in full precision, a float weight.
        student: what enters it in the partly rounded model, [B, T, H] each.
        teacher: the same in the full-precision model.
        moments: of both, over all tokens.
    """
    y, x = _some(student), _some(teacher)
    hessian, cross = moments.hessian / moments.tokens, moments.cross / moments.tokens
    assert isinstance(readout.weight, torch.Tensor)
    of_row = _k_means(readout.weight.float())
    found = torch.zeros(2, int(of_row.max()) + 1, *hessian.shape, device=x.device)
    sums = torch.zeros(found.shape[1], device=x.device)
    spread = torch.zeros(len(of_row), device=x.device)
    for uncertain, places in _uncertainties(readout, x):
        spread += uncertain.sum(0)
        weights = torch.zeros(len(uncertain), found.shape[1], device=x.device).index_add_(1, of_row, uncertain)
        for each, weight in enumerate(weights.T):
            weighted = y[places].T * weight
            found[0, each].addmm_(weighted, y[places])
            found[1, each].addmm_(weighted, x[places])
            sums[each] += weight.sum()
    own = found / sums.clamp(min=_LEAST_SPREAD)[:, None, None]
    size = own[0].diagonal(dim1=1, dim2=2).sum(1) / hessian.trace()
    shared = torch.stack([hessian, cross])[:, None]
    own.lerp_(shared * size[:, None, None], _SHARED)
    hessians, crosses = torch.where(sums[:, None, None] > _LEAST_SPREAD, own, shared)
    spread = (spread / len(x)).clamp_(min=_LEAST_SPREAD) * readout.rule.scale**2
    return Clusters(of_row, hessians, crosses, spread)


def _some(hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a part of the hidden states, evenly spread, float32 [T, H]."""
    states = torch.cat([batch.flatten(0, 1) for batch in hidden])
    return states[:: -(-len(states) // _MOST_TOKENS)]


def _uncertainties(readout: Readout, states: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice]]:
    """Yield p (1 - p), float32 [t, V], for parts of the hidden states [T, H], and which parts."""
    length = max(1, _MOST_LOGITS // readout.weight.shape[0])
    for start in range(0, len(states), length):
        places = slice(start, start + length)
        p = readout.logits(states[places]).softmax(-1)
        yield p - p.square(), places


def _k_means(points: torch.Tensor) -> torch.Tensor:
    """Return the cluster of each of the points [V, K], int64 [V], by Lloyd's algorithm."""
    first = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:_CLUSTERS]
    centres = points[first.to(points.device)]
    for _ in range(_ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(1)
        members = F.one_hot(nearest, len(centres)).to(points.dtype)
        sums, counts = members.T @ points, members.sum(0)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return nearest
