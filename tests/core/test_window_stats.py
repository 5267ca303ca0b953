"""Sums over windows, their means and standard errors."""

import json
import math

import pytest
import torch

from klfast.core.errors import CheckpointError
from klfast.core.window_stats import WindowStats


def test_tally_matches_the_formula_and_survives_json():
    generator = torch.Generator().manual_seed(0)
    tally = WindowStats(3, 2)
    sums, counts = [], []
    for windows, length in ((4, 16), (1, 7), (3, 16)):
        part = torch.rand(2, 2, windows, dtype=torch.float64, generator=generator) * length
        tally.add(1, part, length)
        sums.append(part)
        counts += [length] * windows
        copied = WindowStats(3, 2)
        copied.load(json.loads(json.dumps(tally.to_data())))
        tally = copied
    sums, counts = torch.cat(sums, -1), torch.tensor(counts, dtype=torch.float64)
    mean = sums.sum(-1) / counts.sum()
    residual = sums - counts * mean.unsqueeze(-1)
    stderr = (residual.square().sum(-1) * 8 / 7).sqrt() / counts.sum()
    for i in range(2):
        assert tally.tokens(1 + i) == 4 * 16 + 7 + 3 * 16
        assert tally.mean(1 + i) == pytest.approx(mean[i].tolist(), rel=1e-14)
        assert tally.stderr(1 + i) == pytest.approx(stderr[i].tolist(), rel=1e-10)
    assert tally.tokens(0) == 0


def test_one_window_has_no_standard_error():
    tally = WindowStats(1, 1)
    tally.add(0, torch.ones(1, 1, 1, dtype=torch.float64), 5)
    assert tally.mean(0) == [0.2] and math.isnan(tally.stderr(0)[0])


@pytest.mark.parametrize(("name", "value"), [("sum", math.nan), ("square", math.inf), ("counts", -1.0)])
def test_sums_that_cannot_be(name, value):
    tally = WindowStats(1, 1)
    tally.add(0, torch.ones(1, 1, 2, dtype=torch.float64), 5)
    tally._parts[name][0, 0] = value
    with pytest.raises(CheckpointError, match="damaged .a NaN"):
        WindowStats(1, 1).load(tally.to_data())
