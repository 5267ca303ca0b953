"""linear on a GPU, which is torch's product: the CPU kernel's cases, on the device."""

import pytest
import torch
from test_linear import check, operands, test_against_float64  # noqa: F401

from klfast import ops
from klfast.core.dtypes import FLOAT_DTYPES


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device):
    """Turn off torch's default on NVIDIA GPUs of summing parts of a bfloat16 product in bfloat16."""
    usual = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    with device:
        yield
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = usual


def test_strides_and_empty():
    for dtype in FLOAT_DTYPES:
        x, weight, bias = operands(20, 50, 130, dtype)
        for a, w in (
            (x.T.contiguous().T, weight),
            (torch.cat([x, x], 1)[:, :130], torch.cat([weight, weight], 1)[:, 130:]),
        ):
            check(x, weight, bias, ops.linear(a.view(2, 10, 130), w, bias).view(20, 50), dtype)
        assert ops.linear(x[:0], weight).shape == (0, 50) and ops.linear(x, weight[:0]).shape == (20, 0)
        assert torch.equal(ops.linear(x[:, :0], weight[:, :0], bias), bias.to(dtype).expand(20, -1))
