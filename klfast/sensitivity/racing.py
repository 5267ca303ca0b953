"""Which candidates a plan still depends on: those that it picks in some, but not all, of the worlds that may be true.

Each candidate has a cost that is known to some error. Costs are drawn within their errors again and again, and the best
plan of each draw is found; what is picked now and then is contested, and worth more tokens. A plan takes for each layer
the option that minimizes cost + price * bytes, with the least price that keeps it within the limit, and spends what is
left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_DRAWS = 32
_SETTLED = 0.01  # the plan's cost above the best plan's, mean over draws, that is good enough
_CONTESTED = 0.08, 0.92  # picked in more than and in less than this share of the draws
_BISECTIONS = 60
_REFILLS = 3


@dataclass(frozen=True)
class Field:
    """Options of L layers, the first of each its full precision; ``nbytes`` is infinite where one has fewer than O.

    Attributes:
        costs: float64 [L, O], the KL; 0 at full precision.
        errors: float64 [L, O], their standard errors as shares of them.
        nbytes: float64 [L, O].
    """

    costs: torch.Tensor
    errors: torch.Tensor
    nbytes: torch.Tensor


def contested(field: Field, limits: Sequence[float]) -> torch.Tensor:
    """Return, bool [L, O], the options about which the plan within any of the limits (bytes) hesitates.

    None are left once the plans are good enough.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(_DRAWS, *field.costs.shape, dtype=torch.float64, generator=generator)
    worlds = field.costs * (field.errors * numbers).exp()
    found = torch.zeros_like(field.costs, dtype=torch.bool)
    for limit in limits:
        picks = best(worlds, field.nbytes, limit)
        now = best(field.costs.unsqueeze(0), field.nbytes, limit).expand_as(picks)
        ours, theirs = (worlds.gather(-1, some.unsqueeze(-1)).sum((-2, -1)) for some in (now, picks))
        if (ours / theirs.clamp(min=torch.finfo(theirs.dtype).tiny)).mean() < 1 + _SETTLED:
            continue
        share = torch.nn.functional.one_hot(picks, field.costs.shape[1]).double().mean(0)
        found |= (share > _CONTESTED[0]) & (share < _CONTESTED[1])
    return found


def best(costs: torch.Tensor, nbytes: torch.Tensor, limit: float) -> torch.Tensor:
    """Return options, int64 [S, L]: plans of costs [S, L, O] within ``limit`` bytes, or else the smallest ones.

    With one price for all layers, a plan ends where the next step does not fit, though that may be that of a large
    head. So what is left of the limit is spent in the same way, without the options that do not fit.
    """
    picks = _at_one_price(costs, nbytes, limit)
    for _ in range(_REFILLS):
        held = nbytes.expand(len(picks), -1, -1).gather(-1, picks.unsqueeze(-1))
        left = (limit - held.sum(1, keepdim=True)).clamp(min=0)
        picks = _at_one_price(costs.masked_fill(nbytes > held + left, torch.inf), nbytes, limit)
    return picks


def _at_one_price(costs: torch.Tensor, nbytes: torch.Tensor, limit: float) -> torch.Tensor:
    """Return options, int64 [S, L], with the least price of a byte that keeps all layers within the limit."""
    low = torch.full((len(costs), 1, 1), -60.0, dtype=torch.float64)  # logarithms of the price
    high = torch.full_like(low, 20.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_large = _spent(_picks(costs, nbytes, middle), nbytes) > limit
        low, high = torch.where(is_large, middle, low), torch.where(is_large, high, middle)
    return _picks(costs, nbytes, high)


def _picks(costs: torch.Tensor, nbytes: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
    return (costs + price.exp() * nbytes).argmin(-1)


def _spent(picks: torch.Tensor, nbytes: torch.Tensor) -> torch.Tensor:
    return nbytes.expand(len(picks), -1, -1).gather(-1, picks.unsqueeze(-1)).sum(1, keepdim=True)
