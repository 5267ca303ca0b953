"""Grids: those of klfast.quantize, the weighted search, scales of either sign."""

import pytest
import torch

from klfast import QuantSpec, quantize
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.rounding import grids as module
from klfast.rounding.grids import absmax, search, stored

SPECS = [
    QuantSpec(bits, group, symmetric) for bits in (4, 6, 8) for group in (-1, 7, 64) for symmetric in (True, False)
]


def weighted_errors(weight, grid, codes, importance, length):
    """Return the weighted squared error of each group, float64 [G, N]."""
    error = (grid.values(codes).double() - weight.T.double()).square() * importance.double()[:, None]
    return torch.stack([part.sum(0) for part in error.split(length)])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_absmax_is_the_grid_of_quantize(spec, dtype):
    weight = torch.randn(9, 100)
    grid = absmax(weight.T.contiguous(), spec, dtype)
    values = grid.values(grid.nearest(weight.T.contiguous()))
    want = quantize(weight, spec, scale_dtype=dtype).dequantize(torch.float32).T
    assert ((values - want).abs() > 1e-6).float().mean() < 0.01, "a tie may round either way"


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_search_is_never_worse_than_absmax_in_any_group(spec, dtype):
    weight = torch.distributions.StudentT(3.0).sample((16, 100))
    importance = torch.rand(100) ** 3 + 1e-3
    matrix, length = weight.T.contiguous(), spec.group_length(100)
    grids = absmax(matrix, spec, dtype), search(matrix, importance, spec, dtype)
    plain, found = (weighted_errors(weight, grid, grid.nearest(matrix), importance, length) for grid in grids)
    assert (found <= plain * (1 + 1e-5)).all()
    if spec.bits == 4:
        assert found.sum() < 0.85 * plain.sum()
    assert torch.equal(grids[1].step, grids[1].step.to(dtype).float()), "as it is stored"


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_in_tiles_is_that_of_the_whole(symmetric, monkeypatch):
    spec, matrix, importance = QuantSpec(4, 32, symmetric), torch.randn(70, 25), torch.rand(70)
    whole = search(matrix, importance, spec, torch.float16)
    monkeypatch.setattr(module, "_TILE", 280)  # 4 columns
    tiled = search(matrix, importance, spec, torch.float16)
    for name in ("step", "low", "high"):
        assert torch.equal(getattr(tiled, name), getattr(whole, name))


def test_the_largest_weight_may_fall_on_the_smallest_code():
    spec, codes = QuantSpec(4, 16), torch.arange(-7.0, 9.0).repeat(3, 1)  # 16 values, the largest of them positive
    matrix = (codes * torch.tensor([[0.5], [-0.25], [1.0]])).T.contiguous()
    grid = search(matrix, torch.ones(16), spec, torch.float16)
    assert torch.equal(grid.values(grid.nearest(matrix)), matrix)
    assert torch.equal(grid.step[0], torch.tensor([-0.5, 0.25, -1.0]))


def test_the_weights_of_the_error_count():
    weight, importance = torch.randn(8, 64), torch.ones(64)
    importance[5] = 1e4
    matrix = weight.T.contiguous()
    grids = [search(matrix, each, QuantSpec(4, 64), torch.float16) for each in (importance, torch.ones(64))]
    errors = [(grid.values(grid.nearest(matrix)) - matrix)[5].abs().mean() for grid in grids]
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_of_zeros_stay_zero(spec):
    matrix = torch.zeros(70, 3)
    grid = search(matrix, torch.ones(70), spec, torch.float16)
    assert torch.equal(grid.values(grid.nearest(matrix)), matrix)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_stored_scale_keeps_its_sign_and_is_never_zero(dtype):
    found = stored(torch.tensor([0.0, -1e-40, 0.3, -0.3]), dtype)
    assert (found != 0).all() and torch.equal(found.sign(), torch.tensor([1.0, -1, 1, -1]))
    assert torch.equal(found[2:], torch.tensor([0.3, -0.3]).to(dtype).float())
