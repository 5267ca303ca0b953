"""Triton's grouped_dequant_matmul against float64, and what it reads."""

import pytest
import torch
from test_dequant_matmul import CHECKS
from test_grouped_dequant_matmul import SPECS, check, operands

from klfast import Layout, QuantizedTensor, QuantSpec
from klfast.core.errors import InvalidInputError, SlowPathWarning
from klfast.ops import grouped_dequant_matmul

SHAPES = [(5, 37, 131, 1, 3), (3, 32, 96, 7, 2), (2, 20, 64, 17, 1), (3, 1, 1, 2, 2)]


def run(device, x, qt, index, count, activation="exact"):
    """Run on the device, with the matrices in its layout; return the result on the CPU."""
    tiled = qt.to(device).to_layout(Layout.TILED)
    return grouped_dequant_matmul(x.to(device), tiled, index.to(device), count, activation=activation).cpu()


@pytest.mark.parametrize("activation", CHECKS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_against_float64(device, spec, activation):
    for count, *shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, qt, index = operands(count, *shape, spec, dtype)
            check(x, qt, index, count, run(device, x, qt, index, count, activation), activation)


def test_reads_only_the_matrices_that_rows_meet(device):
    x, qt, index = operands(4, 32, 96, 3, 1, QuantSpec(4, 32))
    index = index.clamp(min=2)
    want = run(device, x, qt, index, 4)
    packed, scale = (part.clone() for part in qt.parts)
    scale[:64] = torch.nan
    assert torch.equal(run(device, x, QuantizedTensor([packed, scale], qt.shape, qt.spec), index, 4), want)


def test_nothing_to_do(device):
    x, qt, index = operands(3, 8, 64, 4, 2, QuantSpec(4, 32))
    assert run(device, x[:0], qt, index[:0], 3).shape == (0, 2, 8)
    narrow = QuantizedTensor([torch.zeros(24, 0, dtype=torch.int32), torch.ones(24, 0)], (24, 0), QuantSpec(4, 32))
    found = grouped_dequant_matmul(x[:, :0].to(device), narrow.to(device), index.to(device), 3)
    assert torch.equal(found.cpu(), torch.zeros(4, 2, 8))


def test_bad_index_and_layout(device):
    x, qt, index = operands(3, 8, 64, 4, 2, QuantSpec(4, 32))
    with pytest.raises(InvalidInputError, match=r"index must lie in 0\.\.2 for 3 matrices, got -1\.\.-1"):
        run(device, x, qt, torch.full_like(index, -1), 3)
    with pytest.warns(SlowPathWarning, match="grouped_dequant_matmul"):
        found = grouped_dequant_matmul(x.to(device), qt.to(device), index.to(device), 3)
    check(x, qt, index, 3, found.cpu())
