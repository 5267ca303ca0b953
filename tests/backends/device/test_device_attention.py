"""Triton's decode_attention against float64: the CPU kernel's cases, on the device."""

import pytest
import test_attention as cases
import torch
from klfast.kernels import decode_attention as kernel
from klfast.kernels import launch
from test_attention import (  # noqa: F401
    test_a_nan_shows,
    test_any_strides_and_mixed_types,
    test_default_scale_is_that_of_sdpa,
    test_keys_of_width_zero_weigh_the_same,
    test_large_scores_stay_finite,
    test_opcheck,
)

from klfast import ops
from klfast.core.dtypes import FLOAT_DTYPES

SHAPES = [  # the CPU kernel's, with fewer heads: the interpreter is slow
    (1, 1, 1, 1, 1, 1),
    (2, 5, 5, 3, 8, 8),
    (1, 10, 2, 131, 64, 128),
    (3, 9, 1, 63, 7, 33),
    (2, 16, 2, 17, 100, 63),
    (1, 6, 2, 300, 48, 24),
]


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    """With many cores, in as many parts as the keys allow."""
    monkeypatch.setattr(launch, "cores", lambda _: 100)
    monkeypatch.setattr(kernel, "SMALLEST_PART", 50)
    with device:
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape):
    for dtype in FLOAT_DTYPES if shape[1] in (5, 16) else (torch.float32,):
        cases.test_against_float64(shape, dtype, "triton")


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] > 100])
def test_many_keys_on_one_core(shape, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda _: 1)
    cases.test_against_float64(shape, torch.float32, "triton")


def test_the_last_part_may_be_short_and_the_largest_score_anywhere(device):
    for at in (0, 63, 64, 199):
        q, k, v = cases.inputs(1, 4, 2, 200, 16, 16)
        k[:, :, at] *= 50
        torch.testing.assert_close(
            ops.decode_attention(q, k, v, 1.0).double(), cases.truth(q, k, v, 1.0), rtol=1e-4, atol=2e-5
        )


def test_writes_all_of_y_and_no_more(device):
    q, k, v = cases.inputs(2, 6, 3, 50, 16, 24)
    for cores in (1, 100):
        buffer = torch.full((64 + 2 * 6 * 24 + 64,), torch.nan)
        y = buffer[64:-64].view(2, 6, 24)
        for one in kernel.plan(q, k, v, y, 0.25, cores=cores):
            one.run()
        torch.testing.assert_close(y.double(), cases.truth(q, k, v, 0.25), rtol=1e-5, atol=2e-6)
        assert buffer[:64].isnan().all() and buffer[-64:].isnan().all()
