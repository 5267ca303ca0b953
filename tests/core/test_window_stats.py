"""Sums over windows, with means and standard errors."""

import json
import math

import pytest
import torch

from klfast.core.errors import CheckpointError
from klfast.core.window_stats import WindowStats


def test_stats_match_the_formula_and_survive_json():
    generator = torch.Generator().manual_seed(0)
    stats = WindowStats(3, 2)
    sums, counts = [], []
    for windows, length in ((4, 16), (1, 7), (3, 16)):
        part = torch.rand(2, 2, windows, dtype=torch.float64, generator=generator) * length
        stats.add(1, part, length)
        sums.append(part)
        counts += [length] * windows
        copied = WindowStats(3, 2)
        copied.load(json.loads(json.dumps(stats.to_data())))
        stats = copied
    sums, counts = torch.cat(sums, -1), torch.tensor(counts, dtype=torch.float64)
    mean = sums.sum(-1) / counts.sum()
    residual = sums - counts * mean.unsqueeze(-1)
    stderr = (residual.square().sum(-1) * 8 / 7).sqrt() / counts.sum()
    for i in range(2):
        assert stats.tokens(1 + i) == 4 * 16 + 7 + 3 * 16
        assert stats.mean(1 + i) == pytest.approx(mean[i].tolist(), rel=1e-14)
        assert stats.stderr(1 + i) == pytest.approx(stderr[i].tolist(), rel=1e-10)
    assert stats.tokens(0) == 0


def test_one_window_has_no_standard_error():
    stats = WindowStats(1, 1)
    stats.add(0, torch.ones(1, 1, 1, dtype=torch.float64), 5)
    assert stats.mean(0) == [0.2] and math.isnan(stats.stderr(0)[0])


@pytest.mark.parametrize(
    ("sums", "tokens"),
    [(1e200, 5), (1.0, -5), (1.0, math.nan)],
    ids=["square beyond floats", "negative count", "NaN count"],
)
def test_impossible_sums_are_refused(sums, tokens):
    stats = WindowStats(1, 1)
    stats.add(0, torch.full((1, 1, 2), sums, dtype=torch.float64), tokens)
    with pytest.raises(CheckpointError, match=r"damaged \(an infinity"):
        WindowStats(1, 1).load(stats.to_data())
