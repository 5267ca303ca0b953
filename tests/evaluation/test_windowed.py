"""Confidence intervals over correlated tokens, against WindowStats, simulation and a bootstrap of windows."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from klfast.core.window_stats import WindowStats
from klfast.evaluation.windowed import Estimate, Windows


def drawn(generator, windows=40, length=50):
    """Return skewed values, correlated within their windows, and the window of each."""
    level = generator.normal(0, 0.5, windows)
    return np.exp(level[:, None] + generator.normal(0, 1, (windows, length))).ravel(), np.repeat(
        np.arange(windows), length
    )


def test_means_have_the_standard_error_of_window_stats():
    generator = np.random.default_rng(0)
    lengths = [3, 3, 7, 12, 5]
    values, tally = [generator.normal(size=n) for n in lengths], WindowStats(1, 1)
    for one in values:
        tally.add(0, torch.tensor([[[one.sum()]]]), len(one))
    of_token = np.repeat([9, 2, 5, 70, 11], lengths)
    found = Windows(of_token).mean(np.concatenate(values))
    assert found.value == pytest.approx(tally.mean(0)[0])
    half = stats.t.ppf(0.975, 4) * tally.stderr(0)[0]
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half))


def test_quantiles_agree_with_a_bootstrap_of_windows():
    generator = np.random.default_rng(1)
    values, of_token = drawn(generator)
    rows = values.reshape(40, 50)
    again = rows[generator.integers(0, 40, (2000, 40))].reshape(2000, -1)
    for share in (0.5, 0.9, 0.99):
        found = Windows(of_token).quantile(values, share)
        low, high = np.quantile(np.quantile(again, share, axis=1), (0.025, 0.975))
        assert found.value == np.quantile(values, share)
        assert (found.low, found.high) == pytest.approx((low, high), rel=0.12)


@pytest.mark.parametrize("share", [None, 0.5, 0.99])
def test_intervals_cover_the_truth(share):
    """In 95 % of samples; the tokens of a window as if independent would cover it in about half."""
    generator = np.random.default_rng(2)
    total = stats.lognorm(math.sqrt(1.25))
    truth = total.mean() if share is None else total.ppf(share)
    covered = 0
    for _ in range(200):
        values, of_token = drawn(generator)
        windows = Windows(of_token)
        found = windows.mean(values) if share is None else windows.quantile(values, share)
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_bounds_and_single_windows():
    values, windows = np.array([0.0, 0.0, 1.0, 1.0]), Windows(np.array([0, 0, 1, 1]))
    assert windows.mean(values, least=0, most=1) == Estimate(0.5, 0, 1)
    assert windows.quantile(values, 0.5) == Estimate(0.5, 0, 1)
    alone = Windows(np.zeros(4, int))
    assert alone.mean(values) == Estimate(0.5) and alone.quantile(values, 1.0) == Estimate(1.0)
    assert windows.mean(values).through(lambda x: x + 1).value == 1.5
