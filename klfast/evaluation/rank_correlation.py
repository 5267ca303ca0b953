"""Kendall's tau-b and Spearman's rho, for many weightings of the items at once, as a bootstrap needs them.

Weights are counts: an item of weight 2 counts as two items of equal value, as if drawn twice. With weights of one these
are scipy's ``kendalltau`` (variant b) and ``spearmanr``. Intervals are percentiles over resampled items (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

import numpy as np

from klfast.evaluation.windowed import CONFIDENCE, Estimate, Values

DRAWS = 2000


def resampled(items: int, draws: int = DRAWS, seed: int = 0) -> Values:
    """Return the weights of resamples, float64 [1 + draws, items]; the first are those of the items as they are."""
    drawn = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), draws)
    return np.concatenate([np.ones((1, items)), drawn.astype(np.float64)])


def kendall(x: Values, y: Values, weights: Values) -> Values:
    """Return tau-b of float64 [n] and [n] for each of the weights [D, n]; NaN where all items tie in one of them."""
    first, second = _signs(x), _signs(y)

    def summed(pairs: Values) -> Values:
        return ((weights @ pairs) * weights).sum(1)

    return _ratio(summed(first * second), summed(first**2), summed(second**2))


def spearman(x: Values, y: Values, weights: Values) -> Values:
    """Return the correlation of the ranks of float64 [n] and [n] for each of the weights [D, n]; NaN as ``kendall``."""
    first, second = (_centred_ranks(values, weights) for values in (x, y))

    def summed(a: Values, b: Values) -> Values:
        return (weights * a * b).sum(1)

    return _ratio(summed(first, second), summed(first, first), summed(second, second))


def estimate(statistics: Values) -> Estimate:
    """Return the first of the statistics, and as its interval the percentiles of the others, without the NaN."""
    drawn = statistics[1:][~np.isnan(statistics[1:])]
    if np.isnan(statistics[0]) or not len(drawn):
        return Estimate(float(statistics[0]))
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)).tolist()
    return Estimate(float(statistics[0]), low, high)


def _signs(values: Values) -> Values:
    """Return -1, 0 or 1 for each pair of values, which may be infinite: float64 [n, n]."""
    return (values[:, None] > values).astype(np.float64) - (values[:, None] < values)


def _centred_ranks(values: Values, weights: Values) -> Values:
    """Return the mid-ranks of the values among all weighted items, less their mean: [D, n]."""
    return weights @ _signs(values).T / 2  # half of how many items lie below, less half of how many lie above


def _ratio(product: Values, first: Values, second: Values) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(first * second > 0, product / np.sqrt(first * second), np.nan)
