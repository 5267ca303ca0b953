"""Rank correlations against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from klfast.evaluation.rank_correlation import estimate, kendall, resampled, spearman
from klfast.evaluation.windowed import Estimate


@pytest.fixture
def values():
    """Create two related rankings of 17 items with ties and an infinity."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=17).round(1)
    y = (x + generator.normal(size=17)).round(0)
    x[3] = math.inf
    return x, y


def test_equal_scipys(values):
    x, y = values
    ones = np.ones((1, 17))
    assert kendall(x, y, ones)[0] == pytest.approx(stats.kendalltau(x, y).statistic)
    assert spearman(x, y, ones)[0] == pytest.approx(stats.spearmanr(stats.rankdata(x), stats.rankdata(y)).statistic)


def test_weights_are_counts(values):
    x, y = values
    weights = resampled(17, draws=5)
    assert (weights[0] == 1).all() and (weights.sum(1) == 17).all()
    for row, tau, rho in zip(weights, kendall(x, y, weights), spearman(x, y, weights), strict=True):
        a, b = (stats.rankdata(np.repeat(one, row.astype(int))) for one in (x, y))
        assert tau == pytest.approx(stats.kendalltau(a, b).statistic)
        assert rho == pytest.approx(stats.spearmanr(a, b).statistic)


def test_intervals_are_percentiles_of_a_bootstrap(values):
    x, y = values
    found = estimate(kendall(x, y, resampled(17)))
    ranks = stats.rankdata(x), stats.rankdata(y)
    expected = stats.bootstrap(
        ranks, lambda a, b: stats.kendalltau(a, b).statistic, paired=True, vectorized=False, n_resamples=1000,
        method="percentile", random_state=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.06)


def test_nothing_to_rank():
    ties, some = np.zeros(4), np.arange(4.0)
    assert (
        np.isnan(kendall(ties, some, np.ones((1, 4)))).all() and np.isnan(spearman(some, ties, np.ones((1, 4)))).all()
    )
    assert math.isnan(estimate(np.array([math.nan, math.nan])).value)
    assert estimate(np.array([0.5, math.nan])) == Estimate(0.5)
